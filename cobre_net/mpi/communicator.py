"""The mpi backend: ties MPI, and shared memory within the nodes, to the contract."""

from __future__ import annotations

import zlib
from typing import Any, NoReturn

import numpy as np
from numpy.typing import DTypeLike

from cobre_net.mpi import fast
from cobre_net.mpi.membership import Membership
from cobre_net.mpi.region import MpiRegion
from cobre_shm import layout
from cobre_shm.call_text import words_text
from cobre_shm.communicator import Array, Communicator, Counts, SharedRegion
from cobre_shm.datatypes import ReduceOp, dtype_tag
from cobre_shm.errors import AllocationFailed, CollectiveMismatch, InitializationFailed
from cobre_shm.heap import HeapRegion
from cobre_shm.selection.kinds import MpiConfig
from cobre_shm.validate import (
    check_allgatherv,
    check_allreduce,
    check_broadcast,
    check_gather_buffers,
    check_gathered,
    check_region,
    region_words,
)

__all__ = ["MpiCommunicator"]

# What a group of one node does by itself from its construction on.
_DELEGATED = (
    "allgatherv",
    "allgatherv_init",
    "allreduce",
    "allreduce_init",
    "allreduce_shared",
    "barrier",
    "barrier_init",
    "broadcast",
    "broadcast_init",
    "create_shared_region",
    "empty",
    "split_local",
)


class MpiCommunicator(Membership):
    """Ranks that an MPI launcher started.

    Construction is collective over ``config.comm``. Where the ranks of a node can share memory
    (see :class:`MpiConfig`) they form a group of the shm backend: alone on one machine they are
    that group, and on several their leaders talk MPI.

    MPI offers no place in which to compare calls for free, so ranks that disagree are noticed
    only with ``MpiConfig(check=True)``, or where all ranks share a node. Nor does it report a
    death: the launcher ends the job then, and an exception that nobody catches ends it as well
    (see ``ending.py``). There is no time limit.

    Args:
        config: Communicator, determinism, levels.

    Raises:
        InitializationFailed: MPI is not there, not in a usable state, or not the launcher's; or
            two levels were demanded and are not possible.

    Attributes:
        levels: How the ranks talk: ``"flat: <reason>"``, ``"one node"`` or ``"N nodes"``.
    """

    def __init__(self, config: MpiConfig) -> None:
        self._fast: fast.Fast | None = None
        self._context = _closed
        super().__init__(config)
        # Only while the communicator is usable, flat, and compares nothing.
        if self._engine is self._flat and not config.check:
            self._fast = fast.make_road(MpiCommunicator, self._flat)
            if self._fast is not None:
                self._context = self._words = self._fast.state
        if self._group is not None:
            for name in _DELEGATED:
                setattr(self, name, getattr(self._group, name))

    def __repr__(self) -> str:
        return f"<MpiCommunicator rank {self.rank} of {self.size}>"

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
        known = None
        if counts is not None:
            known = check_allgatherv(self.rank, self.size, send, recv, counts, displs)

        def gather() -> tuple[Array, list[Exception]]:
            mistakes: list[Exception] = []
            checked = known
            if checked is None:
                found = self._gather_counts(send)
                checked, mistakes = check_gathered(self.rank, self.size, send, recv, found, displs)
            if self._config.check:
                hashed = zlib.crc32(checked.counts.tobytes())
                total = int(checked.counts.sum())
                self._compare(layout.ALLGATHERV, dtype_tag(send.dtype), total, high=hashed)
            self._engine.allgatherv(*checked)
            self._learn(checked.send.dtype)
            return checked.recv, mistakes

        result, mistakes = self._inside(gather)
        if mistakes:
            raise mistakes.pop()
        return result

    def _gather_counts(self, send: Array) -> Array:
        counts = np.empty(self.size, np.int64)
        if self._config.check:
            self._compare(layout.COUNTS, dtype_tag(send.dtype), self.size)
        self._engine.gather_equal(np.array([send.size], np.int64), counts)
        return counts

    def allreduce(
        self, send: Array, recv: Array | None = None, op: ReduceOp | str = ReduceOp.SUM
    ) -> Array:
        """See :meth:`Communicator.allreduce`."""
        self._check_usable()
        source, target, checked = check_allreduce(send, recv, op)

        def reduce() -> Array:
            if self._config.check:
                self._compare(layout.ALLREDUCE | checked << 8, dtype_tag(source.dtype), source.size)
            self._engine.allreduce(source, target, checked)
            self._learn(source.dtype, checked)
            return target

        return self._inside(reduce)

    def broadcast(self, buf: Array, root: int = 0) -> Array:
        """See :meth:`Communicator.broadcast`."""
        self._check_usable()
        array = check_broadcast(self.size, self.rank, buf, root)

        def spread() -> Array:
            if self._config.check:
                what = layout.BROADCAST | int(root) << 16
                self._compare(what, dtype_tag(array.dtype), array.size)
            self._engine.broadcast(array, int(root))
            self._learn(array.dtype)
            return array

        return self._inside(spread)

    def barrier(self) -> None:
        """See :meth:`Communicator.barrier`."""
        self._meet(layout.BARRIER)

    def _meet(self, what: int) -> None:
        """Wait for all ranks in the call with this code of ``layout``."""
        self._check_usable()

        def meet() -> None:
            if self._config.check:
                self._compare(what, 0, 0)
            self._engine.barrier()

        self._inside(meet)

    def create_shared_region(
        self, shape: int | tuple[int, ...], dtype: DTypeLike = np.float64
    ) -> SharedRegion:
        """See :meth:`Communicator.create_shared_region`."""
        self._check_usable()
        extents, element = check_region(shape, dtype)

        def make() -> SharedRegion:
            if self._config.check:
                tag, count, hashed = region_words(extents, element)
                self._compare(layout.REGION, tag, count, high=hashed)
            if self._windows is None:
                return HeapRegion(extents, element)
            node = self._grouping.node
            return MpiRegion(self._comm, node, self._windows, extents, element, self._meet)

        return self._inside(make, AllocationFailed)

    def split_local(self) -> Communicator:
        """See :meth:`Communicator.split_local`."""
        self._check_usable()

        def split() -> Communicator:
            if self._config.check:
                self._compare(layout.SPLIT, 0, 0)
            return self._grouping.split()

        return self._inside(split, AllocationFailed, InitializationFailed)

    def _learn(self, dtype: np.dtype[Any], op: ReduceOp | None = None) -> None:
        """Such a call takes the fast road from now on."""
        if self._fast is not None:
            self._fast.learn(dtype, op)

    def _finish(self, *_: object, **__: object) -> NoReturn:
        """Go on where a function of MPI has failed on the fast road."""
        assert self._fast is not None
        self._fail(self._fast.failure())

    _finish_barrier = _finish_broadcast = _finish_allreduce = _finish_allgatherv = _finish

    def _compare(self, what: int, tag: int, count: int, *, high: int = 0) -> None:
        """Compare this call with those of all ranks."""
        high -= (high & 0x80000000) << 1  # the call word is signed
        calls = np.empty((self.size, 3), np.int64)
        self._flat.gather_equal(np.array([what | high << 32, tag, count], np.int64), calls)
        if (calls != calls[0]).any():
            reason = CollectiveMismatch([words_text(*call) for call in calls.tolist()])
            self._lose(reason)
            raise reason


_closed = fast.install(MpiCommunicator)
