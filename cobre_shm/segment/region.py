"""Shared regions: one copy for all ranks of a group.

Rank 0 allocates and all ranks map. The memory is a POSIX object whose name all ranks can derive
or, where that does not fit and the group may, memory without a name that they open through rank
0's descriptor (see ``unnamed.py``). Two allreduces of four words, in each of which everybody says
whether it has failed:

1. after rank 0 has allocated; it says there where its memory is, all zeros for by its name;
2. after all have opened and mapped. Until then rank 0 keeps its descriptor, and the name.

So all ranks raise or none does.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import astuple
from typing import Any

import numpy as np

from cobre_shm.communicator import Array, Communicator, SharedRegion
from cobre_shm.datatypes import ReduceOp
from cobre_shm.errors import AllocationFailed
from cobre_shm.failpoints import reach
from cobre_shm.segment.posix import create_object, open_object, remove_object
from cobre_shm.segment.unnamed import Whereabouts, create_unnamed, open_unnamed

__all__ = ["ShmRegion"]


# No process has pid 0.
_BY_NAME = Whereabouts(0, 0, 0)


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
        may_be_unnamed: Whether memory without a name serves where no POSIX object fits.
    """

    def __init__(
        self,
        comm: Communicator,
        name: str,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        *,
        may_be_unnamed: bool = False,
    ) -> None:
        self._comm = comm
        self._may_be_unnamed = may_be_unnamed
        self._shape, self._dtype = shape, dtype
        self._nbytes = max(1, int(np.prod(shape, dtype=object)) * dtype.itemsize)
        self._fd = -1
        self._name = ""
        try:
            error = self._map(name)
        except BaseException:
            # The group failed: who is left cleans up after whoever is not.
            self._remove(name)
            self.close()
            raise
        if error is not None:
            self.close()
            raise error

    def _map(self, name: str) -> AllocationFailed | None:
        """Allocate and map on all ranks; the error, on all ranks, if any of them cannot."""
        comm = self._comm
        error, where = self._create(name) if comm.rank == 0 else (None, _BY_NAME)
        reach("region_create", comm.rank)
        failed, where = self._tell(error, where)
        if failed:
            return error or self._refused()
        if comm.rank != 0:
            error = self._try(lambda: self._open(name, where))
        if error is None:
            error = self._show(mmap.ACCESS_WRITE)
        reach("region_mapped", comm.rank)
        failed, _ = self._tell(error, _BY_NAME)
        # Every rank: rank 0 may be killed before it comes to this line.
        self._remove(name)
        return error or self._refused() if failed else None

    def _create(self, name: str) -> tuple[AllocationFailed | None, Whereabouts]:
        error = self._try(lambda: create_object(name, self._nbytes))
        if error is None or not self._may_be_unnamed:
            return error, _BY_NAME
        refused = self._try(lambda: create_unnamed(name, self._nbytes))
        if refused is None:
            try:
                return None, Whereabouts.of(self._fd)
            except OSError as cause:
                return self._failed(cause), _BY_NAME
        if "free_bytes" not in refused.context:
            # The system knows no memfd: what helps is room for a name.
            refused.context |= error.context
            refused.suggestion = error.suggestion
        return refused, _BY_NAME

    def _open(self, name: str, where: Whereabouts) -> int:
        if where == _BY_NAME:
            return open_object(name, self._nbytes)[0]
        return open_unnamed(where, self._nbytes)

    def _try(self, make: Callable[[], int]) -> AllocationFailed | None:
        try:
            self._fd = make()
        except AllocationFailed as error:
            return error
        except OSError as error:
            return self._failed(error)
        return None

    def _show(self, access: int) -> AllocationFailed | None:
        try:
            self.array = self._view(access)
        except (OSError, ValueError) as error:
            return self._failed(error)
        return None

    def _failed(self, cause: Exception) -> AllocationFailed:
        error = AllocationFailed(self._nbytes, str(cause))
        error.__cause__ = cause
        return error

    def _remove(self, name: str) -> None:
        """Remove the name; if the system refuses, again when the region is closed."""
        self._name = name
        with suppress(OSError):
            remove_object(name)
            self._name = ""

    def _tell(self, error: AllocationFailed | None, where: Whereabouts) -> tuple[bool, Whereabouts]:
        """Return whether anybody failed, and what the one who knows says of the memory."""
        words = np.array([error is not None, *astuple(where)], dtype=np.int64)
        failed, *told = self._comm.allreduce(words, op=ReduceOp.MAX).tolist()
        return bool(failed), Whereabouts(*told)

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
        error = None
        if not self._comm.is_leader and self._fd >= 0:
            error = self._show(mmap.ACCESS_READ)
        self.fence()
        if error is not None:
            raise error

    def close(self) -> None:
        """See :meth:`SharedRegion.close`."""
        if self._fd >= 0:
            reach("region_close", self._comm.rank)
            os.close(self._fd)
            self._fd = -1
            self.array = np.empty(0, dtype=self._dtype)
        if self._name:
            self._remove(self._name)

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            os.close(self._fd)
            self._fd = -1
