"""A symmetric heap: blocks of shared memory at the same offset of an area per rank.

Every process reserves one range of addresses, which costs nothing: ``areas`` areas of ``stride``
bytes. Memory is mapped into it in chunks, each at the same offset of all areas, so that the byte
of rank r's block at ``offset`` stands at ``base + r * stride + offset`` in every process, with a
``base`` of its own. The idea is that of SHMEM (OpenSHMEM specification, memory model).

Everything that says where blocks are is replicated: all ranks allocate in the same order, agree on
what they allocate and free, and compute the rest, each for itself. Per allocation there is one
allreduce of MIN over a few words: the bytes wanted (the largest counts), and for each of the
blocks that were allocated last, whether this rank has dropped it.

* A block is free again when **all** ranks have dropped it. A rank drops it by having no array of
  it left. Peers read a rank's block only inside collectives; a rank that says "dropped" is inside
  ``allocate``, and so is everybody before the answer comes, behind all collectives before.
* Temporaries are among the blocks allocated last, so they are found at once. What was dropped
  later is found when nothing free fits: then the ranks agree on all blocks, and only then grow.
* Growth is by a quarter, so there are few chunks, and few agreements on all blocks.
* A rank whose replica may be torn, because an exception came in between, says so at the next
  allocation, and everybody raises. So does one that could not reserve again what it had mapped.

After ``close`` nothing can be allocated. The range goes with the last array of it.
"""

from __future__ import annotations

import errno
import os
import resource
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from cobre_shm import layout
from cobre_shm.arrays import bytes_of_shape
from cobre_shm.communicator import Array, Communicator
from cobre_shm.datatypes import ReduceOp
from cobre_shm.errors import AllocationFailed, InvalidCommunicator
from cobre_shm.segment.common import MemorySource
from cobre_shm.segment.free_space import FreeSpace
from cobre_shm.segment.libc import map_shared, reserve
from cobre_shm.segment.mapping import Mapping, array_at
from cobre_shm.segment.pages import populate, share_of

__all__ = ["Block", "SharedHeap"]

# Of the addresses of an area. They are 128 TiB in all on x86-64.
_LARGEST_STRIDE = 64 << 30
_SMALLEST_STRIDE = 2 << 20
# Two cache lines, as the prefetcher fetches pairs (Intel 64 and IA-32 Optimization Manual, 3.7).
_ALIGNMENT = 128
_GROWTH = 2 << 20  # a huge page
# Blocks looked at in each allocation: with two more words a few cache lines.
_RECENT = 13
# More than any machine has, and safe to compute with.
_TOO_MANY_BYTES = 1 << 60


class Block:
    """Memory at ``offset`` of every area. This rank drops it by forgetting this object.

    Attributes:
        offset: From the beginning of an area.
        nbytes: Its length, of which the caller may have asked for less.
    """

    __slots__ = ("_dropped", "_mapping", "nbytes", "offset")

    def __init__(self, offset: int, nbytes: int, mapping: Mapping, dropped: set[int]) -> None:
        self.offset: int = offset
        self.nbytes: int = nbytes
        self._mapping = mapping
        self._dropped = dropped

    def __del__(self) -> None:
        self._dropped.add(self.offset)


