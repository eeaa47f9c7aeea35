"""Reduction kernels: destination = a op b, element by element.

One source per operation; the element type comes with the signature. They are called by address
from the protocol kernels, which know only bytes.

No fast-math: an element's result is that of the written expression, so it does not depend on
vector width or position.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cobre_shm.datatypes import ReduceOp
from cobre_shm.kernels.jit import inlined

__all__ = ["BOOLEAN_REDUCTIONS", "REDUCTIONS"]


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


REDUCTIONS: dict[ReduceOp, Callable[..., None]] = {
    ReduceOp.SUM: _sum,
    ReduceOp.PROD: _prod,
    ReduceOp.MIN: _min,
    ReduceOp.MAX: _max,
}
BOOLEAN_REDUCTIONS: dict[ReduceOp, Callable[..., None]] = {
    ReduceOp.MIN: _logical_and,
    ReduceOp.MAX: _logical_or,
}
