"""Reduction of blocks that lie in one buffer, in rank order.

For backends whose transport gathers the ranks' blocks: row r is rank r's.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cobre_shm.datatypes import ReduceOp
from cobre_shm.kernels.copying import call_reduction, copy_bytes
from cobre_shm.kernels.jit import inlined, integer_function
from cobre_shm.kernels.reduce import reduce_with_numpy, reduction_address

__all__ = ["address_of", "reduce_at_addresses", "reduce_rows"]

# The part of the accumulator that stays in the first-level cache while the rows stream by.
_PART_BYTES = 8192


@inlined
def reduce_at_addresses(
    reduction: int,
    target: int,
    rows: int,
    row_bytes: int,
    size: int,
    count: int,
    item_bytes: int,
) -> int:
    """Reduce ``size`` rows of ``count`` elements, ``row_bytes`` apart, to ``target``."""
    part = _PART_BYTES // item_bytes
    first = 0
    while first < count:
        n = min(part, count - first)
        start = first * item_bytes
        row = rows + start
        if size == 1:
            copy_bytes(target + start, row, n * item_bytes)
        else:
            call_reduction(reduction, target + start, row, row + row_bytes, n)
        for other in range(2, size):
            call_reduction(reduction, target + start, target + start, row + other * row_bytes, n)
        first += n
    return 0


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., int]:
    words = [ctypes.c_int64] * 7
    return ctypes.CFUNCTYPE(ctypes.c_int64, *words)(integer_function(reduce_at_addresses, 7))


def reduce_rows(op: ReduceOp, rows: NDArray[Any], target: NDArray[Any]) -> None:
    """Write ``rows[0] op rows[1] op ...`` to ``target``, strictly in this order.

    Args:
        op: The reduction.
        rows: Shape (ranks, n), C-contiguous. Unspecified afterwards where numpy reduces.
        target: n elements of the same dtype, contiguous, outside ``rows``.
    """
    size = len(rows)
    reduction = reduction_address(rows.dtype, op)
    if reduction:
        place, nbytes = address_of(target), target.nbytes
        _compiled()(reduction, place, address_of(rows), nbytes, size, target.size, target.itemsize)
        return
    accumulator = rows[0]
    with np.errstate(all="ignore"):
        for row in rows[1:]:
            reduce_with_numpy(op, accumulator, row)
    target[...] = accumulator


def address_of(array: Any) -> int:
    """Return the address of a writable, contiguous array that exports a buffer."""
    # A fifth of the time that __array_interface__ and array.ctypes take.
    return ctypes.addressof(ctypes.c_char.from_buffer(array))
