"""Barrier: one round without a payload."""

from __future__ import annotations

from typing import Any

from cobre_shm.kernels import context
from cobre_shm.kernels.jit import inlined
from cobre_shm.kernels.rounds import begin, end, observe, publish

__all__ = ["barrier"]


@inlined
def barrier(ctx: Any, resume: int, what: int, tag: int, count: int) -> int:
    """Enter and wait for all."""
    if not resume:
        status = begin(ctx, what, tag, count, 0)
        if status != context.READY:
            return status
    if ctx[context.STAGE] == context.DEPOSIT:
        status = publish(ctx)
        if status != context.READY:
            return status
    status = observe(ctx)
    if status != context.READY:
        return status
    return end(ctx, 0)
