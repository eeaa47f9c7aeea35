"""The shm backend: ties a segment and the kernels to the contract."""

from __future__ import annotations

import atexit
import os
import re
import sys
import threading
import time
import traceback
import weakref
import zlib
from collections.abc import Callable
from types import TracebackType
from typing import Any, NoReturn

import numpy as np
from numpy.typing import DTypeLike

from cobre_shm import layout
from cobre_shm.communicator import Array, Communicator, Counts
from cobre_shm.datatypes import ReduceOp, dtype_tag
from cobre_shm.errors import CollectiveFailed, InvalidCommunicator
from cobre_shm.failpoints import ENABLED, armed, reach
from cobre_shm.kernels import context, exchange
from cobre_shm.kernels.reduce import reduce_with_numpy, reduction_address
from cobre_shm.segment.failure import failure, mismatch, missing_ranks
from cobre_shm.segment.handover import new_segment
from cobre_shm.segment.join import join, leave
from cobre_shm.segment.last_words import write_last_words
from cobre_shm.segment.patience import Patience
from cobre_shm.segment.poison import Poison, poison, read_poison
from cobre_shm.segment.region import ShmRegion
from cobre_shm.segment.segment import Segment
from cobre_shm.selection.kinds import ShmConfig
from cobre_shm.validate import (
    check_allgatherv,
    check_allreduce,
    check_broadcast,
    check_gather_buffers,
    check_region,
)

__all__ = ["ShmCommunicator"]

# Upper bound of the adaptive spin, in pauses (about 50 us): shorter than any time slice.
_SPIN_LIMIT_MAX = 2000
# What Segment.random_name() gives.
_GROUP_NAME = re.compile(r"/cobre-[0-9a-f]{24}")

_living: weakref.WeakSet[ShmCommunicator] = weakref.WeakSet()


