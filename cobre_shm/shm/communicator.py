"""The shm communicator: collectives, and the memory that all ranks have mapped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import DTypeLike

from cobre_shm import fastcall, layout
from cobre_shm.arrays import address_of, check_shape
from cobre_shm.communicator import Array
from cobre_shm.datatypes import ReduceOp, dtype_tag
from cobre_shm.failpoints import ENABLED
from cobre_shm.kernels import context
from cobre_shm.native.entry import ALLREDUCE_COMMON, BARRIER
from cobre_shm.native.reduce import reduction_address
from cobre_shm.segment.common import MemorySource
from cobre_shm.segment.handover import NotAName, new_named_segment, new_unnamed_segment
from cobre_shm.segment.pages import PagePolicy
from cobre_shm.segment.poison import poison
from cobre_shm.segment.region import ShmRegion
from cobre_shm.segment.segment import Segment
from cobre_shm.segment.shared_heap import SharedHeap
from cobre_shm.selection.kinds import ShmConfig
from cobre_shm.shm.collectives import Collectives
from cobre_shm.shm.state import UNJOINED
from cobre_shm.tuning import COMMON_BYTES, NAMES
from cobre_shm.validate import check_reduction, check_region, region_words

__all__ = ["ShmCommunicator"]

# Results of allreduce_shared that are kept, of as many dtypes and lengths.
_RESULTS = 8
# The word with the payload from which on there is one result for all ranks.
_FROM_BYTES = context.TUNING + COMMON_BYTES


class ShmCommunicator(Collectives):
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

    def __init__(self, config: ShmConfig, *, made: Segment | None = None) -> None:
        self._heap: SharedHeap | None = None
        self._common: SharedHeap | None = None
        self._results: dict[tuple[int, int], Array] = {}
        super().__init__(config, made)
        self._memory = MemorySource(
            self,
            self._segment.region_prefix,
            may_be_unnamed=self._segment.may_be_unnamed,
            pages=PagePolicy(config.hugepages, config.numa_interleave),
        )

    def __repr__(self) -> str:
        return f"<ShmCommunicator rank {self.rank} of {self.size}>"

    def create_shared_region(
        self, shape: int | tuple[int, ...], dtype: DTypeLike = np.float64
    ) -> ShmRegion:
        """See :meth:`Communicator.create_shared_region`."""
        self._check_usable()
        extents, element = check_region(shape, dtype)
        tag, count, hashed = region_words(extents, element)
        with self._in_one_call():
            self._run(BARRIER, 0, layout.REGION | hashed << 32, tag, count)
            return ShmRegion(self, self._memory, extents, element, self._barrier_of)

    def empty(self, shape: int | tuple[int, ...], dtype: DTypeLike = np.float64) -> Array:
        """See :meth:`Communicator.empty`: this rank's array in the shared heap."""
        self._check_usable()
        extents, element = check_shape("empty", shape, dtype)
        with self._in_one_call():
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
        words = [(context.TUNING + NAMES.index(name), value) for name, value in points.items()]
        with self._in_one_call():
            self.barrier()
            for word, value in words:
                self._context[word] = value
            self._open_to_peers()
            self.barrier()

    def split_local(self) -> ShmCommunicator:
        """See :meth:`Communicator.split_local`: all ranks, in a group of its own."""
        self._check_usable()
        with self._in_one_call():
            return self._split()

    def _split(self) -> ShmCommunicator:
        self._run(BARRIER, 0, layout.SPLIT, 0, 0)
        if self._segment.is_unnamed:
            # There was no room for this group's segment; another one is handed over likewise.
            with new_unnamed_segment(self, self.slot_bytes) as handed:
                return self._join_again(handed)
        try:
            prefix = self._segment.region_prefix
            with new_named_segment(self, prefix, self.slot_bytes) as (name, made):
                return self._join_again(name, made)
        except NotAName:
            self._fail(poison(self._segment, layout.DAMAGED, self.rank))

    def _join_again(self, name: str, made: Segment | None = None) -> ShmCommunicator:
        """Join a group of all ranks that is configured as this one is."""
        config = replace(self._config, name=name, slot_bytes=self.slot_bytes)
        return ShmCommunicator(config, made=made)

    def allreduce_shared(self, send: Array, op: ReduceOp | str = ReduceOp.SUM) -> Array:
        """See :meth:`Communicator.allreduce_shared`."""
        from_bytes = self._context.item(_FROM_BYTES)
        if isinstance(send, np.ndarray) and 0 < send.nbytes < from_bytes:
            # As the method of the base does, without the calls that take as long as an allreduce.
            result = self.allreduce(send, None, op)
            result.setflags(write=False)
            return result
        self._check_usable()
        source, op = check_reduction("allreduce_shared", send, op)
        reduction = reduction_address(source.dtype, op)
        if source.nbytes < from_bytes or not reduction:
            return super().allreduce_shared(source, op)
        key = dtype_tag(source.dtype), source.size
        if key in self._results:
            result = self._keep(key, self._results[key])
            return self._reduce_into(result, source, op, reduction)
        with self._in_one_call():
            return self._reduce_into(self._new_result(source, key), source, op, reduction)

    def _reduce_into(self, result: Array, source: Array, op: ReduceOp, reduction: int) -> Array:
        if abs(address_of(source) - address_of(result)) < source.nbytes:
            # What the last call returned is the memory of this result too.
            source = source.copy()
        self._run(
            ALLREDUCE_COMMON,
            0,
            layout.ALLREDUCE_SHARED | op << 8,
            dtype_tag(source.dtype),
            source.size,
            address_of(source),
            address_of(result),
            source.itemsize,
            reduction,
        )
        return result.reshape(source.shape)

    def _new_result(self, source: Array, key: tuple[int, int]) -> Array:
        """A read-only vector in common memory for results like ``source``. Collective.

        All ranks call with the same dtypes and lengths in the same order, so they find and forget
        the same ones.
        """
        # In another word than the reduction that follows: a rank that has the result already is in
        # a mismatch.
        self._run(BARRIER, 0, layout.ALLREDUCE_SHARED | layout.NEW_RESULT << 32, *key)
        if self._common is None:
            self._common = self._new_heap(1)
        if len(self._results) == _RESULTS:
            del self._results[next(iter(self._results))]
        result = self._common.array((source.size,), source.dtype)
        result.flags.writeable = False
        return self._keep(key, result)

    def _keep(self, key: tuple[int, int], result: Array) -> Array:
        """Put a result behind the others: the first is the one that was used longest ago."""
        self._results.pop(key, None)
        self._results[key] = result
        return result

    def _give_back(self) -> None:
        self._results.clear()
        for heap in (self._heap, self._common):
            if heap is not None:
                heap.close()
        self._memory.remove_names()


# Failpoints before and after a collective are in the Python methods.
_probe = ShmCommunicator.__new__(ShmCommunicator)
if not ENABLED and fastcall.objects_are_as_expected(_probe, UNJOINED):
    fastcall.install(ShmCommunicator)
    fastcall.serve(ShmCommunicator, UNJOINED, np.zeros(0, dtype=np.int64), np.zeros(3))
