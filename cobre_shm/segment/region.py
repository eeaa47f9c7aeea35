"""Shared regions in POSIX shared memory: one copy for all ranks of a group."""

from __future__ import annotations

import mmap
import os
from typing import Any

import numpy as np

from cobre_shm.communicator import Array, Communicator, SharedRegion
from cobre_shm.datatypes import ReduceOp
from cobre_shm.errors import AllocationFailed
from cobre_shm.segment.posix import create_object, open_object, unlink_object
from cobre_shm.segment.segment import Segment

__all__ = ["ShmRegion"]

_OK, _REFUSED = 0, 1


class ShmRegion(SharedRegion):
    """A region that rank 0 allocates and all ranks map.

    Its name exists from the allocation until every rank has mapped it. The mapping goes with the
    last view of ``array``.
    """

    def __init__(self, comm: Communicator, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._comm = comm
        self._shape, self._dtype = shape, dtype
        self._nbytes = max(1, int(np.prod(shape, dtype=object)) * dtype.itemsize)
        name = np.zeros(64, dtype=np.uint8)
        error: Exception | None = None
        fd = -1
        if comm.rank == 0:
            text = Segment.random_name()
            try:
                fd = create_object(text, self._nbytes)
            except (AllocationFailed, OSError) as refused:
                error = refused
            else:
                name[: len(text)] = np.frombuffer(text.encode(), dtype=np.uint8)
        comm.broadcast(name, root=0)
        text = name.tobytes().rstrip(b"\0").decode()
        try:
            if comm.rank != 0 and text:
                fd, _ = open_object(text, self._nbytes)
            if text:
                self.array = self._view(fd, mmap.ACCESS_WRITE)
        except OSError as refused:
            error = refused
        status = np.array([_REFUSED if error is not None or not text else _OK])
        try:
            comm.allreduce(status, status, ReduceOp.MAX)
        finally:
            # All have mapped it, or somebody cannot or is gone: the name has done its work.
            if comm.rank == 0 and fd >= 0:
                unlink_object(text, fd)
        if status[0] != _OK:
            if fd >= 0:
                os.close(fd)
            if isinstance(error, AllocationFailed):
                raise error
            raise AllocationFailed(
                self._nbytes, str(error) if error else "refused on another rank"
            ) from error
        self._fd = fd

    def _view(self, fd: int, access: int) -> Array:
        memory = mmap.mmap(fd, self._nbytes, access=access)
        count = int(np.prod(self._shape, dtype=object))
        return np.frombuffer(memory, dtype=self._dtype, count=count).reshape(self._shape)

    def fence(self) -> None:
        """See :meth:`SharedRegion.fence`: a barrier publishes and observes everything."""
        self._comm.barrier()

    def freeze(self) -> None:
        """See :meth:`SharedRegion.freeze`."""
        self.fence()
        if not self._comm.is_leader and self._fd >= 0:
            self.array = self._view(self._fd, mmap.ACCESS_READ)
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
