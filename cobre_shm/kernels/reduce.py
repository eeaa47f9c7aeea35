"""Reduction kernels: destination = a op b, element by element.

One source per operation; the element type comes with the signature. They are called by address
from the protocol kernels, which know only bytes. Every dtype that numba does not compute with
(float16, long double, foreign byte order) is reduced by the numpy function of the same meaning.

No fast-math: an element's result is that of the written expression, so it does not depend on
vector width or position.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from numba import from_dtype, types

from cobre_shm.datatypes import ReduceOp
from cobre_shm.kernels.jit import function_address, inlined

__all__ = ["reduce_with_numpy", "reduction_address"]


# Two loops each: the vectorised one needs a destination of its own, which the compiler tests, and
# a destination that is ``a`` needs a loop that says so.
def _sum(destination: Any, a: Any, b: Any, count: int, in_place: int) -> None:
    if in_place:
        for i in range(count):
            destination[i] += b[i]
    else:
        for i in range(count):
            destination[i] = a[i] + b[i]


def _prod(destination: Any, a: Any, b: Any, count: int, in_place: int) -> None:
    if in_place:
        for i in range(count):
            destination[i] *= b[i]
    else:
        for i in range(count):
            destination[i] = a[i] * b[i]


# x != x is true for NaN alone. An earlier NaN stays, a later one fails `x < y` and is taken, so
# NaN propagates from any rank, as in numpy.minimum and numpy.maximum.
@inlined
def _smaller(x: Any, y: Any) -> Any:
    return x if (x < y or x != x) else y


@inlined
def _larger(x: Any, y: Any) -> Any:
    return x if (x > y or x != x) else y


def _min(destination: Any, a: Any, b: Any, count: int, in_place: int) -> None:
    if in_place:
        for i in range(count):
            destination[i] = _smaller(destination[i], b[i])
    else:
        for i in range(count):
            destination[i] = _smaller(a[i], b[i])


def _max(destination: Any, a: Any, b: Any, count: int, in_place: int) -> None:
    if in_place:
        for i in range(count):
            destination[i] = _larger(destination[i], b[i])
    else:
        for i in range(count):
            destination[i] = _larger(a[i], b[i])


# Booleans arrive as bytes; any non-zero byte is true and the result is 0 or 1.
def _logical_and(destination: Any, a: Any, b: Any, count: int, in_place: int) -> None:
    if in_place:
        for i in range(count):
            destination[i] = 1 if (destination[i] != 0 and b[i] != 0) else 0
    else:
        for i in range(count):
            destination[i] = 1 if (a[i] != 0 and b[i] != 0) else 0


def _logical_or(destination: Any, a: Any, b: Any, count: int, in_place: int) -> None:
    if in_place:
        for i in range(count):
            destination[i] = 1 if (destination[i] != 0 or b[i] != 0) else 0
    else:
        for i in range(count):
            destination[i] = 1 if (a[i] != 0 or b[i] != 0) else 0


_KERNELS: dict[ReduceOp, Callable[..., None]] = {
    ReduceOp.SUM: _sum,
    ReduceOp.PROD: _prod,
    ReduceOp.MIN: _min,
    ReduceOp.MAX: _max,
}
_BOOLEAN_KERNELS: dict[ReduceOp, Callable[..., None]] = {
    ReduceOp.MIN: _logical_and,
    ReduceOp.MAX: _logical_or,
}
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

    ``in_place`` says that ``destination`` is ``a``; any other overlap is undefined. The first use
    of a pair compiles it, or loads it from the cache. 0: there is no compiled kernel for this
    dtype, use :func:`reduce_with_numpy`.
    """
    if dtype.kind == "b":
        kernel, element = _BOOLEAN_KERNELS[op], types.uint8
    elif dtype.isnative and dtype.itemsize in _COMPILED_ITEM_BYTES.get(dtype.kind, ()):
        kernel, element = _KERNELS[op], from_dtype(dtype)
    else:
        return 0
    pointer = types.CPointer(element)
    return function_address(kernel, types.void(pointer, pointer, pointer, types.int64, types.int64))


def reduce_with_numpy(op: ReduceOp, accumulator: Any, values: Any) -> None:
    """Reduce in place by numpy, for the dtypes that have no compiled kernel."""
    if accumulator.dtype.kind == "c" and op is ReduceOp.PROD:
        # numpy may fuse these products and sums, depending on the processor.
        real = accumulator.real * values.real - accumulator.imag * values.imag
        accumulator.imag = accumulator.real * values.imag + accumulator.imag * values.real
        accumulator.real = real
    else:
        _UFUNCS[op](accumulator, values, out=accumulator)
