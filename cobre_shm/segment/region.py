"""Shared regions in POSIX shared memory: one copy for all ranks of a group."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from cobre_shm.communicator import Array, Communicator, SharedRegion
from cobre_shm.datatypes import ReduceOp
from cobre_shm.errors import AllocationFailed
from cobre_shm.failpoints import reach
from cobre_shm.segment.posix import create_object, open_object, remove_object

__all__ = ["ShmRegion"]


class ShmRegion(SharedRegion):
    """A region that rank 0 allocates and all ranks map.

    Its name is derived from the group's, so all ranks know it, and exists from the allocation
    until every rank has mapped it. If the allocation fails in any way, every rank that survives
    removes it; the launcher removes what is left when nobody survives. The mapping goes with the
    last view of ``array``.

    Args:
        comm: The group.
        name: POSIX name that nobody else uses.
        shape: Of the array.
        dtype: Of its elements.
    """

    def __init__(
        self, comm: Communicator, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]
    ) -> None:
        self._comm = comm
        self._shape, self._dtype = shape, dtype
        self._nbytes = max(1, int(np.prod(shape, dtype=object)) * dtype.itemsize)
        self._fd = -1
        try:
            error = self._map(name)
        except BaseException:
            # The group failed: who is left cleans up after whoever is not.
            remove_object(name)
            self.close()
            raise
        if error is not None:
            self.close()
            raise error

    def _map(self, name: str) -> AllocationFailed | None:
        """Allocate and map on all ranks; the error, on all ranks, if any of them cannot."""
        comm = self._comm
        error = self._try(lambda: create_object(name, self._nbytes)) if comm.rank == 0 else None
        reach("region_create", comm.rank)
        if self._anybody(error):
            return error or self._refused()
        if comm.rank != 0:
            error = self._try(lambda: open_object(name, self._nbytes)[0])
        if error is None:
            self.array = self._view(mmap.ACCESS_WRITE)
        reach("region_mapped", comm.rank)
        failed = self._anybody(error)
        if comm.rank == 0:
            remove_object(name)
        return error or self._refused() if failed else None

    def _try(self, make: Callable[[], int]) -> AllocationFailed | None:
        try:
            self._fd = make()
        except AllocationFailed as error:
            return error
        except OSError as error:
            refused = AllocationFailed(self._nbytes, str(error))
            refused.__cause__ = error
            return refused
        return None

    def _anybody(self, error: AllocationFailed | None) -> bool:
        failures = np.array([error is not None], dtype=np.int64)
        return bool(self._comm.allreduce(failures, op=ReduceOp.MAX)[0])

    def _refused(self) -> AllocationFailed:
        return AllocationFailed(self._nbytes, "refused on another rank")

    def _view(self, access: int) -> Array:
        memory = mmap.mmap(self._fd, self._nbytes, access=access)
        count = int(np.prod(self._shape, dtype=object))
        return np.frombuffer(memory, dtype=self._dtype, count=count).reshape(self._shape)

    def fence(self) -> None:
        """See :meth:`SharedRegion.fence`: a barrier publishes and observes everything."""
        self._comm.barrier()

    def freeze(self) -> None:
        """See :meth:`SharedRegion.freeze`."""
        self.fence()
        if not self._comm.is_leader and self._fd >= 0:
            self.array = self._view(mmap.ACCESS_READ)
        self.fence()

    def close(self) -> None:
        """See :meth:`SharedRegion.close`."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self.array = np.empty(0, dtype=self._dtype)

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            os.close(self._fd)
            self._fd = -1
