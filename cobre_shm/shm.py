"""The shm backend: ties a segment and the kernels to the contract."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import time
import traceback
import weakref
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

import numpy as np
from numpy.typing import DTypeLike

from cobre_shm import fastcall, layout
from cobre_shm.arrays import check_shape
from cobre_shm.communicator import Array, Communicator, Counts
from cobre_shm.cpus import cgroup_quota
from cobre_shm.datatypes import ReduceOp, dtype_tag
from cobre_shm.errors import CollectiveFailed, InvalidCommunicator
from cobre_shm.failpoints import ENABLED, armed, reach
from cobre_shm.kernels import context
from cobre_shm.native.entry import (
    ALLGATHERV,
    ALLREDUCE,
    ALLREDUCE_COMMON,
    BARRIER,
    BROADCAST,
    CLAIM,
    Kernel,
)
from cobre_shm.native.reduce import reduce_with_numpy, reduction_address
from cobre_shm.plan import make_plan
from cobre_shm.segment.common import MemorySource
from cobre_shm.segment.failure import failure, mismatch, missing_ranks
from cobre_shm.segment.handover import NotAName, new_named_segment, new_unnamed_segment
from cobre_shm.segment.join import join, leave
from cobre_shm.segment.last_words import write_last_words
from cobre_shm.segment.pages import PagePolicy
from cobre_shm.segment.patience import Patience
from cobre_shm.segment.poison import Poison, poison, read_poison
from cobre_shm.segment.region import ShmRegion
from cobre_shm.segment.segment import Segment
from cobre_shm.segment.shared_heap import SharedHeap
from cobre_shm.selection.kinds import ShmConfig
from cobre_shm.tuning import NAMES, SPIN_PAUSES, default_tuning, load_tuning
from cobre_shm.validate import (
    check_allgatherv,
    check_allreduce,
    check_broadcast,
    check_gather_buffers,
    check_reduction,
    check_region,
)

__all__ = ["ShmCommunicator"]

# Upper bound of the adaptive spin, in pauses (about 50 us): shorter than any time slice.
_SPIN_LIMIT_MAX = 2000
# Results of allreduce_shared that are kept, of as many dtypes and lengths.
_RESULTS = 8

_living: weakref.WeakSet[ShmCommunicator] = weakref.WeakSet()


class _State:
    """The first base: it gives ``_context`` the place right behind the object's head.

    ``fastcall.py`` reads it there.
    """

    __slots__ = ("_context",)
    _context: Array


class ShmCommunicator(_State, Communicator):
    """Ranks on one machine, over a shared memory segment.

    Construction is collective: it returns when all ranks have joined, and the segment's name is
    gone by then. See ``segment/join.py`` for joining, ``kernels/rounds.py`` for the
    collectives, ``kernels/waiting.py`` for waiting.

    A rank whose process ends without ``close()`` has failed, whatever its exit code, for the
    ranks that wait for it. Communicators made by another thread than the main one cannot be
    watched by the kernel; their death is found in the process table instead.

    Args:
        config: Name, rank, size, time limit, slot size.
        made: The group's segment, if this process has made it already; it is the communicator's
            from now on.

    Raises:
        InitializationFailed: The group did not come together.
        AllocationFailed: The segment does not fit into shared memory.
    """

    backend = "shm"
    _unusable: CollectiveFailed | InvalidCommunicator | None = InvalidCommunicator(
        "The communicator has not joined a group", context={"backend": "shm"}
    )

    def __new__(cls, *_: object, **__: object) -> Self:
        """Return one that has not joined, and refuses to begin anything."""
        self = super().__new__(cls)
        self._context = _unjoined
        return self

    def __init__(self, config: ShmConfig, *, made: Segment | None = None) -> None:
        self.rank: int = config.rank
        self.size: int = config.size
        self.is_leader: bool = config.rank == 0
        self._timeout = config.timeout_secs
        self._stall_warn = config.stall_warn_secs
        self._heap: SharedHeap | None = None
        self._common: SharedHeap | None = None
        self._results: dict[tuple[int, int], Array] = {}
        self._tuning = config.tuning
        self._is_occupied = False
        chosen = load_tuning(config.tuning) if config.tuning else {}
        self._segment = join(
            config.name,
            config.rank,
            config.size,
            config.slot_bytes,
            config.timeout_secs,
            lambda segment: _tuning_words(segment, chosen),
            made,
        )
        self.slot_bytes: int = self._segment.slot_bytes
        self._memory = MemorySource(
            self,
            self._segment.region_prefix,
            may_be_unnamed=self._segment.may_be_unnamed,
            pages=PagePolicy(config.hugepages, config.numa_interleave),
        )
        room = 3 * config.size + 3 + context.COSTS_WORDS
        self._private = np.zeros(room, dtype=np.int64)
        self._scratch = np.empty(context.SCRATCH_BYTES + layout.LINE_BYTES, dtype=np.uint8)
        state = _new_context(self._segment, config.rank, self._scratch)
        displs, arguments, sources, costs = np.split(
            self._private, (config.size, config.size + 3, 3 * config.size + 3)
        )
        state[context.SOURCES] = sources.ctypes.data
        state[context.COSTS] = costs.ctypes.data
        fastcall.serve(ShmCommunicator, state, displs, arguments)
        self._known = fastcall.Known(state)
        self._address = state.ctypes.data
        self._context = state
        self._unusable = None
        _living.add(self)

    def __repr__(self) -> str:
        return f"<ShmCommunicator rank {self.rank} of {self.size}>"

    def allgatherv(
        self,
        send: Array,
        recv: Array | None = None,
        counts: Counts | None = None,
        displs: Counts | None = None,
    ) -> Array:
        """See :meth:`Communicator.allgatherv`."""
        return self._allgatherv(send, recv, counts, displs, 0)

    def _allgatherv(
        self,
        send: Array,
        recv: Array | None,
        counts: Counts | None,
        displs: Counts | None,
        resume: int,
    ) -> Array:
        self._check_usable()
        send, recv = check_gather_buffers(self.size, send, recv, displs)
        if counts is None:
            counts = self._gather_counts(send)
        layout_ = check_allgatherv(self.rank, self.size, send, recv, counts, displs)
        self._gather(layout.ALLGATHERV, *layout_, resume=resume)
        self._known.add(layout_.send.dtype, None, 0, dtype_tag(layout_.send.dtype), 0)
        return layout_.recv

    def _finish_allgatherv(
        self, send: Array, recv: Array, counts: Counts, displs: Counts | None = None
    ) -> Array:
        return self._allgatherv(send, recv, counts, displs, 1)

    def _gather_counts(self, send: Array) -> Array:
        own = np.array([send.size], dtype=np.int64)
        counts = np.empty(self.size, dtype=np.int64)
        ones = np.ones(self.size, dtype=np.int64)
        self._gather(
            layout.COUNTS, own, counts, ones, np.arange(self.size), tag=dtype_tag(send.dtype)
        )
        return counts

    def _gather(
        self,
        operation: int,
        send: Array,
        recv: Array,
        counts: Array,
        displs: Array,
        tag: int | None = None,
        resume: int = 0,
    ) -> None:
        counts = np.ascontiguousarray(counts)
        displs = np.ascontiguousarray(displs)
        self._run(
            ALLGATHERV,
            resume,
            operation,
            dtype_tag(send.dtype) if tag is None else tag,
            int(counts.sum()),
            _address(send),
            _address(recv),
            _address(counts),
            _address(displs),
            send.itemsize,
        )

    def allreduce(
        self, send: Array, recv: Array | None = None, op: ReduceOp | str = ReduceOp.SUM
    ) -> Array:
        """See :meth:`Communicator.allreduce`."""
        return self._allreduce(send, recv, op, 0)

    def _finish_allreduce(self, send: Array, recv: Array, op: ReduceOp) -> Array:
        return self._allreduce(send, recv, op, 1)

    def _allreduce(self, send: Array, recv: Array | None, op: ReduceOp | str, resume: int) -> Array:
        self._check_usable()
        send, recv, op = check_allreduce(send, recv, op)
        reduction = reduction_address(send.dtype, op)
        if not reduction:
            self._reduce_with_numpy(send, recv, op)
            return recv
        self._run(
            ALLREDUCE,
            resume,
            layout.ALLREDUCE | op << 8,
            dtype_tag(send.dtype),
            send.size,
            _address(send),
            _address(recv),
            send.itemsize,
            reduction,
        )
        if isinstance(op, ReduceOp):
            self._known.add(
                send.dtype, op, layout.ALLREDUCE | op << 8, dtype_tag(send.dtype), reduction
            )
        return recv

    def allreduce_shared(self, send: Array, op: ReduceOp | str = ReduceOp.SUM) -> Array:
        """See :meth:`Communicator.allreduce_shared`."""
        self._check_usable()
        source, op = check_reduction("allreduce_shared", send, op)
        reduction = reduction_address(source.dtype, op)
        if not reduction:
            return super().allreduce_shared(send, op)
        result = self._common_result(source)
        self._run(
            ALLREDUCE_COMMON,
            0,
            layout.ALLREDUCE_SHARED | op << 8,
            dtype_tag(source.dtype),
            source.size,
            _address(source),
            _address(result),
            source.itemsize,
            reduction,
        )
        return result.reshape(source.shape)

    def _common_result(self, source: Array) -> Array:
        """The read-only vector in common memory for results like ``source``; perhaps collective.

        All ranks call with the same dtypes and lengths in the same order, so they find and forget
        the same ones.
        """
        key = dtype_tag(source.dtype), source.size
        found = self._results.pop(key, None)
        if found is None:
            self._run(BARRIER, 0, layout.ALLREDUCE_SHARED, *key)
            if self._common is None:
                self._common = self._new_heap(1)
            if len(self._results) == _RESULTS:
                del self._results[next(iter(self._results))]
            found = self._common.array((source.size,), source.dtype)
            found.flags.writeable = False
        self._results[key] = found
        return found

    def _reduce_with_numpy(self, send: Array, recv: Array, op: ReduceOp) -> None:
        """Gather blocks and reduce them in rank order, for dtypes without a compiled kernel."""
        per_block = min(self.slot_bytes // send.itemsize, send.size)
        source, target = send.reshape(-1), recv.reshape(-1)
        blocks = np.empty((self.size, per_block), dtype=send.dtype)
        displs = np.arange(self.size) * per_block
        # The exchange of blocks says which reduction they are for, and of what total length.
        call = layout.ALLREDUCE | op << 8, dtype_tag(send.dtype), send.size
        for start in range(0, send.size, per_block):
            count = min(per_block, send.size - start)
            counts = np.full(self.size, count)
            self._run(
                ALLGATHERV,
                0,
                *call,
                _address(source[start:]),
                _address(blocks),
                _address(counts),
                _address(displs),
                send.itemsize,
            )
            accumulator = blocks[0, :count]
            for rank in range(1, self.size):
                reduce_with_numpy(op, accumulator, blocks[rank, :count])
            target[start : start + count] = accumulator

    def broadcast(self, buf: Array, root: int = 0) -> Array:
        """See :meth:`Communicator.broadcast`."""
        return self._broadcast(buf, root, 0)

    def _finish_broadcast(self, buf: Array, root: int = 0) -> Array:
        return self._broadcast(buf, root, 1)

    def _broadcast(self, buf: Array, root: int, resume: int) -> Array:
        self._check_usable()
        array = check_broadcast(self.size, self.rank, buf, root)
        self._run(
            BROADCAST,
            resume,
            layout.BROADCAST | int(root) << 16,
            dtype_tag(array.dtype),
            array.size,
            int(root),
            _address(array),
            array.nbytes,
        )
        self._known.add(array.dtype, None, 0, dtype_tag(array.dtype), 0)
        return array

    def barrier(self) -> None:
        """See :meth:`Communicator.barrier`."""
        self._barrier(0)

    def _finish_barrier(self) -> None:
        self._barrier(1)

    def _barrier(self, resume: int) -> None:
        self._check_usable()
        self._run(BARRIER, resume, layout.BARRIER, 0, 0)

    def allgatherv_init(
        self, send: Array, recv: Array, counts: Counts, displs: Counts | None = None
    ) -> Callable[[], Array]:
        """See :meth:`Communicator.allgatherv_init`."""
        self._check_usable()
        check_gather_buffers(self.size, send, recv, displs)
        checked = check_allgatherv(self.rank, self.size, send, recv, counts, displs)
        lengths, starts = (np.array(array, dtype=np.int64) for array in checked[2:])
        source, target = checked.send, checked.recv
        tag, total = dtype_tag(source.dtype), int(lengths.sum())
        args = (
            *(layout.ALLGATHERV, tag, total, _address(source), _address(target)),
            *(_address(lengths), _address(starts), source.itemsize),
        )
        return self._plan(
            ALLGATHERV, args, total * source.itemsize, target, (source, lengths, starts)
        )

    def allreduce_init(
        self, send: Array, recv: Array, op: ReduceOp | str = ReduceOp.SUM
    ) -> Callable[[], Array]:
        """See :meth:`Communicator.allreduce_init`."""
        self._check_usable()
        source, target, op = check_allreduce(send, recv, op)
        reduction = reduction_address(source.dtype, op)
        if not reduction:
            return super().allreduce_init(send, recv, op)
        args = (
            *(layout.ALLREDUCE | op << 8, dtype_tag(source.dtype), source.size),
            *(_address(source), _address(target), source.itemsize, reduction),
        )
        return self._plan(ALLREDUCE, args, source.nbytes, target, (source,))

    def broadcast_init(self, buf: Array, root: int = 0) -> Callable[[], Array]:
        """See :meth:`Communicator.broadcast_init`."""
        self._check_usable()
        array = check_broadcast(self.size, self.rank, buf, root)
        args = (
            *(layout.BROADCAST | int(root) << 16, dtype_tag(array.dtype), array.size),
            *(int(root), _address(array), array.nbytes),
        )
        return self._plan(BROADCAST, args, array.nbytes, array, ())

    def barrier_init(self) -> Callable[[], None]:
        """See :meth:`Communicator.barrier_init`."""
        self._check_usable()
        return self._plan(BARRIER, (layout.BARRIER, 0, 0), 0, None, ())

    def _plan(
        self, kernel: Kernel, args: tuple[int, ...], nbytes: int, result: Any, kept: tuple[Any, ...]
    ) -> Callable[[], Any]:
        def run(resume: int, _kept: tuple[Any, ...]) -> Any:
            self._check_usable()
            self._run(kernel, resume, *args)
            return result

        start, finish = partial(run, 0, kept), partial(run, 1, kept)
        words = self._address, kernel, args, nbytes
        return make_plan(type(self), *words, result, start, finish)

    def create_shared_region(
        self, shape: int | tuple[int, ...], dtype: DTypeLike = np.float64
    ) -> ShmRegion:
        """See :meth:`Communicator.create_shared_region`."""
        self._check_usable()
        extents, element = check_region(shape, dtype)
        hashed = zlib.crc32(repr(extents).encode()) >> 1
        items = int(np.prod(extents, dtype=object))
        self._run(BARRIER, 0, layout.REGION | hashed << 32, dtype_tag(element), items)
        return ShmRegion(self, self._memory, extents, element)

    def empty(self, shape: int | tuple[int, ...], dtype: DTypeLike = np.float64) -> Array:
        """See :meth:`Communicator.empty`: this rank's array in the shared heap."""
        self._check_usable()
        extents, element = check_shape("empty", shape, dtype)
        self._run(BARRIER, 0, layout.ARRAY, 0, 0)
        if self._heap is None:
            self._heap = self._new_heap(self.size)
            self._context[context.HEAP] = self._heap.base
            self._context[context.HEAP_STRIDE] = self._heap.stride
        return self._heap.array(extents, element)

    def _new_heap(self, areas: int) -> SharedHeap:
        return SharedHeap(self, areas, self._memory)

    def use_switch_points(self, points: Mapping[str, int]) -> None:
        """Use other switch points from now on, for measuring them. Collective.

        Args:
            points: By the names of ``cobre_shm.tuning``; equal on all ranks.
        """
        self.barrier()
        for name, value in points.items():
            self._context[context.TUNING + NAMES.index(name)] = value
        self.barrier()

    def split_local(self) -> ShmCommunicator:
        """See :meth:`Communicator.split_local`: all ranks, in a group of its own."""
        self._check_usable()
        self._run(BARRIER, 0, layout.SPLIT, 0, 0)
        if self._segment.is_unnamed:
            # There was no room for this group's segment; another one is handed over likewise.
            with new_unnamed_segment(self, self.slot_bytes) as handed:
                return self._join_again(handed)
        try:
            with new_named_segment(self, self.slot_bytes) as (name, made):
                return self._join_again(name, made)
        except NotAName:
            self._fail(poison(self._segment, layout.DAMAGED, self.rank))

    def _join_again(self, name: str, made: Segment | None = None) -> ShmCommunicator:
        """Join a group of all ranks that is configured as this one is."""
        config = ShmConfig(
            name=name,
            rank=self.rank,
            size=self.size,
            timeout_secs=self._timeout,
            slot_bytes=self.slot_bytes,
            stall_warn_secs=self._stall_warn,
            tuning=self._tuning,
            hugepages=self._memory.pages.hugepages,
            numa_interleave=self._memory.pages.interleave,
        )
        return ShmCommunicator(config, made=made)

    def abort(self, code: int = 1) -> NoReturn:
        """See :meth:`Communicator.abort`."""
        if not isinstance(self._unusable, InvalidCommunicator):
            self._bar()
            first = poison(self._segment, layout.ABORTED, self.rank, int(code))
            self._unusable = failure(self._segment, first, self._timeout)
        raise SystemExit(code)

    def close(self) -> None:
        """See :meth:`Communicator.close`. A collective that runs in another thread goes on."""
        if isinstance(self._unusable, InvalidCommunicator) or self._context is _unjoined:
            return
        if CLAIM.call(self._address, 0) != context.READY and self._unusable is None:
            raise InvalidCommunicator("Another thread is inside a collective: close() must wait")
        self._unusable = InvalidCommunicator(
            "The communicator is closed", context={"backend": "shm", "rank": self.rank}
        )
        _living.discard(self)
        self._results.clear()
        for heap in (self._heap, self._common):
            if heap is not None:
                heap.close()
        self._memory.remove_names()
        leave(self._segment, self.rank, stay_mapped=self._is_occupied)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close; leaving by an exception tells the peers of it first."""
        if error is not None and not isinstance(error, SystemExit):
            self._tell_peers(error)
        self.close()

    def _tell_peers(self, error: BaseException) -> None:
        """Fail the group for an exception of this rank's program, unless it has failed already."""
        if self._unusable is None:
            text = "".join(traceback.format_exception(error))
            write_last_words(self._segment, self.rank, text)
            self._bar()
            first = poison(self._segment, layout.RAISED, self.rank)
            self._unusable = failure(self._segment, first, self._timeout)

    def _bar(self) -> None:
        """Let nobody begin a collective any more, and see whether a thread is inside one.

        That thread learns of the failure when it next looks, perhaps after this communicator has
        been closed. So it keeps the memory.
        """
        if CLAIM.call(self._address, 0) != context.READY and self._unusable is None:
            self._is_occupied = True

    def _check_usable(self) -> None:
        if self._unusable is not None:
            # A fresh traceback each time: the exception object is kept for its values.
            raise self._unusable.with_traceback(None)

    def _run(self, kernel: Kernel, resume: int, *args: int) -> None:
        """Call a kernel; ``resume``: it has begun already and handed control back."""
        if ENABLED:
            reach("idle", self.rank, int(self._context[context.SEQUENCE]) + 1)
        status = kernel.call(self._address, resume, *args)
        if status != context.READY:
            self._settle(kernel, status, args)
        if ENABLED:
            reach("done", self.rank, int(self._context[context.SEQUENCE]))

    def _settle(self, kernel: Kernel, status: int, args: tuple[int, ...]) -> None:
        """Go on with a collective that came back with another status than READY."""
        if status == context.TAKEN:
            self._check_usable()
            raise InvalidCommunicator(
                "Another thread is inside a collective of this communicator",
                context={"backend": "shm", "rank": self.rank},
            )
        self._complete(status, lambda: kernel.call(self._address, 1, *args))

    def _complete(self, status: int, resume: Callable[[], int]) -> None:
        """Go on with a kernel that handed control back, until it is done or the group is lost."""
        state = self._context
        watch = Patience(self._segment, self.rank, self._timeout, self._stall_warn)
        try:
            while status in (context.PENDING, context.LONGER):
                epoch, steps = int(state[context.EPOCH]), int(state[context.AWAITED_STEPS])
                first = watch.look(epoch, steps)
                if first is not None:
                    self._fail_unless_arrived(first)
                status = resume()
        except CollectiveFailed:
            raise
        except BaseException:
            # A signal handler raised inside a collective: this rank is out of step for good.
            self._unusable = failure(
                self._segment, poison(self._segment, layout.INTERRUPTED, self.rank), self._timeout
            )
            raise
        if status == context.READY:
            return
        self._record_failure(status)
        if status == context.MISMATCH:
            self._unusable = mismatch(self._segment)
            raise self._unusable
        if status == context.DEAD:
            suspect = int(self._context[context.SUSPECT])
            self._fail(poison(self._segment, layout.DIED, suspect))
        first = read_poison(self._segment)
        self._fail(first or Poison(layout.DIED, self.rank, 0))

    def _fail_unless_arrived(self, first: Poison) -> None:
        """Fail for ``first``, unless everybody has reached this round: then it completes."""
        state = self._context
        if missing_ranks(
            self._segment, int(state[context.EPOCH]), int(state[context.AWAITED_STEPS])
        ):
            self._record_failure(context.POISONED)
            self._fail(first)

    def _record_failure(self, status: int) -> None:
        words = self._segment.words
        entry = int(self._context[context.ENTRY]) - words.address
        words.store(entry + layout.ENTRY_END, time.monotonic_ns())
        words.store(entry + layout.ENTRY_STATUS, status)

    def _fail(self, first: Poison) -> NoReturn:
        self._unusable = failure(self._segment, first, self._timeout)
        raise self._unusable


