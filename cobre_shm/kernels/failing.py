"""Failpoints inside kernels; see ``cobre_shm.failpoints``. Compiled away unless enabled."""

from __future__ import annotations

import signal
from typing import Any

from llvmlite import ir
from numba import types

from cobre_shm import failpoints
from cobre_shm.kernels import context
from cobre_shm.kernels.copying import copy_bytes
from cobre_shm.kernels.jit import inlined, intrinsic
from cobre_shm.kernels.system import yield_processor

__all__ = ["COPY_IN", "COPY_OUT", "PUBLISH", "REDUCE", "SLEEP", "SPIN", "copy_or_fail", "fail_at"]

_ENABLED = failpoints.ENABLED
_ANYWHERE = failpoints.ANYWHERE
COPY_IN = failpoints.PHASES.index("copy_in")
PUBLISH = failpoints.PHASES.index("publish")
SPIN = failpoints.PHASES.index("spin")
SLEEP = failpoints.PHASES.index("sleep")
REDUCE = failpoints.PHASES.index("reduce")
COPY_OUT = failpoints.PHASES.index("copy_out")


@intrinsic
def _kill_self(typing_context: Any) -> Any:
    """Send SIGKILL to this process."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        i32 = ir.IntType(32)
        module = builder.module
        getpid = module.globals.get("getpid") or ir.Function(
            module, ir.FunctionType(i32, []), "getpid"
        )
        kill = module.globals.get("kill") or ir.Function(
            module, ir.FunctionType(i32, [i32, i32]), "kill"
        )
        builder.call(kill, [builder.call(getpid, []), i32(signal.SIGKILL)])
        return context.get_dummy_value()

    return types.void(), code


@inlined
def fail_at(ctx: Any, phase: int) -> None:
    """Be at a place; fail if it is the chosen one, yield if that is to be done anywhere."""
    if _ENABLED:
        if ctx[context.FAIL_PHASE] == _ANYWHERE:
            # Knuth's MMIX generator; its high bits are good.
            ctx[context.FAIL_SEQUENCE] *= 6364136223846793005
            ctx[context.FAIL_SEQUENCE] += 1442695040888963407
            if ctx[context.FAIL_SEQUENCE] >> 60 & 3 == 0:
                ctx[context.FAIL_YIELDS] += 1
                yield_processor()
        elif (
            ctx[context.FAIL_PHASE] == phase and ctx[context.FAIL_SEQUENCE] == ctx[context.SEQUENCE]
        ):
            _kill_self()


@inlined
def copy_or_fail(ctx: Any, phase: int, destination: int, source: int, nbytes: int) -> None:
    """Copy, with a place to fail half-way."""
    if _ENABLED:
        half = nbytes // 2
        copy_bytes(destination, source, half)
        fail_at(ctx, phase)
        copy_bytes(destination + half, source + half, nbytes - half)
    else:
        copy_bytes(destination, source, nbytes)
