"""The one place where arguments of collectives are checked, for every backend.

All checks are local and come before anything is published, so that a mistake leaves the group
usable. Functions return what the backend works on: arrays as C-contiguous numpy arrays, counts
and displacements as int64 arrays.
"""

from __future__ import annotations

import math
import zlib
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cobre_shm.arrays import address_of, check_shape, private_array
from cobre_shm.datatypes import Array, Counts, ReduceOp, dtype_tag, is_movable, is_reducible
from cobre_shm.errors import CobreError, InvalidBufferSize, InvalidDatatype, InvalidRoot

__all__ = [
    "GatherLayout",
    "as_buffer",
    "check_allgatherv",
    "check_allreduce",
    "check_broadcast",
    "check_gather_buffers",
    "check_gathered",
    "check_reduction",
    "check_region",
    "region_words",
]

_INT64_MAX = 2**63 - 1


class GatherLayout(NamedTuple):
    """A checked ``allgatherv``."""

    send: Array
    recv: Array
    counts: NDArray[np.int64]
    displs: NDArray[np.int64]


def as_buffer(operation: str, name: str, obj: Any, *, writable: bool) -> Array:
    """Take ``obj`` as an array without copying.

    Raises:
        InvalidDatatype: It exports no buffer, is not C-contiguous, is read-only where it must be
            written, or holds Python objects.
    """
    array = obj
    if type(obj) is not np.ndarray:
        if not (hasattr(obj, "__array_interface__") or _exports_buffer(obj)):
            raise InvalidDatatype(
                operation,
                f"{name} must be a numpy array or export a buffer, got {type(obj).__name__}",
            )
        try:
            array = np.asarray(obj if hasattr(obj, "__array_interface__") else memoryview(obj))
        except ValueError as error:
            # A memoryview that was released, or elements that numpy does not know.
            raise InvalidDatatype(operation, f"{name} cannot be an array: {error}") from error
        if isinstance(obj, np.generic):
            # The one kind that numpy copies: a scalar cannot be written to.
            array.flags.writeable = False
    if not is_movable(array.dtype):
        raise InvalidDatatype(
            operation, f"{name} has dtype {array.dtype}: only fixed-size elements can travel"
        )
    if not array.flags.c_contiguous:
        raise InvalidDatatype(
            operation, f"{name} is not C-contiguous: pass numpy.ascontiguousarray({name})"
        )
    if writable and not array.flags.writeable:
        raise InvalidDatatype(operation, f"{name} is read-only")
    return array  # type: ignore[no-any-return]


def check_gather_buffers(
    size: int, send: Any, recv: Any | None, displs: Counts | None
) -> tuple[Array, Array | None]:
    """Check what can be wrong with an ``allgatherv`` before its counts are known.

    A backend that gathers the counts calls this first, so that no peer is involved in vain.
    """
    op = "allgatherv"
    send = as_buffer(op, "send", send, writable=False)
    if displs is not None:
        _as_int64(op, "displs", displs, size)
    if recv is None:
        return send, None
    recv = as_buffer(op, "recv", recv, writable=True)
    if recv.dtype != send.dtype:
        raise InvalidDatatype(op, f"send has dtype {send.dtype}, recv has {recv.dtype}")
    return send, recv


def check_allgatherv(
    rank: int,
    size: int,
    send: Array,
    recv: Array | None,
    counts: Counts,
    displs: Counts | None,
) -> GatherLayout:
    """Check an ``allgatherv`` whose counts are known; allocate ``recv`` when it is None."""
    op = "allgatherv"
    counts = _as_int64(op, "counts", counts, size)
    # Python's integers: for some ranks they are faster than numpy's vectors, and do not overflow.
    lengths = counts.tolist()
    if send.size != lengths[rank]:
        raise InvalidBufferSize(op, lengths[rank], send.size, what="size of send")
    if displs is None:
        *starts, needed = accumulate(lengths, initial=0)
        if needed > _INT64_MAX:
            raise InvalidBufferSize(op, "sum of counts below 2**63", "more", what="counts")
        places = np.array(starts, dtype=np.int64)
    else:
        places = _as_int64(op, "displs", displs, size)
        starts = places.tolist()
        ends = [start + length for start, length in zip(starts, lengths, strict=True)]
        needed = max(ends)
        if needed > _INT64_MAX:
            raise InvalidBufferSize(op, "displs + counts below 2**63", "more", what="displs")
        blocks = sorted(block for block in zip(starts, ends, strict=True) if block[0] < block[1])
        if any(before[1] > after[0] for before, after in pairwise(blocks)):
            raise InvalidBufferSize(op, "blocks that do not overlap", starts, what="displs")
    if recv is None:
        if needed * send.itemsize > _INT64_MAX:
            raise InvalidBufferSize(op, "at most 2**63 - 1 bytes", needed, what="size of recv")
        recv = private_array((needed,), send.dtype)
    elif recv.dtype != send.dtype:
        raise InvalidDatatype(op, f"send has dtype {send.dtype}, recv has {recv.dtype}")
    elif recv.size < needed:
        raise InvalidBufferSize(op, f"at least {needed}", recv.size, what="size of recv")
    elif np.may_share_memory(send, recv):
        _check_in_place_block(send, recv, starts[rank])
    return GatherLayout(send, recv, counts, places)


