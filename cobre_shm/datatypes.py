"""Arrays as the collectives take them: element types, and the reductions that they have."""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Array",
    "Counts",
    "ReduceOp",
    "dtype_tag",
    "is_movable",
    "is_reducible",
    "tag_dtype",
    "tag_itemsize",
    "tag_text",
]

Array: TypeAlias = NDArray[Any]
Counts: TypeAlias = Sequence[int] | NDArray[np.integer[Any]]

_PLAIN = re.compile(r"[<>|][biufcSUmM][0-9]{1,6}(\[[0-9]*[a-zA-Z]{1,2}\])?")

_HASHED = re.compile(r"V[0-9a-f]{7}")


class ReduceOp(enum.IntEnum):
    """Element-wise reduction of ``allreduce``.

    Every element is reduced in rank order 0, 1, ..., size-1 with the arithmetic of its own dtype.
    MIN and MAX propagate NaN; integer SUM and PROD wrap; MIN and MAX of booleans are the logical
    and and or.
    """

    SUM = 0
    PROD = 1
    MIN = 2
    MAX = 3

    @classmethod
    def parse(cls, op: ReduceOp | str) -> ReduceOp:
        """Return the operation that ``op`` is or names (``"sum"``, any case).

        Raises:
            ValueError: There is no such operation.
        """
        if isinstance(op, cls):
            return op
        if isinstance(op, str) and op.strip().upper() in cls.__members__:
            return cls[op.strip().upper()]
        known = ", ".join(f"ReduceOp.{name}" for name in cls.__members__)
        raise ValueError(f"op {op!r} is not a reduction: expected one of {known}")


def is_movable(dtype: np.dtype[Any]) -> bool:
    """Whether elements of ``dtype`` can travel: fixed size, and no Python objects inside."""
    return not dtype.hasobject and dtype.itemsize > 0


def is_reducible(dtype: np.dtype[Any], op: ReduceOp) -> bool:
    """Whether ``op`` is defined for ``dtype``."""
    if dtype.kind in "iuf":
        return True
    if dtype.kind == "c":
        return op in (ReduceOp.SUM, ReduceOp.PROD)
    return dtype.kind == "b" and op in (ReduceOp.MIN, ReduceOp.MAX)


@lru_cache(maxsize=1024)
def dtype_tag(dtype: np.dtype[Any]) -> int:
    """Return 8 bytes that stand for ``dtype`` in shared memory, as a signed 64-bit integer.

    Plain types are their own array-protocol string (``<f8``); a structured type, or one whose
    string is longer than 8 bytes, is ``V`` and seven hexadecimal digits of a hash.
    """
    text = dtype.str.encode("ascii")
    if dtype.names is not None or len(text) > 8:
        # Only now: it loads a library of cryptography, and hardly anybody needs it here.
        import hashlib

        digest = hashlib.blake2s(repr(_form(dtype)).encode(), digest_size=4).hexdigest()
        text = b"V" + digest[:7].encode("ascii")
    return int.from_bytes(text.ljust(8, b"\0"), "little", signed=True)


def _form(dtype: np.dtype[Any]) -> Any:
    """What two dtypes that are equal have in common: not whether they were made by alignment."""
    if dtype.subdtype is not None:
        element, shape = dtype.subdtype
        return _form(element), shape
    if dtype.fields is None:
        return dtype.str
    named = [(name, dtype.fields[name]) for name in dtype.names or ()]
    return dtype.itemsize, [(name, _form(field), *place) for name, (field, *place) in named]


def tag_text(tag: int) -> str:
    """Return the readable form of a tag made by :func:`dtype_tag`."""
    text = _tag_characters(tag)
    if _HASHED.fullmatch(text):
        return f"record {text[1:]}"
    dtype = _plain_dtype(text)
    return ascii(text) if dtype is None else str(dtype)


@lru_cache(maxsize=1024)
def tag_itemsize(tag: int) -> int:
    """Return the bytes of one element, 0 where the tag does not tell."""
    dtype = tag_dtype(tag)
    return 0 if dtype is None else dtype.itemsize


def tag_dtype(tag: int) -> np.dtype[Any] | None:
    """Return the dtype of a tag; None for a record, and where the tag does not tell."""
    return _plain_dtype(_tag_characters(tag))


def _tag_characters(tag: int) -> str:
    return tag.to_bytes(8, "little", signed=True).rstrip(b"\0").decode("ascii", "replace")


def _plain_dtype(text: str) -> np.dtype[Any] | None:
    # In a damaged segment it may be anything, and numpy reads more than this as a dtype.
    if _PLAIN.fullmatch(text):
        with suppress(TypeError, ValueError):
            return np.dtype(text)
    return None
