"""What the checks send, and what must come out.

Every rank can compute every other rank's data from the rank number, so that a check needs no
second way of communicating to know what to expect.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from cobre_shm.communicator import Array, Communicator
from cobre_shm.datatypes import ReduceOp, is_reducible

__all__ = [
    "FLOATS",
    "INTEGERS",
    "MOVABLE",
    "SIZES",
    "filled",
    "native",
    "numbers",
    "packed",
    "records",
    "reduced",
    "reductions",
    "slot_bytes",
    "special_numbers",
]

_SENTINEL = 0xA5
"""Byte of receive buffers that nobody should have written."""

SIZES = (1, 2, 3, 5, 6, 7, 8, 9, 16, 17, 31, 64, 65, 127, 1000)
"""Small numbers of elements: odd, even, and around the limits that fast paths tend to have."""

INTEGERS = tuple(np.dtype(code) for code in "bBhHiIlLqQ")
FLOATS = tuple(np.dtype(code) for code in "efdg")
_COMPLEX = tuple(np.dtype(code) for code in "FDG")
_FOREIGN_ORDER = tuple(np.dtype(code).newbyteorder("S") for code in ("i2", "u8", "f4", "f8"))

_RECORD = np.dtype([("id", "i4"), ("weights", "f8", (3,))])
_STRUCTURED = (
    _RECORD,
    np.dtype([("flag", "?"), ("value", "f8"), ("code", "i2")], align=True),
    np.dtype([("key", "u1"), ("inner", [("point", "f4", (2, 2)), ("tag", "S3")])]),
    np.dtype({"names": ["a", "b"], "formats": ["i2", "f8"], "offsets": [3, 17], "itemsize": 31}),
    np.dtype([("rows", _RECORD, (40,))]),
)

MOVABLE = (
    np.dtype("?"),
    *INTEGERS,
    *FLOATS,
    *_COMPLEX,
    *_FOREIGN_ORDER,
    *(np.dtype(code) for code in ("S5", "U3", "V7", "M8[ns]", "M8[25s]", "m8[s]")),
    *_STRUCTURED,
)
"""Element types that can travel."""


def slot_bytes(comm: Communicator) -> int:
    """Return how many bytes of one rank the backend moves at once, or a guess."""
    return int(getattr(comm, "slot_bytes", 1 << 17))


def packed(counts: Sequence[int]) -> list[int]:
    """Return the displacements of blocks that follow each other without gaps."""
    return [sum(counts[:rank]) for rank in range(len(counts))]


def filled(dtype: DTypeLike, count: int) -> Array:
    """Return a receive buffer whose every byte is the sentinel."""
    dtype = np.dtype(dtype)
    return np.full(count * dtype.itemsize, _SENTINEL, np.uint8).view(dtype)


def records(dtype: DTypeLike, count: int, *key: int) -> Array:
    """Return ``count`` elements of arbitrary bits (padding included) that depend on ``key``."""
    dtype = np.dtype(dtype)
    nbytes = count * dtype.itemsize
    words = _random_words(-(-nbytes // 8), *key)
    if dtype.kind == "b":
        words &= np.uint64(0x0101010101010101)
    elif dtype.kind == "U":
        words &= np.uint64(0x00007FFF00007FFF)
    elements: Array = words.view(np.uint8)[:nbytes].view(dtype)
    return elements


def numbers(dtype: DTypeLike, count: int, *key: int) -> Array:
    """Return ``count`` numbers whose reduction shows the order it was done in.

    Floats have full mantissas and differing exponents, so that each addition rounds; integers
    cover the whole range, so that sums wrap, and are odd, so that products do not vanish.
    """
    dtype = np.dtype(dtype)
    if dtype.kind == "c":
        pairs: Array = numbers(_component(dtype), 2 * count, *key).view(native(dtype))
        return pairs.astype(dtype)
    words = _random_words(count, *key)
    if dtype.kind == "b":
        return (words & np.uint64(1)).astype(dtype)
    if dtype.kind in "iu":
        return (words | np.uint64(1)).astype(native(dtype)).astype(dtype)
    exponents = (words % np.uint64(3 if dtype.itemsize == 2 else 17)).astype(np.int32)
    exponents -= exponents.max(initial=0) // 2
    signs = np.where(words >> np.uint64(63), -1.0, 1.0)
    # The second term fills the bits that a long double has beyond a double.
    fractions = (words >> np.uint64(11)).astype(np.longdouble) * np.longdouble(2.0) ** -53
    fractions += _random_words(count, *key, 1).astype(np.longdouble) * np.longdouble(2.0) ** -118
    values: Array = np.ldexp(signs * (1 + fractions), exponents)
    return values.astype(dtype)


def special_numbers(dtype: DTypeLike, rank: int) -> Array:
    """Return rank ``rank``'s block of values at the edges of ``dtype``.

    Ranks 0 and 1 meet in every pair of values, later ranks in many triples.
    """
    dtype = np.dtype(dtype)
    if dtype.kind == "c":
        real = special_numbers(_component(dtype), rank)
        both = np.empty(real.size, native(dtype))
        both.real, both.imag = real, np.roll(real, 5)
        return both.astype(dtype)
    if dtype.kind == "b":
        values = np.array([False, True])
    elif dtype.kind in "iu":
        limits = np.iinfo(native(dtype))
        values = np.array(
            [0, 1, 2, limits.max, limits.max - 1, limits.min, limits.min + 1], native(dtype)
        )
    else:
        info = np.finfo(native(dtype))
        one = info.dtype.type(1)
        largest, least = info.max, info.smallest_subnormal
        values = np.array(
            [
                *(np.nan, np.inf, -np.inf, 0.0, -0.0, one, -one, one + info.eps),
                *(largest, -largest, least, -least, info.tiny, -info.tiny, info.tiny - least),
            ],
            native(dtype),
        )
    length = values.size
    index = np.arange(length * length)
    if rank == 0:
        chosen = index // length
    elif rank == 1:
        chosen = index % length
    else:
        chosen = (index * (2 * rank + 1) + index // length + rank) % length
    return values[chosen].astype(dtype)


def reductions(dtypes: Sequence[np.dtype[Any]] | None = None) -> Iterator[tuple[Any, ReduceOp]]:
    """Yield every (dtype, operation) for which ``allreduce`` is defined."""
    for dtype in MOVABLE if dtypes is None else dtypes:
        for op in ReduceOp:
            if is_reducible(dtype, op):
                yield dtype, op


def reduced(op: ReduceOp, blocks: Sequence[Array]) -> Array:
    """Return the reduction of ``blocks``, one per rank, by the plain loop in rank order."""
    dtype = blocks[0].dtype
    total = blocks[0].astype(native(dtype))
    with np.errstate(all="ignore"):
        for block in blocks[1:]:
            total = _combine(op, total, block.astype(native(dtype)))
    return total.astype(dtype)


def _combine(op: ReduceOp, left: Array, right: Array) -> Array:
    if op is ReduceOp.SUM:
        return np.add(left, right)
    if op is ReduceOp.PROD:
        return _complex_product(left, right) if left.dtype.kind == "c" else left * right
    if left.dtype.kind == "b":
        return left & right if op is ReduceOp.MIN else left | right
    return np.minimum(left, right) if op is ReduceOp.MIN else np.maximum(left, right)


def _complex_product(left: Array, right: Array) -> Array:
    # numpy's own product may contract or reorder the four multiplications where it is vectorised.
    product = np.empty_like(left)
    product.real = left.real * right.real - left.imag * right.imag
    product.imag = left.real * right.imag + left.imag * right.real
    return product


def native(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return ``dtype`` in the byte order of this machine."""
    return dtype.newbyteorder("=")


def _component(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return np.empty(0, native(dtype)).real.dtype


def _random_words(count: int, *key: int) -> NDArray[np.uint64]:
    """Return ``count`` words of SplitMix64 (Steele, Lea, Flood 2014), seeded by ``key``."""
    state = 0
    for part in key:
        state = ((state ^ (part + 1)) * 0xD1342543DE82EF95 + 1) % 2**64
    words = np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(state)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