def check_gathered(
    rank: int,
    size: int,
    send: Array,
    recv: Array | None,
    counts: Array,
    displs: Counts | None,
) -> tuple[GatherLayout, list[Exception]]:
    """Check an ``allgatherv`` whose counts the ranks have just told each other.

    A mistake of this rank is found too late to be its own affair: the others wait for its part. So
    it is returned, to be raised behind the collective, in which the rank takes part for nothing.
    It is to be popped from its list: a function that has a name for what it raises is kept by it,
    with all its arrays.

    Raises:
        MemoryError: There is none for a part in the collective either.
    """
    try:
        return check_allgatherv(rank, size, send, recv, counts, displs), []
    except (CobreError, MemoryError) as mistake:
        return check_allgatherv(rank, size, send, None, counts, None), [mistake]


def check_reduction(name: str, send: Any, op: ReduceOp | str) -> tuple[Array, ReduceOp]:
    """Check what the operation ``name`` is to reduce."""
    op = ReduceOp.parse(op)
    send = as_buffer(name, "send", send, writable=False)
    if not is_reducible(send.dtype, op):
        raise InvalidDatatype(name, f"{op.name} is not defined for dtype {send.dtype}")
    if send.size == 0:
        raise InvalidBufferSize(name, "at least 1", 0, what="size of send")
    return send, op


def check_allreduce(
    send: Any, recv: Any | None, op: ReduceOp | str
) -> tuple[Array, Array, ReduceOp]:
    """Check an ``allreduce``; allocate ``recv`` when it is None."""
    name = "allreduce"
    send, op = check_reduction(name, send, op)
    if recv is None:
        return send, private_array(send.shape, send.dtype), op
    recv = as_buffer(name, "recv", recv, writable=True)
    if recv.dtype != send.dtype:
        raise InvalidDatatype(name, f"send has dtype {send.dtype}, recv has {recv.dtype}")
    if recv.size != send.size:
        raise InvalidBufferSize(name, send.size, recv.size, what="size of recv")
    if (
        recv is not send
        and np.may_share_memory(send, recv)
        and address_of(send) != address_of(recv)
    ):
        raise InvalidBufferSize(name, "send itself or no overlap", "partial overlap", what="recv")
    return send, recv, op


def check_broadcast(size: int, rank: int, buf: Any, root: int) -> Array:
    """Check a ``broadcast``. Only the root may pass a read-only buffer."""
    if not isinstance(root, int | np.integer) or isinstance(root, bool) or not 0 <= root < size:
        raise InvalidRoot(root, size)
    return as_buffer("broadcast", "buf", buf, writable=rank != root)


def check_region(shape: int | tuple[int, ...], dtype: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Check the shape and dtype of a shared region."""
    return check_shape("create_shared_region", shape, dtype)


def region_words(shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[int, int, int]:
    """Return what ranks compare of a region: tag of the dtype, elements, hash of the shape.

    Each fits its part of the signed call words. A count beyond int64 is cut off there; such shapes
    are told apart by the hash.
    """
    hashed = zlib.crc32(repr(shape).encode()) >> 1
    return dtype_tag(dtype), min(math.prod(shape), _INT64_MAX), hashed


def _exports_buffer(obj: Any) -> bool:
    try:
        memoryview(obj)
    except (TypeError, ValueError):
        return False
    return True


def _as_int64(operation: str, name: str, values: Counts, size: int) -> NDArray[np.int64]:
    try:
        array = np.asarray(values)
    except (ValueError, OverflowError) as error:
        raise InvalidBufferSize(operation, f"{size} integers", repr(values), what=name) from error
    if array.shape != (size,):
        raise InvalidBufferSize(operation, (size,), array.shape, what=f"shape of {name}")
    if array.dtype.kind not in "iu":
        raise InvalidBufferSize(operation, "integers", array.dtype.name, what=name)
    if array.dtype == np.uint64 and bool((array > np.iinfo(np.int64).max).any()):
        raise InvalidBufferSize(operation, "values below 2**63", array.tolist(), what=name)
    array = array.astype(np.int64, copy=False)
    if min(array.tolist()) < 0:
        raise InvalidBufferSize(operation, "non-negative values", array.tolist(), what=name)
    return array


def _check_in_place_block(send: Array, recv: Array, displ: int) -> None:
    if send.size and address_of(send) != address_of(recv) + displ * recv.itemsize:
        raise InvalidBufferSize(
            "allgatherv", "this rank's own block of recv, or no overlap", "an overlap", what="send"
        )
