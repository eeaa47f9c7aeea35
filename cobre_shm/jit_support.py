"""What jitted collectives need of the interpreter: two C functions that call Python.

A collective that comes back unfinished is taken over: here it goes on as the communicator's method
would, with time limits, signals and failures, and what it raises is kept for ``jit.check``. And the
kernel of a dtype and reduction is compiled when it is first used.
"""

from __future__ import annotations

import ctypes
import weakref
from typing import Any

import numpy as np

from cobre_shm import fastcall, layout
from cobre_shm.communicator import Communicator
from cobre_shm.datatypes import ReduceOp, is_reducible, tag_dtype
from cobre_shm.errors import InvalidDatatype
from cobre_shm.kernels import context
from cobre_shm.native.entry import ALLGATHERV, ALLREDUCE, BARRIER, BROADCAST
from cobre_shm.native.reduce import reduction_address
from cobre_shm.tuning import NAMES, default_tuning

__all__ = ["FAILED", "KERNELS", "JitSupport"]

FAILED = 100  # status of a jitted collective that raised here

# A kernel's place is its number in ``jit.py``.
KERNELS = (BARRIER, BROADCAST, ALLREDUCE, ALLGATHERV)

_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * 10)
_SLOT_BYTES = layout.PAGE_BYTES


class JitSupport:
    """The interpreter's side of one communicator's jitted collectives.

    Attributes:
        address: Of the context.

    Raises:
        InvalidDatatype: The backend cannot be called in jitted code.
    """

    def __init__(self, comm: Communicator) -> None:
        self._error: BaseException | None = None
        self._comm = weakref.ref(comm)
        if comm.backend == "shm":
            state, self._known = comm._context, comm._known  # type: ignore[attr-defined]
        elif comm.backend == "local":
            state, self._memory = _state_of_one_rank()
            self._known = fastcall.Known(state)
        else:
            raise InvalidDatatype(
                "jit.handle",
                f"backend {comm.backend} cannot be called inside jitted code; shm and local can",
            )
        self._callbacks = _CALLBACK(self._take_over), _CALLBACK(self._prepare)
        for word, callback in zip(
            (context.TAKE_OVER, context.PREPARE), self._callbacks, strict=True
        ):
            state[word] = ctypes.cast(callback, ctypes.c_void_p).value
        self._state = state
        self.address: int = int(state.ctypes.data)

    def take_error(self) -> BaseException | None:
        """Return what the last failed collective raised, once."""
        error, self._error = self._error, None
        return error

    def _take_over(self, kernel: int, status: int, *args: int) -> int:
        chosen = KERNELS[kernel]
        try:
            self._comm()._settle(chosen, status, args[: chosen.arity])  # type: ignore[union-attr]
        except BaseException as error:
            # It crosses jitted code, which knows no Python exceptions.
            self._error = error
            return FAILED
        return 0

    def _prepare(self, tag: int, op: int, *_: int) -> int:
        dtype = tag_dtype(tag)
        if dtype is not None and op in list(ReduceOp) and is_reducible(dtype, ReduceOp(op)):
            address = reduction_address(dtype, ReduceOp(op))
            if address:
                self._known.add(dtype, ReduceOp(op), layout.ALLREDUCE | op << 8, tag, address)
        return 0


def _state_of_one_rank() -> tuple[Any, Any]:
    """A context of one rank with private memory in the place of a segment."""
    memory = np.zeros(layout.segment_bytes(1, _SLOT_BYTES) + layout.PAGE_BYTES, dtype=np.uint8)
    start = -(-memory.ctypes.data // layout.PAGE_BYTES) * layout.PAGE_BYTES
    state = np.zeros(context.WORDS, dtype=np.int64)
    scratch = np.zeros(context.SCRATCH_BYTES + layout.LINE_BYTES, dtype=np.uint8)
    costs = np.zeros(context.COSTS_WORDS, dtype=np.int64)
    state[context.SELF] = state.ctypes.data
    state[context.COSTS] = costs.ctypes.data
    state[context.SIZE] = 1
    state[context.CONTROL] = start + layout.CONTROL
    state[context.RINGS] = start + layout.rings_offset(1)
    state[context.SLOT_BYTES] = _SLOT_BYTES
    state[context.RING_BYTES] = layout.ring_bytes(1, _SLOT_BYTES)
    state[context.POSITION] = layout.SMALL_SLOTS_BYTES
    state[context.POISON] = start + layout.HEADER_POISON
    state[context.RECORDER] = start + layout.recorder_offset(1)
    state[context.FAIL_PHASE] = -1
    state[context.SCRATCH] = -(-scratch.ctypes.data // layout.LINE_BYTES) * layout.LINE_BYTES
    values = default_tuning(1, 1)
    state[context.TUNING : context.TUNING + len(NAMES)] = [values[name] for name in NAMES]
    for word, kernel in zip(
        (
            context.BARRIER_KERNEL,
            context.BROADCAST_KERNEL,
            context.ALLREDUCE_KERNEL,
            context.ALLGATHERV_KERNEL,
        ),
        KERNELS,
        strict=True,
    ):
        state[word] = kernel.address
    return state, (memory, scratch, costs)
