"""Buffers that are not freshly allocated numpy arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from cobre_shm.communicator import Array
from cobre_shm.testing.conformance.expect import assert_same_bytes
from cobre_shm.testing.conformance.payloads import filled

__all__ = ["InterfaceOnly", "guarded", "unaligned"]


class InterfaceOnly:
    """An object that shows its memory through ``__array_interface__`` and in no other way."""

    def __init__(self, memory: Array) -> None:
        self._memory = memory

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return self._memory.__array_interface__


def unaligned(values: Array) -> Array:
    """Return a contiguous copy of ``values`` whose address is odd."""
    memory = np.empty(values.nbytes + 2, np.uint8)
    start = 1 - memory.__array_interface__["data"][0] % 2
    copy = memory[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
    copy[...] = values
    return copy


def guarded(dtype: DTypeLike, count: int) -> tuple[Array, Callable[[str], None]]:
    """Return an array inside a larger one, and an assertion that its neighbours are as before."""
    margin = 64
    whole = filled(dtype, count + 2 * margin)
    untouched = filled(dtype, margin)

    def assert_neighbours_untouched(what: str) -> None:
        assert_same_bytes(whole[:margin], untouched, f"{what}: before the buffer")
        assert_same_bytes(whole[margin + count :], untouched, f"{what}: behind the buffer")

    return whole[margin : margin + count], assert_neighbours_untouched