def _address(array: Array) -> int:
    return int(array.__array_interface__["data"][0])


def _tuning_words(segment: Segment, chosen: dict[str, int]) -> list[int]:
    """What rank 0 publishes: the chosen switch points, and the defaults of this machine."""
    words = segment.words
    allowed: set[int] = set()
    for rank in range(segment.size):
        # Each rank may be bound to processors of its own.
        with contextlib.suppress(OSError):
            allowed |= os.sched_getaffinity(words.load(segment.control(rank) + layout.PID))
    quota = cgroup_quota(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")) or segment.size
    values = default_tuning(segment.size, min(len(allowed), int(quota))) | chosen
    return [values[name] for name in NAMES]


def _new_context(segment: Segment, rank: int, scratch: Array) -> Array:
    address, size = segment.words.address, segment.size
    state = np.zeros(context.WORDS, dtype=np.int64)
    state[context.SELF] = state.ctypes.data
    state[context.SCRATCH] = -(-scratch.ctypes.data // layout.LINE_BYTES) * layout.LINE_BYTES
    for index in range(layout.TUNING_WORDS):
        state[context.TUNING + index] = segment.words.load(layout.HEADER_TUNING + 8 * index)
    state[context.RANK] = rank
    state[context.SIZE] = size
    state[context.CONTROL] = address + layout.CONTROL
    state[context.SLOTS] = address + layout.slots_offset(size)
    state[context.SLOT_BYTES] = segment.slot_bytes
    state[context.POISON] = address + layout.HEADER_POISON
    state[context.RECORDER] = address + layout.recorder_offset(size) + rank * layout.RECORDER_BYTES
    state[context.SPIN_LIMIT_MAX] = _SPIN_LIMIT_MAX
    directive = armed()
    state[context.FAIL_PHASE] = -1
    if directive is not None and directive.rank == rank:
        state[context.FAIL_PHASE] = directive.phase
        state[context.FAIL_SEQUENCE] = directive.sequence
        state[context.FAIL_SIGNAL] = directive.signal
    state[context.SPIN_LIMIT] = state[context.TUNING + SPIN_PAUSES]
    return state


def _disown_in_child() -> None:
    """A forked child is not the rank: it may neither take part nor give anything back."""
    for comm in list(_living):
        comm._context[context.BUSY] = 1
        comm._unusable = InvalidCommunicator(
            "The communicator belongs to the parent process and cannot be used after fork",
            context={"code": "ForkedCommunicator", "backend": "shm", "rank": comm.rank},
        )
    _living.clear()


def _tell_peers_at_exit() -> None:
    """Tell the peers of an exception that nobody caught: Python keeps the one that it printed."""
    for comm in list(_living):
        reach("exit", comm.rank)
    error = getattr(sys, "last_value", None)
    if isinstance(error, BaseException) and not isinstance(error, SystemExit):
        for comm in list(_living):
            comm._tell_peers(error)


os.register_at_fork(after_in_child=_disown_in_child)
atexit.register(_tell_peers_at_exit)

# Of a communicator whose construction did not come to its end: nothing may begin.
_unjoined = np.zeros(context.WORDS, dtype=np.int64)
_unjoined[context.SELF] = _unjoined.ctypes.data
_unjoined[context.BUSY] = 1

# Failpoints before and after a collective are in the Python methods.
_probe = ShmCommunicator.__new__(ShmCommunicator)
if not ENABLED and fastcall.objects_are_as_expected(_probe, _unjoined):
    fastcall.install(ShmCommunicator)
    fastcall.serve(ShmCommunicator, _unjoined, np.zeros(0, dtype=np.int64), np.zeros(3))