class ShmCommunicator(Communicator):
    """Ranks on one machine, over a shared memory segment.

    Construction is collective: it returns when all ranks have joined, and the segment's name is
    gone by then. See ``segment/join.py`` for joining, ``kernels/exchange.py`` for the
    collectives, ``kernels/waiting.py`` for waiting.

    A rank whose process ends without ``close()`` has failed, whatever its exit code, for the
    ranks that wait for it. Communicators made by another thread than the main one cannot be
    watched by the kernel; their death is found in the process table instead.

    Args:
        config: Name, rank, size, time limit, slot size.

    Raises:
        InitializationFailed: The group did not come together.
        AllocationFailed: The segment does not fit into shared memory.
    """

    backend = "shm"

    def __init__(self, config: ShmConfig) -> None:
        self.rank = config.rank
        self.size = config.size
        self.is_leader = config.rank == 0
        self._timeout = config.timeout_secs
        self._stall_warn = config.stall_warn_secs
        self._regions = 0
        self._unusable: CollectiveFailed | InvalidCommunicator | None = None
        self._lock = threading.Lock()
        self._segment = join(
            config.name, config.rank, config.size, config.slot_bytes, config.timeout_secs
        )
        self.slot_bytes = self._segment.slot_bytes
        self._context = _new_context(self._segment, config.rank)
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
        self._check_usable()
        send, recv = check_gather_buffers(self.size, send, recv, displs)
        if counts is None:
            counts = self._gather_counts(send)
        layout_ = check_allgatherv(self.rank, self.size, send, recv, counts, displs)
        self._gather(layout.ALLGATHERV, *layout_)
        return layout_.recv

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
    ) -> None:
        counts = np.ascontiguousarray(counts)
        hashed = zlib.crc32(counts.tobytes())
        hashed -= (hashed & 0x80000000) << 1  # the call word is signed
        self._run(
            exchange.allgatherv,
            operation | hashed << 32,
            dtype_tag(send.dtype) if tag is None else tag,
            int(counts.sum()),
            _address(send),
            _address(recv),
            counts,
            np.ascontiguousarray(displs),
            send.itemsize,
        )

    def allreduce(
        self, send: Array, recv: Array | None = None, op: ReduceOp | str = ReduceOp.SUM
    ) -> Array:
        """See :meth:`Communicator.allreduce`."""
        self._check_usable()
        send, recv, op = check_allreduce(send, recv, op)
        reduction = reduction_address(send.dtype, op)
        if not reduction:
            self._reduce_with_numpy(send, recv, op)
            return recv
        self._run(
            exchange.allreduce,
            layout.ALLREDUCE | op << 8,
            dtype_tag(send.dtype),
            send.size,
            _address(send),
            _address(recv),
            send.itemsize,
            reduction,
        )
        return recv

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
            self._run(
                exchange.allgatherv,
                *call,
                _address(source[start:]),
                _address(blocks),
                np.full(self.size, count),
                displs,
                send.itemsize,
            )
            accumulator = blocks[0, :count]
            for rank in range(1, self.size):
                reduce_with_numpy(op, accumulator, blocks[rank, :count])
            target[start : start + count] = accumulator

    def broadcast(self, buf: Array, root: int = 0) -> Array:
        """See :meth:`Communicator.broadcast`."""
        self._check_usable()
        array = check_broadcast(self.size, self.rank, buf, root)
        self._run(
            exchange.broadcast,
            layout.BROADCAST | int(root) << 16,
            dtype_tag(array.dtype),
            array.size,
            int(root),
            _address(array),
            array.nbytes,
        )
        return array

    def barrier(self) -> None:
        """See :meth:`Communicator.barrier`."""
        self._check_usable()
        self._run(exchange.barrier, layout.BARRIER, 0, 0)

    def create_shared_region(
        self, shape: int | tuple[int, ...], dtype: DTypeLike = np.float64
    ) -> ShmRegion:
        """See :meth:`Communicator.create_shared_region`."""
        self._check_usable()
        extents, element = check_region(shape, dtype)
        hashed = zlib.crc32(repr(extents).encode()) >> 1
        items = int(np.prod(extents, dtype=object))
        self._run(exchange.barrier, layout.REGION | hashed << 32, dtype_tag(element), items)
        self._regions += 1
        name = f"{self._segment.region_prefix}{self._regions}"
        return ShmRegion(self, name, extents, element, may_be_unnamed=self._segment.may_be_unnamed)

    def split_local(self) -> ShmCommunicator:
        """See :meth:`Communicator.split_local`: all ranks, in a group of its own."""
        self._check_usable()
        self._run(exchange.barrier, layout.SPLIT, 0, 0)
        if self._segment.is_unnamed:
            # There was no room for this group's segment; another one is handed over likewise.
            with new_segment(self, self.slot_bytes) as handed:
                return self._join_again(handed)
        name = np.zeros(64, dtype=np.uint8)
        if self.rank == 0:
            text = Segment.random_name().encode()
            name[: len(text)] = np.frombuffer(text, dtype=np.uint8)
        self.broadcast(name)
        told = name.tobytes().rstrip(b"\0").decode("ascii", "replace")
        if not _GROUP_NAME.fullmatch(told):
            self._fail(poison(self._segment, layout.DAMAGED, self.rank))
        return self._join_again(told)

    def _join_again(self, name: str) -> ShmCommunicator:
        """Join a group of all ranks that is configured as this one is."""
        return ShmCommunicator(
            ShmConfig(
                name=name,
                rank=self.rank,
                size=self.size,
                timeout_secs=self._timeout,
                slot_bytes=self.slot_bytes,
                stall_warn_secs=self._stall_warn,
            )
        )

    def abort(self, code: int = 1) -> NoReturn:
        """See :meth:`Communicator.abort`."""
        if not isinstance(self._unusable, InvalidCommunicator):
            first = poison(self._segment, layout.ABORTED, self.rank, int(code))
            self._unusable = failure(self._segment, first, self._timeout)
        raise SystemExit(code)

    def close(self) -> None:
        """See :meth:`Communicator.close`. A collective that runs in another thread goes on."""
        if isinstance(self._unusable, InvalidCommunicator) or not hasattr(self, "_context"):
            return
        if not self._lock.acquire(blocking=False):
            raise InvalidCommunicator("Another thread is inside a collective: close() must wait")
        self._unusable = InvalidCommunicator(
            "The communicator is closed", context={"backend": "shm", "rank": self.rank}
        )
        self._lock.release()
        _living.discard(self)
        leave(self._segment, self.rank)

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
            first = poison(self._segment, layout.RAISED, self.rank)
            self._unusable = failure(self._segment, first, self._timeout)

    def _check_usable(self) -> None:
        if self._unusable is not None:
            # A fresh traceback each time: the exception object is kept for its values.
            raise self._unusable.with_traceback(None)

    def _run(self, kernel: Callable[..., int], *args: Any) -> None:
        if not self._lock.acquire(blocking=False):
            raise InvalidCommunicator(
                "Another thread is inside a collective of this communicator",
                context={"backend": "shm", "rank": self.rank},
            )
        try:
            if ENABLED:
                reach("idle", self.rank, int(self._context[context.SEQUENCE]) + 1)
            status = kernel(self._context, *args)
            if status != context.READY:
                self._complete(status, kernel, args)
            if ENABLED:
                reach("done", self.rank, int(self._context[context.SEQUENCE]))
        finally:
            self._lock.release()

    def _complete(self, status: int, kernel: Callable[..., int], args: tuple[Any, ...]) -> None:
        """Go on with a kernel that handed control back, until it is done or the group is lost."""
        watch = Patience(self._segment, self.rank, self._timeout, self._stall_warn)
        try:
            while status == context.PENDING:
                first = watch.look(int(self._context[context.EPOCH]))
                if first is not None:
                    self._fail_unless_arrived(first)
                status = kernel(self._context, *args)
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
            self._unusable = mismatch(self._segment, int(self._context[context.EPOCH]))
            raise self._unusable
        if status == context.DEAD:
            suspect = int(self._context[context.SUSPECT])
            self._fail(poison(self._segment, layout.DIED, suspect))
        first = read_poison(self._segment)
        self._fail(first or Poison(layout.DIED, self.rank, 0))

    def _fail_unless_arrived(self, first: Poison) -> None:
        """Fail for ``first``, unless everybody has reached this round: then it completes."""
        if missing_ranks(self._segment, int(self._context[context.EPOCH])):
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


def _new_context(segment: Segment, rank: int) -> Array:
    address, size = segment.words.address, segment.size
    state = np.zeros(context.WORDS, dtype=np.int64)
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
    # A hint to begin with; waiting adapts it.
    state[context.SPIN_LIMIT] = _SPIN_LIMIT_MAX if size <= len(os.sched_getaffinity(0)) else 0
    return state


def _disown_in_child() -> None:
    """A forked child is not the rank: it may neither take part nor give anything back."""
    for comm in list(_living):
        comm._unusable = InvalidCommunicator(
            "The communicator belongs to the parent process and cannot be used after fork",
            context={"code": "ForkedCommunicator", "backend": "shm", "rank": comm.rank},
        )
    _living.clear()


def _tell_peers_at_exit() -> None:
    """Tell the peers of an exception that nobody caught: Python keeps the one that it printed."""
    error = getattr(sys, "last_value", None)
    if isinstance(error, BaseException) and not isinstance(error, SystemExit):
        for comm in list(_living):
            comm._tell_peers(error)


os.register_at_fork(after_in_child=_disown_in_child)
atexit.register(_tell_peers_at_exit)
