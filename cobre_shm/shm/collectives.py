"""The collectives of the shm backend in Python, and the plans of them.

They take what the fast road (``fastcall.py``) does not: keywords, other buffers than exact arrays,
mistakes, and, by the ``_finish_...`` methods, what has begun there and come back unfinished.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import numpy as np

from cobre_shm import layout
from cobre_shm.arrays import address_of
from cobre_shm.communicator import Array, Counts
from cobre_shm.datatypes import ReduceOp, dtype_tag
from cobre_shm.errors import CobreError, InvalidCommunicator
from cobre_shm.kernels import context
from cobre_shm.native.entry import ALLGATHERV, ALLREDUCE, BARRIER, BROADCAST, Kernel
from cobre_shm.native.reduce import reduce_with_numpy, reduction_address
from cobre_shm.shm.membership import Membership
from cobre_shm.shm.plan import make_plan
from cobre_shm.validate import (
    check_allgatherv,
    check_allreduce,
    check_broadcast,
    check_gather_buffers,
    check_gathered,
)

__all__ = ["Collectives"]


def _as_vectors(*arguments: Counts | None) -> list[Counts | None] | None:
    """Return arguments with lists of integers as vectors; None if there is no list, or another."""
    lists = [values for values in arguments if isinstance(values, list)]
    if not lists or any(type(number) is not int for values in lists for number in values):
        return None
    try:
        return [
            np.array(values, dtype=np.int64) if isinstance(values, list) else values
            for values in arguments
        ]
    except OverflowError:
        return None


class Collectives(Membership):
    """A communicator with the operations on buffers of each rank's own."""

    def allgatherv(
        self,
        send: Array,
        recv: Array | None = None,
        counts: Counts | None = None,
        displs: Counts | None = None,
    ) -> Array:
        """See :meth:`Communicator.allgatherv`."""
        vectors = _as_vectors(counts, displs)
        if vectors is not None and recv is not None:
            # Once more: the fast road knows vectors, and no lists.
            return self.allgatherv(send, recv, *vectors)
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
            return self._gather_after_counts(send, recv, displs)
        checked = check_allgatherv(self.rank, self.size, send, recv, counts, displs)
        self._gather(layout.ALLGATHERV, *checked, resume=resume)
        self._known.add(checked.send.dtype, None, 0, dtype_tag(checked.send.dtype), 0)
        return checked.recv

    def _finish_allgatherv(
        self, send: Array, recv: Array, counts: Counts, displs: Counts | None = None
    ) -> Array:
        return self._allgatherv(send, recv, counts, displs, 1)

    def _gather_after_counts(self, send: Array, recv: Array | None, displs: Counts | None) -> Array:
        with self._in_one_call():
            counts = self._gather_counts(send)
            begun = self._begun()
            try:
                if recv is None and displs is None:
                    recv = np.empty(int(counts.sum()), dtype=send.dtype)
                if recv is None:
                    return self._allgatherv(send, recv, counts, displs, 0)
                more = () if displs is None else (displs,)
                return self.allgatherv(send, recv, counts, *more)
            except (CobreError, MemoryError) as error:
                if self._unusable is not None or self._begun() != begun:
                    raise
                checked, mistakes = check_gathered(self.rank, self.size, send, recv, counts, displs)
                if not mistakes and isinstance(error, CobreError):
                    # It was not ours, but a signal handler's.
                    self._abandon()
                    raise
            self._gather(layout.ALLGATHERV, *checked)
        if mistakes:
            raise mistakes.pop()
        return checked.recv

    def _gather_counts(self, send: Array) -> Array:
        own = np.array([send.size], dtype=np.int64)
        counts = np.empty(self.size, dtype=np.int64)
        self._gather(layout.COUNTS, own, counts, *self._one_each, tag=dtype_tag(send.dtype))
        return counts

    @cached_property
    def _one_each(self) -> tuple[Array, Array]:
        """Counts and displacements of one element from each rank."""
        return np.ones(self.size, dtype=np.int64), np.arange(self.size)

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
            address_of(send),
            address_of(recv),
            address_of(counts),
            address_of(displs),
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
            address_of(send),
            address_of(recv),
            send.itemsize,
            reduction,
        )
        self._known.add(
            send.dtype, op, layout.ALLREDUCE | op << 8, dtype_tag(send.dtype), reduction
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
        blocks_in_all = -(-send.size // per_block)
        exchanged, before = 0, self._context.item(context.SEQUENCE)
        try:
            for start in range(0, send.size, per_block):
                count = min(per_block, send.size - start)
                counts = np.full(self.size, count)
                self._run(
                    ALLGATHERV,
                    0,
                    *call,
                    address_of(source[start:]),
                    address_of(blocks),
                    address_of(counts),
                    address_of(displs),
                    send.itemsize,
                )
                exchanged += 1
                accumulator = blocks[0, :count]
                for rank in range(1, self.size):
                    reduce_with_numpy(op, accumulator, blocks[rank, :count])
                target[start : start + count] = accumulator
        except BaseException as error:
            # Between two blocks no kernel is inside a collective, but this rank is. By the kernel's
            # own count, which has a block whose end was hidden by a signal's handler; unless
            # another thread was inside, and this rank never began.
            begun = self._context.item(context.SEQUENCE) - before
            is_refused = isinstance(error, InvalidCommunicator) and not exchanged
            if 0 < begun < blocks_in_all and not is_refused:
                self._abandon()
            raise

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
            address_of(array),
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
        buffers = check_gather_buffers(self.size, send, recv, displs)
        checked = check_allgatherv(self.rank, self.size, *buffers, counts, displs)
        lengths, starts = (np.array(array, dtype=np.int64) for array in checked[2:])
        source, target = checked.send, checked.recv
        tag, total = dtype_tag(source.dtype), int(lengths.sum())
        args = (
            *(layout.ALLGATHERV, tag, total, address_of(source), address_of(target)),
            *(address_of(lengths), address_of(starts), source.itemsize),
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
            *(address_of(source), address_of(target), source.itemsize, reduction),
        )
        return self._plan(ALLREDUCE, args, source.nbytes, target, (source,))

    def broadcast_init(self, buf: Array, root: int = 0) -> Callable[[], Array]:
        """See :meth:`Communicator.broadcast_init`."""
        self._check_usable()
        array = check_broadcast(self.size, self.rank, buf, root)
        args = (
            *(layout.BROADCAST | int(root) << 16, dtype_tag(array.dtype), array.size),
            *(int(root), address_of(array), array.nbytes),
        )
        return self._plan(BROADCAST, args, array.nbytes, array, ())

    def barrier_init(self) -> Callable[[], None]:
        """See :meth:`Communicator.barrier_init`."""
        self._check_usable()
        return self._barrier_of(layout.BARRIER)

    def _barrier_of(self, what: int) -> Callable[[], None]:
        """Return a plan of a barrier that only meets itself; ``what`` is its code in ``layout``."""
        return self._plan(BARRIER, (what, 0, 0), 0, None, ())

    def _plan(
        self, kernel: Kernel, args: tuple[int, ...], nbytes: int, result: Any, kept: tuple[Any, ...]
    ) -> Callable[[], Any]:
        def run(resume: int, _kept: tuple[Any, ...]) -> Any:
            self._check_usable()
            self._run(kernel, resume, *args)
            return result

        start, finish = partial(run, 0, kept), partial(run, 1, kept)
        if kernel is not BARRIER:
            self._map_rings()
        words = self._address, kernel, args, nbytes
        return make_plan(type(self), *words, result, start, finish)
