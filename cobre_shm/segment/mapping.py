"""Addresses of this process, and arrays on them, which keep them mapped as long as they live."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np

from cobre_shm.arrays import bytes_of_shape
from cobre_shm.communicator import Array
from cobre_shm.segment.libc import reserve, unmap
from cobre_shm.segment.pages import HUGE_PAGE_BYTES

__all__ = ["Mapping", "array_at"]


class Mapping:
    """Reserved addresses, for memory to be mapped at: they go with the last reference to this.

    Attributes:
        address: The first, at the beginning of a huge page.
        release: Call it to let them go at once.

    Raises:
        OSError: There are not so many.
    """

    def __init__(self, nbytes: int) -> None:
        reserved = nbytes + HUGE_PAGE_BYTES
        first = reserve(reserved)
        self.address: int = -(-first // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        self.release: weakref.finalize[..., Any] = weakref.finalize(self, unmap, first, reserved)
        # Arrays may be used until the very end of the process.
        self.release.atexit = False


class _Bytes:
    """Memory in the form that numpy reads; arrays of it refer to this, and this to its owner."""

    __slots__ = ("__array_interface__", "_owner")

    def __init__(self, address: int, nbytes: int, owner: object, *, writable: bool) -> None:
        self._owner = owner
        self.__array_interface__ = {
            "version": 3,
            "typestr": "|u1",
            "shape": (nbytes,),
            "data": (address, not writable),
        }


def array_at(
    address: int, shape: tuple[int, ...], dtype: np.dtype[Any], owner: object, *, writable: bool
) -> Array:
    """Return the array at ``address``. It, and every view of it, refers to ``owner``.

    Where it is not writable, no view of it can be made so.
    """
    memory = _Bytes(address, bytes_of_shape(shape, dtype), owner, writable=writable)
    return np.asarray(memory).view(dtype).reshape(shape)