class SharedHeap:
    """A symmetric heap of a group. Construction is collective, and so is ``allocate``.

    Args:
        comm: The group.
        areas: ``comm.size``, or 1 for blocks that belong to no rank.
        source: Where its memory comes from.

    Attributes:
        areas: Number of areas.
        base: Address of the first area in this process; 0 when closed.
        stride: Bytes from the beginning of an area to that of the next.
        nbytes: How much of each area is memory; the rest are addresses only.

    Raises:
        AllocationFailed: Some rank has not enough addresses; on every rank.
    """

    def __init__(self, comm: Communicator, areas: int, source: MemorySource) -> None:
        self.areas = areas
        self.nbytes: int = 0
        self._comm = comm
        self._source = source
        self._own_area = comm.rank if areas > 1 else 0
        self._free = FreeSpace()
        self._live: dict[int, int] = {}  # bytes by offset, in the order of allocation
        self._dropped: set[int] = set()  # private: what this rank no longer needs
        self._turn = 0  # of the next allocation; -1 while one is under way
        self._is_torn = False  # whether addresses of the range may be somebody else's now
        self._mapping, largest = _reserve(areas)
        agreed = comm.allreduce(np.array([largest], dtype=np.int64), op=ReduceOp.MIN)
        self.stride: int = int(agreed[0])
        if not self.stride:
            if self._mapping is not None:
                self._mapping.release()
            raise AllocationFailed(
                areas * _SMALLEST_STRIDE,
                f"{areas} x {_SMALLEST_STRIDE} addresses are not there on every rank",
                suggestion="Raise the limit on address space (ulimit -v).",
            )
        self.base: int = self._mapping.address if self._mapping is not None else 0

    def allocate(self, nbytes: int) -> Block:
        """Return a new block, which every rank gets at the same offset. Collective.

        Args:
            nbytes: At least this much. Ranks may ask for different sizes: the largest counts.

        Raises:
            AllocationFailed: The memory is not there; on every rank, nothing has changed.
            InvalidCommunicator: The heap is closed, or an exception (KeyboardInterrupt) has come
                between a rank's earlier allocation and its end, or what one had mapped in vain
                could not be undone; on every rank.
        """
        if self._mapping is None:
            raise InvalidCommunicator("The communicator is closed")
        turn, self._turn = -1 if self._is_torn else self._turn, -1
        needed, recent = self._agree(min(nbytes, _TOO_MANY_BYTES), turn)
        for offset in recent:
            self._release(offset)
        try:
            offset = self._place(needed)
        except AllocationFailed as error:
            self._turn = turn + 1
            # Of the chunk it says more than the caller asked for.
            raise AllocationFailed(nbytes, error.detail, suggestion=error.suggestion) from error
        self._live[offset] = needed
        block = Block(offset, needed, self._mapping, self._dropped)
        self._turn = turn + 1
        return block

    def array(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Return this rank's array in a new block, as it was left by who had it. Collective.

        Shapes and dtypes may differ between ranks.

        Raises:
            AllocationFailed, InvalidCommunicator: As for :meth:`allocate`.
        """
        return self.view(self.allocate(bytes_of_shape(shape, dtype)), self._own_area, shape, dtype)

    def view(self, block: Block, area: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Return ``block`` in an area as an array. The block lives as long as any view of it."""
        return array_at(self.address(area, block.offset), shape, dtype, block, writable=True)

    def address(self, area: int, offset: int) -> int:
        """Return where the byte at ``offset`` of an area is in this process."""
        return self.base + area * self.stride + offset

    def close(self) -> None:
        """Let go of the range; arrays that live keep it. Idempotent; not collective."""
        self._mapping = None
        self.base = 0

    def _agree(self, nbytes: int, turn: int) -> tuple[int, list[int]]:
        """Return how much all ranks allocate, and which of the blocks made last are free."""
        recent = list(islice(reversed(self._live), _RECENT))
        words = np.zeros(3 + _RECENT, dtype=np.int64)
        words[:3] = -nbytes, turn, -turn
        words[3 : 3 + len(recent)] = [offset in self._dropped for offset in recent]
        wanted, least, most, *dropped = self._comm.allreduce(words, op=ReduceOp.MIN).tolist()
        if least != -most or least < 0:
            raise InvalidCommunicator(
                "An earlier allocation of shared memory was broken off on some rank, by an "
                "exception or for want of memory: nothing can be allocated any more",
                context={"rank": self._comm.rank, "turn": turn},
            )
        needed = max(_ALIGNMENT, _round_up(-wanted, _ALIGNMENT))
        pairs = zip(recent, dropped, strict=False)
        return needed, [offset for offset, is_free in pairs if is_free]

    def _place(self, nbytes: int) -> int:
        offset = self._free.take(nbytes)
        if offset is None and self._live:
            self._sweep()
            offset = self._free.take(nbytes)
        if offset is None:
            self._grow(nbytes)
            offset = self._free.take(nbytes)
        assert offset is not None
        return offset

    def _sweep(self) -> None:
        """Free every block that all ranks have dropped."""
        live = list(self._live)
        flags = np.fromiter((offset in self._dropped for offset in live), np.uint8, len(live))
        for index in np.flatnonzero(self._comm.allreduce(flags, op=ReduceOp.MIN)).tolist():
            self._release(live[index])

    def _release(self, offset: int) -> None:
        self._dropped.discard(offset)
        self._free.add(offset, self._live.pop(offset))

    def _grow(self, needed: int) -> None:
        """Map at least so much more that ``needed`` bytes are free at the end."""
        lacking = needed - self._free.bytes_before(self.nbytes)
        least = _round_up(lacking, layout.PAGE_BYTES)
        usual = _round_up(max(lacking, self.nbytes // 4), _GROWTH)
        room = self.stride - self.nbytes
        if least > room:
            raise AllocationFailed(
                self.areas * least,
                f"an area has {self.stride} addresses, of which {room} are left",
                suggestion="Raise the limit on address space (ulimit -v), or allocate less.",
            )
        if least < usual <= room:
            try:
                self._map_chunk(usual)
            except AllocationFailed:
                self._map_chunk(least)
        else:
            self._map_chunk(least)

    def _map_chunk(self, nbytes: int) -> None:
        """Map new memory, ``nbytes`` at the end of every area; on all ranks or on none."""
        try:
            self._source.share(self.areas * nbytes, lambda fd: self._map(fd, nbytes))
        except AllocationFailed:
            # On every rank. Behind any other exception peers may have arrays there.
            if not self._is_torn:
                self._reserve_again(nbytes)
            raise
        self._free.add(self.nbytes, nbytes)
        self.nbytes += nbytes

    def _reserve_again(self, nbytes: int) -> None:
        """Undo what has been mapped of a chunk that not all ranks have."""
        for area in range(self.areas):
            try:
                reserve(nbytes, at=self.address(area, self.nbytes))
            except OSError:
                # A hole may be left, and what comes to lie there is not ours to map over, nor to
                # unmap: the range stays until the process ends.
                self._is_torn = True
                if self._mapping is not None:
                    self._mapping.release.detach()

    def _map(self, fd: int, nbytes: int) -> None:
        if self._is_torn:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        pages = self._source.pages
        for area in range(self.areas):
            address = self.address(area, self.nbytes)
            map_shared(fd, nbytes, offset=area * nbytes, at=address)
            pages.apply(address, nbytes, spread=self.areas == 1)
        first, last = 0, nbytes
        if self.areas == 1:
            first, last = share_of(nbytes, self._comm.rank, self._comm.size)
        address = self.address(self._own_area, self.nbytes) + first
        offset = self._own_area * nbytes + first
        pages.collapse(fd, offset, address, last - first)
        populate(fd, offset, address, last - first)


def _reserve(areas: int) -> tuple[Mapping | None, int]:
    """Reserve as many addresses as this process may have, and return the stride; 0 if too few.

    Where there is a limit, a quarter of what is left: the program needs addresses too.
    """
    stride = _LARGEST_STRIDE
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        pages, *_ = Path("/proc/self/statm").read_text(encoding="ascii").split()
        most = (limit - int(pages) * layout.PAGE_BYTES) // 4 // areas
        while stride > max(most, _SMALLEST_STRIDE):
            stride //= 2
    while stride >= _SMALLEST_STRIDE:
        try:
            return Mapping(areas * stride), stride
        except OSError:
            stride //= 2
    return None, 0


def _round_up(nbytes: int, unit: int) -> int:
    return -(-nbytes // unit) * unit
