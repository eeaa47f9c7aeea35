"""Broadcast: the root's slot of each round carries a chunk; a small payload is in its line.

All ranks wait for all, in every round: only so does each of them see a call of another kind. What
the root loses by it, a head start of more than one chunk, matters to nobody who waits for the data.
"""

from __future__ import annotations

from typing import Any

from cobre_shm import layout
from cobre_shm.kernels import context
from cobre_shm.kernels.choices import copy_out, deposit
from cobre_shm.kernels.failing import COPY_IN, COPY_OUT, copy_or_fail
from cobre_shm.kernels.jit import inlined
from cobre_shm.kernels.rounds import (
    begin,
    coming_slot,
    end,
    next_round,
    observe,
    own_line,
    prefetch_coming_slot,
    publish,
    slot,
    take_slots,
)
from cobre_shm.kernels.sharing import (
    ending_round,
    fetch_from,
    is_readable,
    probe,
)
from cobre_shm.kernels.switches import begins_with_probe, broadcast_chunk, is_streaming
from cobre_shm.kernels.waiting import arrival_line

__all__ = ["broadcast"]


@inlined
def broadcast(
    ctx: Any, resume: int, what: int, tag: int, count: int, root: int, buf: int, nbytes: int
) -> int:
    """Copy ``nbytes`` at ``buf`` of ``root`` to ``buf`` everywhere."""
    if not resume:
        status = begin(ctx, what, tag, count, nbytes)
        if status != context.READY:
            return status
    is_root = ctx[context.RANK] == root
    if begins_with_probe(ctx, what, nbytes):
        status = probe(ctx, what, nbytes, buf if is_root else 0, 0)
        if status != context.READY:
            return status
        if is_readable(ctx, root):
            if ctx[context.ROUND] == 0:
                if not is_root:
                    status = fetch_from(ctx, root, buf, nbytes, is_streaming(ctx, nbytes))
                    if status != context.READY:
                        return status
                ctx[context.ROUND] = 1
            return ending_round(ctx, nbytes)
    is_inline = nbytes <= layout.INLINE_BYTES
    chunk = broadcast_chunk(ctx, nbytes)
    streams = is_streaming(ctx, nbytes)
    while True:
        start = ctx[context.ROUND] * chunk
        length = min(chunk, nbytes - start)
        if ctx[context.STAGE] == context.DEPOSIT:
            if not is_inline:
                take_slots(ctx, length)
            if is_root:
                if is_inline:
                    copy_or_fail(ctx, COPY_IN, own_line(ctx) + layout.INLINE, buf, nbytes)
                else:
                    deposit(ctx, COPY_IN, coming_slot(ctx, root), buf + start, length)
            status = publish(ctx)
            if status != context.READY:
                return status
        status = observe(ctx)
        if status != context.READY:
            return status
        if is_root:
            if not is_inline:
                prefetch_coming_slot(ctx, nbytes)
        elif is_inline:
            line = arrival_line(ctx, ctx[context.EPOCH], root)
            copy_or_fail(ctx, COPY_OUT, buf, line + layout.INLINE, nbytes)
        else:
            copy_out(ctx, buf + start, slot(ctx, root), length, streams)
        if start + chunk >= nbytes:
            return end(ctx, nbytes)
        if next_round(ctx):
            return context.PENDING
