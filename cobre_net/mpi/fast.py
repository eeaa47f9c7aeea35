"""The fast road from a call to the MPI library, past mpi4py: ``kernels/mpi_road.py`` put in place.

mpi4py takes an array apart anew in each call, and the checks of ``validate`` come before that;
either takes longer than a small message. The road does both in compiled code and calls the
library's own functions with the handles that mpi4py has. The library is that which mpi4py itself
is linked with: the functions are looked up through its extension module.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from cobre_net.mpi.flat import BYTE, Flat, native_operation
from cobre_net.mpi.library import MPI
from cobre_shm import fastcall
from cobre_shm.datatypes import ReduceOp
from cobre_shm.kernels import context, mpi_words, objects
from cobre_shm.native.cache import addresses
from cobre_shm.native.reduce import reduction_address
from cobre_shm.native.table import MPI_ROAD

__all__ = ["Fast", "install", "make_road", "new_words"]

_FUNCTIONS = {
    "barrier": "MPI_Barrier",
    "broadcast": "MPI_Bcast",
    "allreduce": "MPI_Allreduce",
    "allgatherv": "MPI_Allgatherv",
}


def new_words() -> Any:
    """Return the words of a communicator with a closed road: all calls take the Python methods."""
    state = np.zeros(mpi_words.WORDS, np.int64)
    state[context.SELF] = state.ctypes.data
    state[mpi_words.CLOSED] = 1
    return state


def install(cls: type) -> Any:
    """Put the road in the place of ``cls``'s methods, where this Python allows it.

    Returns:
        The words of all communicators that have no road.
    """
    state = new_words()
    probe: Any = object.__new__(cls)
    probe._context = state
    sample = [1, 2]
    words = [
        ctypes.c_int64.from_address(id(sample) + offset).value
        for offset in (objects.LIST_SIZE, objects.LIST_ITEMS)
    ]
    if fastcall.objects_are_as_expected(probe, state) and (
        words[0] == 2 and ctypes.c_int64.from_address(words[1]).value == id(sample[0])
    ):
        roads = addresses(MPI_ROAD)
        fastcall.install(cls, {name: roads[f"{name}_call"] for name in _FUNCTIONS})
        fastcall.serve(cls, state, np.zeros(0, np.int64), np.zeros(3), {})
    return state


def make_road(cls: type, flat: Flat) -> Fast | None:
    """Return the road of a communicator, or None where there is none."""
    return Fast(cls, flat) if fastcall.is_installed(cls) else None


class Fast:
    """The words of one communicator, and what they point at.

    Args:
        cls: On which :func:`install` was called.
        flat: Its collectives, for what the road does not take.

    Attributes:
        state: To be the communicator's ``_context``.
    """

    def __init__(self, cls: type, flat: Flat) -> None:
        self._flat = flat
        size = flat.size
        integers = np.zeros(3 * size + 3, np.int64)
        lengths = np.zeros(2 * size, np.int32)
        room = np.empty(flat.small_bytes, np.uint8)
        self._kept = integers, lengths, room
        library = ctypes.CDLL(MPI.__file__)
        displs, arguments, counts = np.split(integers, (size, size + 3))
        state = new_words()
        kernels = {name: _address(library, function) for name, function in _FUNCTIONS.items()}
        fastcall.serve(cls, state, displs, arguments, kernels)
        state[context.RANK], state[context.SIZE] = flat.rank, size
        state[mpi_words.COMM] = _handle(flat.comm)
        state[mpi_words.BYTE] = _handle(BYTE)
        state[mpi_words.IN_PLACE] = int(MPI.IN_PLACE)
        state[mpi_words.ALLGATHER] = _address(library, "MPI_Allgather")
        state[mpi_words.PIECE_BYTES] = flat.piece_bytes
        state[mpi_words.SMALL_BYTES] = flat.small_bytes
        state[mpi_words.ROOM] = room.ctypes.data
        state[mpi_words.COUNTS] = counts.ctypes.data
        state[mpi_words.LENGTHS] = lengths.ctypes.data
        state[mpi_words.LIST_TYPE] = id(list)
        self.state = state
        self._known = fastcall.Known(state)
        state[mpi_words.CLOSED] = 0

    def learn(self, dtype: np.dtype[Any], op: ReduceOp | None = None) -> None:
        """Take calls with this dtype, and this reduction, from now on."""
        if op is None:
            self._known.add(dtype, None, 0, 0, 0)
            return
        native = native_operation(dtype, op, deterministic=self._flat.deterministic)
        if native is not None:
            self._known.add(dtype, op, _handle(native[1]), _handle(native[0]), 0)
        elif reduction := reduction_address(dtype, op):
            self._known.add(dtype, op, 0, 0, reduction)

    def failure(self) -> Any:
        """Return the error of the function of MPI that failed last."""
        return MPI.Exception(int(self.state[mpi_words.ERROR]))


def _handle(thing: Any) -> int:
    # Some are 32-bit integers with the upper bit set, which mpi4py gives without a sign.
    return ctypes.c_int64(int(MPI._handleof(thing))).value


def _address(library: Any, name: str) -> int:
    address = ctypes.cast(getattr(library, name), ctypes.c_void_p).value
    assert address is not None
    return address
