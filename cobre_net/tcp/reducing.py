"""The reduction kernels of shared memory, called by address. The one place that knows them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from cobre_shm.datatypes import ReduceOp

__all__ = ["Fold", "fold_function"]

Fold = Callable[[int, int, int, int, int], None]
"""``fold(destination, a, b, count, in_place)``: addresses of elements, their number, and whether
``destination`` is ``a``."""

_Kernel = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64
)


@lru_cache(maxsize=256)
def fold_function(dtype: np.dtype[Any], op: ReduceOp) -> Fold:
    """Return what does ``destination = a op b`` with the bits of every backend.

    The first use of a pair compiles a kernel, or loads it. Only the coordinator reduces, so only
    it loads any.
    """
    from cobre_shm.native.reduce import reduce_with_numpy, reduction_address

    address = reduction_address(dtype, op)
    if address:
        return _Kernel(address)

    def fold(destination: int, a: int, b: int, count: int, in_place: int) -> None:
        nbytes = count * dtype.itemsize
        if not in_place:
            ctypes.memmove(destination, a, nbytes)
        left, right = (
            np.frombuffer(memoryview((ctypes.c_char * nbytes).from_address(each)), dtype)
            for each in (destination, b)
        )
        reduce_with_numpy(op, left, right)

    return fold
