"""Arrays by shape and dtype: what is asked for, and private memory for it."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable
from typing import Any, cast

import numpy as np
from numpy.typing import DTypeLike, NDArray

from cobre_shm.datatypes import is_movable
from cobre_shm.errors import AllocationFailed, InvalidBufferSize, InvalidDatatype

__all__ = [
    "address_of",
    "bytes_of",
    "bytes_of_shape",
    "check_element",
    "check_shape",
    "private_array",
    "writable_address",
]


def check_element(operation: str, dtype: DTypeLike) -> np.dtype[Any]:
    """Return the dtype, whose elements may still lack a size, as those of ``"U"``.

    Raises:
        InvalidDatatype: It is not a dtype, or its elements are arrays themselves, which would add
            their extents to the shape.
    """
    try:
        element = np.dtype(dtype)
    except (TypeError, ValueError, SyntaxError) as error:
        raise InvalidDatatype(operation, f"dtype {dtype!r}: {error}") from error
    if element.subdtype is not None:
        raise InvalidDatatype(operation, f"dtype {element}: give its extents as part of the shape")
    return element


def check_shape(
    operation: str, shape: int | tuple[int, ...], dtype: DTypeLike
) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Check the shape and dtype of a new array; return them in their normal form.

    Raises:
        InvalidBufferSize: The shape is not one or more non-negative integers, or not one that an
            array can have.
        InvalidDatatype: As of :func:`check_element`, or elements have no fixed size.
    """
    element = check_element(operation, dtype)
    if not is_movable(element):
        raise InvalidDatatype(operation, f"dtype {element}: only fixed-size elements can be shared")
    # An array without dimensions is iterable by its type only.
    is_one = getattr(shape, "ndim", None) == 0 or not isinstance(shape, Iterable)
    extents: tuple[Any, ...] = (shape,) if is_one else tuple(cast("Iterable[Any]", shape))
    for extent in extents:
        if not isinstance(extent, int | np.integer) or isinstance(extent, bool) or extent < 0:
            raise InvalidBufferSize(operation, "non-negative integers", repr(shape), what="shape")
    try:
        # Too much memory is another error. An array without elements takes none, but cannot have
        # any shape for that.
        np.empty(extents if 0 in extents else (0,) * len(extents), element)
    except (ValueError, OverflowError) as error:
        what = "what numpy can express"
        raise InvalidBufferSize(operation, what, repr(shape), what="shape") from error
    return tuple(int(extent) for extent in extents), element


def address_of(array: NDArray[Any]) -> int:
    """Return where the elements of ``array`` begin."""
    return int(array.__array_interface__["data"][0])


def writable_address(memory: Any) -> int:
    """Return the address of a writable, contiguous array or other object with a buffer."""
    # A fifth of the time that __array_interface__ and array.ctypes take.
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def bytes_of(array: NDArray[Any]) -> NDArray[np.uint8]:
    """Return the memory of a contiguous array."""
    return array.reshape(-1).view(np.uint8)


def bytes_of_shape(shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    """Return the bytes of an array, also where they are more than any memory."""
    return math.prod(shape) * dtype.itemsize


def private_array(
    shape: tuple[int, ...], dtype: np.dtype[Any], *, zero: bool = False
) -> NDArray[Any]:
    """Return a new array in private memory.

    Raises:
        AllocationFailed: The memory is not there.
    """
    try:
        return np.zeros(shape, dtype) if zero else np.empty(shape, dtype)
    except (MemoryError, ValueError) as error:
        raise AllocationFailed(bytes_of_shape(shape, dtype), str(error)) from error
