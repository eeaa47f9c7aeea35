"""Reductions of elements: compiled ones by address, the others by numpy.

Every dtype that numba does not compute with (float16, long double, foreign byte order) is reduced
by the numpy function of the same meaning. A compiled reduction is loaded when it is first used, and
compiled then if nobody has used it before: there are four for each of a dozen dtypes.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from cobre_shm.datatypes import ReduceOp
from cobre_shm.native.cache import addresses

__all__ = ["reduce_with_numpy", "reduction_address"]

_UFUNCS: dict[ReduceOp, np.ufunc] = {
    ReduceOp.SUM: np.add,
    ReduceOp.PROD: np.multiply,
    ReduceOp.MIN: np.minimum,
    ReduceOp.MAX: np.maximum,
}
_COMPILED_ITEM_BYTES = {"i": (1, 2, 4, 8), "u": (1, 2, 4, 8), "f": (4, 8), "c": (8, 16)}


@lru_cache(maxsize=256)
def reduction_address(dtype: np.dtype[Any], op: ReduceOp) -> int:
    """Return the address of ``void (T *destination, T *a, T *b, int64 count, int64 in_place)``.

    ``in_place`` says that ``destination`` is ``a``; any other overlap is undefined. 0: there is no
    compiled kernel for this dtype, use :func:`reduce_with_numpy`.
    """
    if dtype.kind == "b":
        # One that has no arithmetic: BOOLEAN_REDUCTIONS.
        element = "bool"
    elif dtype.isnative and dtype.itemsize in _COMPILED_ITEM_BYTES.get(dtype.kind, ()):
        element = f"{dtype.kind}{dtype.itemsize}"
    else:
        return 0
    name = f"{op.name.lower()}-{element}"
    return addresses(name)[name]


def reduce_with_numpy(op: ReduceOp, accumulator: Any, values: Any) -> None:
    """Reduce in place by numpy, for the dtypes that have no compiled kernel.

    As compiled kernels do, it says nothing of overflow or NaN, whatever ``np.seterr`` was told: an
    error on this rank would leave the others in the middle of a collective.
    """
    with np.errstate(all="ignore"):
        if accumulator.dtype.kind == "c" and op is ReduceOp.PROD:
            # numpy may fuse these products and sums, depending on the processor.
            real = accumulator.real * values.real - accumulator.imag * values.imag
            accumulator.imag = accumulator.real * values.imag + accumulator.imag * values.real
            accumulator.real = real
        else:
            _UFUNCS[op](accumulator, values, out=accumulator)
