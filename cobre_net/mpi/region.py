"""Shared regions by MPI's shared windows: one copy for the ranks of a node.

``MPI_Win_free`` is a barrier, but ``close`` is not collective, regions are dropped by garbage
collection, and views of them outlive both. So a window is given back later, when its ranks are
together anyway: those of a communicator when it makes a region, those of closed communicators when
the same ranks make another. They tell each other which windows each has done with, and free those
that nobody holds, in the order in which they were made. A window is held as long as an array that
shows its memory exists. What is left at the end goes with MPI_Finalize.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from cobre_net.mpi.library import MPI
from cobre_shm import layout
from cobre_shm.arrays import bytes_of, bytes_of_shape
from cobre_shm.communicator import Array, SharedRegion
from cobre_shm.errors import AllocationFailed
from cobre_shm.limits import available_bytes, shared_memory_bytes
from cobre_shm.member import Member
from cobre_shm.segment.mapping import array_at

__all__ = ["MpiRegion", "Windows", "new_windows"]


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


class Windows:
    """The windows that a communicator has made, in that order, the same on all of its ranks.

    Args:
        owner: The communicator.
    """

    def __init__(self, owner: Member) -> None:
        self._owner = weakref.ref(owner)
        self._made: list[_Window] = []

    @property
    def is_left(self) -> bool:
        """Whether this rank has closed the communicator, or dropped it."""
        owner = self._owner()
        return owner is None or owner._is_over()

    def __len__(self) -> int:
        return len(self._made)

    def append(self, window: Any, memory: _Memory) -> None:
        """Remember a window, by whose memory it is seen whether it is held."""
        self._made.append(_Window(window, weakref.ref(memory)))

    def free(self, comm: Any) -> None:
        """Free those that nobody holds. Collective over ``comm``, an mpi4py communicator."""
        if not self._made:
            return
        is_held = np.array([window.memory() is not None for window in self._made], np.uint8)
        comm.Allreduce(MPI.IN_PLACE, [is_held, MPI.UINT8_T], MPI.MAX)
        made = list(zip(self._made, is_held, strict=True))
        self._made = [window for window, is_wanted in made if is_wanted]
        for window in (window for window, is_wanted in made if not is_wanted):
            window.window.Unlock_all()
            window.window.Free()


# By the group of their ranks: of the communicators that are in use, or left windows behind.
_windows: list[tuple[Any, list[Windows]]] = []


def new_windows(comm: Any, owner: Member) -> Windows:
    """Return the place for a new communicator's windows; free what others have left behind.

    Collective. Communicators of the same ranks are made by one thread at a time: all ranks must
    find the same ones.

    Args:
        comm: mpi4py communicator of the same ranks.
        owner: The new communicator.
    """
    group = comm.Get_group()
    same = [found for ranks, found in _windows if MPI.Group.Compare(ranks, group) == MPI.IDENT]
    if same:
        group.Free()
    else:
        same.append([])
        _windows.append((group, same[0]))
    (found,) = same
    before, new = found[:], Windows(owner)
    # First, so that the next one finds it on all ranks, whatever becomes of this one.
    found.append(new)
    if before:
        # Whether all have left it, and the same number of windows: a rank may have failed in the
        # making of one, and then nobody frees them.
        facts = np.array([(w.is_left, len(w), -len(w)) for w in before], np.int64)
        comm.Allreduce(MPI.IN_PLACE, facts, MPI.MIN)
        for windows, (is_left, least, most) in zip(before, facts.tolist(), strict=True):
            if is_left and least == -most:
                windows.free(comm)
            if is_left and (least != -most or not len(windows)):
                found.remove(windows)
    return new


class MpiRegion(SharedRegion):
    """A region in a shared window of the ranks of a node.

    Args:
        whole: mpi4py communicator of all ranks.
        node: mpi4py communicator of the ranks of this node.
        windows: Of our communicator of all ranks.
        shape: Of the array.
        dtype: Of its elements.
        meet: Waits for all ranks in the call with a code of ``layout``.
    """

    def __init__(
        self,
        whole: Any,
        node: Any,
        windows: Windows,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        meet: Callable[[int], None],
    ) -> None:
        self._meet = meet
        self._is_leader = bool(node.Get_rank() == 0)
        self._shape, self._dtype = shape, dtype
        nbytes = max(1, bytes_of_shape(shape, dtype))
        windows.free(whole)
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
        windows.append(window, memory)
        self._memory: _Memory | None = memory
        self.array = memory.show(shape, dtype, writable=True)
        if self._is_leader:
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
            mine = nbytes if self._is_leader else 0
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
        self._fence(layout.FENCE)

    def _fence(self, what: int) -> None:
        if self._memory is not None:
            self._order()
        self._meet(what)
        if self._memory is not None:
            self._order()

    def freeze(self) -> None:
        """See :meth:`SharedRegion.freeze`."""
        self._fence(layout.FREEZE)
        if not self._is_leader and self._memory is not None:
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
