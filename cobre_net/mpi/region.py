"""Shared regions by MPI's shared windows: one copy for the ranks of a node.

``MPI_Win_free`` is a barrier, but ``close`` is not collective, regions are dropped by garbage
collection, and views of them outlive both. So a window is given back later: whenever all ranks of
a group are together anyway, because they make a region or a communicator, they tell each other
which windows each has done with, and free those that nobody holds, in the order in which they
were made. A window is held as long as an array that shows its memory exists. What is left at the
end goes with MPI_Finalize.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np

from cobre_net.mpi.library import MPI
from cobre_shm.arrays import bytes_of, bytes_of_shape
from cobre_shm.communicator import Array, Communicator, SharedRegion
from cobre_shm.errors import AllocationFailed
from cobre_shm.limits import available_bytes, shared_memory_bytes
from cobre_shm.segment.mapping import array_at

__all__ = ["MpiRegion", "free_windows"]


class _Memory:
    """The memory of a window: arrays keep it, and it keeps the window held."""

    def __init__(self, address: int) -> None:
        self._address = address

    def show(self, shape: tuple[int, ...], dtype: np.dtype[Any], *, writable: bool) -> Array:
        return array_at(self._address, shape, dtype, self, writable=writable)


@dataclass
class _Window:
    window: Any
    memory: weakref.ref[_Memory]


# By the group's ranks in MPI.COMM_WORLD: for all of its ranks the same windows, in the order of
# their making, whichever communicator of that group made them.
_windows: dict[tuple[int, ...], list[_Window]] = {}


def free_windows(comm: Any) -> list[_Window]:
    """Free the windows of ``comm``'s group that all its ranks have done with; return the others.

    Collective over ``comm``, an mpi4py communicator.
    """
    group, world = comm.Get_group(), MPI.COMM_WORLD.Get_group()
    ranks = tuple(group.Translate_ranks(None, world))
    windows = _windows.setdefault(ranks, [])
    if windows:
        is_held = np.array([window.memory() is not None for window in windows], np.uint8)
        comm.Allreduce(MPI.IN_PLACE, [is_held, MPI.UINT8_T], MPI.MAX)
        for window in (w for w, held in zip(windows, is_held, strict=True) if not held):
            window.window.Unlock_all()
            window.window.Free()
        windows[:] = [w for w, held in zip(windows, is_held, strict=True) if held]
    return windows


class MpiRegion(SharedRegion):
    """A region in a shared window of the ranks of a node.

    Args:
        comm: Our communicator, for the fences.
        whole: mpi4py communicator of all its ranks.
        node: mpi4py communicator of the ranks of this node.
        shape: Of the array.
        dtype: Of its elements.
    """

    def __init__(
        self,
        comm: Communicator,
        whole: Any,
        node: Any,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
    ) -> None:
        self._comm = comm
        self._shape, self._dtype = shape, dtype
        nbytes = max(1, bytes_of_shape(shape, dtype))
        windows = free_windows(whole)
        window, error = self._allocate(node, nbytes), None
        if isinstance(window, AllocationFailed):
            window, error = None, window
        failed = np.array([error is not None], np.int32)
        whole.Allreduce(MPI.IN_PLACE, failed, MPI.MAX)
        if failed[0]:
            if window is not None:
                window.Free()
            raise error or AllocationFailed(nbytes, "refused on another node")
        self._window = window
        window.Lock_all(MPI.MODE_NOCHECK)
        memory = _Memory(window.Shared_query(0)[0].address)
        windows.append(_Window(window, weakref.ref(memory)))
        self._memory: _Memory | None = memory
        self.array = memory.show(shape, dtype, writable=True)
        if node.Get_rank() == 0:
            bytes_of(self.array)[:] = 0
        self._order()
        node.Barrier()
        self._order()

    def _allocate(self, node: Any, nbytes: int) -> Any:
        """Return the window, or the AllocationFailed of all ranks of the node."""
        # What MPI cannot allocate ends some libraries, and others by SIGBUS at the first touch.
        free = np.array([_free_bytes()], np.int64)
        node.Bcast(free, 0)
        if nbytes > int(free[0]):
            return AllocationFailed(
                nbytes,
                f"{free[0]} bytes are free on this node, in memory and /dev/shm",
                context={"free_bytes": int(free[0])},
                suggestion="Use a smaller region, or enlarge /dev/shm (docker: --shm-size).",
            )
        try:
            mine = nbytes if node.Get_rank() == 0 else 0
            return MPI.Win.Allocate_shared(mine, 1, MPI.INFO_NULL, node)
        except MPI.Exception as refused:
            error = AllocationFailed(nbytes, refused.Get_error_string())
            error.__cause__ = refused
            return error

    def _order(self) -> None:
        # A full fence for the processor and the compiler on both sides of the barrier.
        self._window.Sync()

    def fence(self) -> None:
        """See :meth:`SharedRegion.fence`."""
        if self._memory is not None:
            self._order()
        self._comm.barrier()
        if self._memory is not None:
            self._order()

    def freeze(self) -> None:
        """See :meth:`SharedRegion.freeze`."""
        self.fence()
        if not self._comm.is_leader and self._memory is not None:
            self.array = self._memory.show(self._shape, self._dtype, writable=False)

    def close(self) -> None:
        """See :meth:`SharedRegion.close`."""
        self._memory = None
        self.array = np.empty(0, self._dtype)


def _free_bytes() -> int:
    memory, mount = available_bytes(), shared_memory_bytes()
    known = [memory] if memory is not None else []
    known += [mount[1]] if mount is not None else []
    return min(known, default=1 << 62)
