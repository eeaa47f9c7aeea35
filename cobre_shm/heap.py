"""Shared regions where memory is not shared: a private array with the same interface."""

from __future__ import annotations

from typing import Any

import numpy as np

from cobre_shm.arrays import private_array
from cobre_shm.communicator import SharedRegion

__all__ = ["HeapRegion"]


class HeapRegion(SharedRegion):
    """A region on the heap of one process, which is its own leader."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.array = private_array(shape, dtype, zero=True)

    def fence(self) -> None:
        """Nothing to do: this rank sees its own writes."""

    def freeze(self) -> None:
        """Nothing to do: the only rank is the leader, whose view stays writable."""

    def close(self) -> None:
        """Drop the reference; the memory goes with the last view."""
        self.array = np.empty(0, self.array.dtype)
