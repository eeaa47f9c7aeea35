"""Which parts of a range of addresses are free: best fit, neighbours merged.

A pure data structure: equal calls in equal order give equal answers in every process.
"""

from __future__ import annotations

from bisect import bisect_left, insort

__all__ = ["FreeSpace"]


class FreeSpace:
    """Free parts by size, and by where they begin and end."""

    def __init__(self) -> None:
        self._by_size: list[tuple[int, int]] = []
        self._size_at: dict[int, int] = {}
        self._start_of: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._by_size)

    def add(self, offset: int, nbytes: int) -> None:
        """Make a part free; it must not be."""
        if offset in self._start_of:
            offset, before = self._start_of[offset], offset
            self._remove(offset)
            nbytes += before - offset
        if offset + nbytes in self._size_at:
            nbytes += self._remove(offset + nbytes)
        self._insert(offset, nbytes)

    def take(self, nbytes: int) -> int | None:
        """Return the offset of the smallest, then lowest, free part that holds ``nbytes``."""
        index = bisect_left(self._by_size, (nbytes, 0))
        if index == len(self._by_size):
            return None
        size, offset = self._by_size[index]
        self._remove(offset)
        if size > nbytes:
            self._insert(offset + nbytes, size - nbytes)
        return offset

    def bytes_before(self, end: int) -> int:
        """Return how much is free right before ``end``."""
        return end - self._start_of.get(end, end)

    def _insert(self, offset: int, nbytes: int) -> None:
        insort(self._by_size, (nbytes, offset))
        self._size_at[offset] = nbytes
        self._start_of[offset + nbytes] = offset

    def _remove(self, offset: int) -> int:
        nbytes = self._size_at.pop(offset)
        del self._start_of[offset + nbytes]
        del self._by_size[bisect_left(self._by_size, (nbytes, offset))]
        return nbytes
