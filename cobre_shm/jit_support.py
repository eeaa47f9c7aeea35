"""What jitted collectives need of the interpreter: two methods that they call.

A collective that comes back unfinished is taken over: here it goes on as the communicator's method
would, with time limits, signals and failures. And the kernel of a dtype and reduction is compiled
when it is first used. What they raise is kept for ``jit.check`` (``kernels/abandoning.py``): until
it is called, or another exception comes, or for good.
"""

from __future__ import annotations

import ctypes
import weakref
from typing import Any

import numpy as np

from cobre_shm import fastcall, layout
from cobre_shm.communicator import Communicator
from cobre_shm.datatypes import ReduceOp, is_reducible, tag_dtype
from cobre_shm.errors import InvalidCommunicator
from cobre_shm.kernels import context
from cobre_shm.local import LocalCommunicator
from cobre_shm.native.entry import ALLGATHERV, ALLREDUCE, BARRIER, BROADCAST, function_address
from cobre_shm.native.reduce import reduction_address
from cobre_shm.tuning import NAMES, default_tuning

__all__ = ["KERNELS", "JitSupport"]

# A kernel's place is its number in ``jit.py``.
KERNELS = (BARRIER, BROADCAST, ALLREDUCE, ALLGATHERV)

# Called with the GIL, which sees that the function has raised.
_raise_kept = ctypes.PYFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(function_address("raise_kept"))
_TenIntegers = ctypes.c_int64 * 10
_SLOT_BYTES = layout.PAGE_BYTES


class JitSupport:
    """The interpreter's side of one communicator's jitted collectives.

    Attributes:
        address: Of the context.

    Raises:
        InvalidCommunicator: The backend cannot be called in jitted code.
    """

    def __init__(self, comm: Communicator) -> None:
        self._comm = weakref.ref(comm)
        if comm.backend == "shm":
            state, self._known = comm._context, comm._known  # type: ignore[attr-defined]
            comm._map_rings()  # type: ignore[attr-defined]
            comm._segment.announce_compiled_calls(comm.rank)  # type: ignore[attr-defined]
        elif comm.backend == "local":
            assert isinstance(comm, LocalCommunicator)
            state, self._memory = _state_of_one_rank()
            self._known = fastcall.Known(state)
            comm.bar_with(state[context.BUSY : context.BUSY + 1])
        else:
            raise InvalidCommunicator(
                f"Backend {comm.backend} cannot be called inside jitted code; shm and local can",
                context={"backend": comm.backend},
            )
        self._methods = self._take_over, self._prepare
        state[context.TAKE_OVER], state[context.PREPARE] = map(id, self._methods)
        state[context.CALL_BACK] = function_address("call_back")
        self._state = state
        self.address: int = int(state.ctypes.data)

    def raise_kept(self) -> None:
        """Raise what a jitted collective has raised since the last time; of several the last."""
        _raise_kept(self.address)

    def _take_over(self, vector: int) -> None:
        number, status, *args = _TenIntegers.from_address(vector)
        kernel = KERNELS[number]
        comm, args = self._comm(), args[: kernel.arity]
        if isinstance(comm, LocalCommunicator):
            if status == context.TAKEN:
                comm.check_open()
                raise InvalidCommunicator("Another thread is inside a collective")
            while status == context.PENDING:
                status = kernel.call(self.address, 1, *args)
        else:
            comm._settle(kernel, status, tuple(args))  # type: ignore[union-attr]

    def _prepare(self, vector: int) -> None:
        tag, op, *_ = _TenIntegers.from_address(vector)
        dtype = tag_dtype(tag)
        if dtype is not None and op in list(ReduceOp) and is_reducible(dtype, ReduceOp(op)):
            address = reduction_address(dtype, ReduceOp(op))
            if address:
                self._known.add(dtype, ReduceOp(op), layout.ALLREDUCE | op << 8, tag, address)


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
