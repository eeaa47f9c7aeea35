"""Allreduce into a result that all ranks have mapped: each of them makes its part, nobody copies.

From private send buffers the values come through slots, chunk after chunk, as in the
reduce-scatter of ``allreduce.py``: in round k a slot carries the rank's values of chunk k, and
after it the own part of chunk k is reduced into the result. From shared arrays they are read where
they are.

Reuse of the result: a rank writes to it after a round of this collective, which every rank enters
when it is done with what was there before.
"""

from __future__ import annotations

from typing import Any

from cobre_shm.kernels import context
from cobre_shm.kernels.choices import deposit
from cobre_shm.kernels.copying import move_bytes
from cobre_shm.kernels.failing import COPY_IN
from cobre_shm.kernels.jit import inlined
from cobre_shm.kernels.parts import part_start, reduce_part
from cobre_shm.kernels.rounds import (
    begin,
    coming_slot,
    next_round,
    observe,
    publish,
    slot,
    take_slots,
)
from cobre_shm.kernels.sharing import SENDS_READABLE, ending_round, probe, reduce_from
from cobre_shm.kernels.switches import begins_with_probe, is_streaming, scatter_chunk

__all__ = ["allreduce_common"]


@inlined
def allreduce_common(
    ctx: Any,
    resume: int,
    what: int,
    tag: int,
    count: int,
    send: int,
    result: int,
    item_bytes: int,
    reduction: int,
) -> int:
    """Reduce ``count`` elements at ``send`` to ``result``, the same memory on all ranks."""
    nbytes = count * item_bytes
    size = ctx[context.SIZE]
    rank = ctx[context.RANK]
    if not resume:
        status = begin(ctx, what, tag, count, nbytes)
        if status != context.READY:
            return status
    if begins_with_probe(ctx, what, nbytes):
        status = probe(ctx, what, nbytes, send, 0)
        if status != context.READY:
            return status
        if ctx[context.FOUND] & SENDS_READABLE:
            if ctx[context.ROUND] == 0:
                low = part_start(count, item_bytes, size, rank) * item_bytes
                high = part_start(count, item_bytes, size, rank + 1) * item_bytes
                # Every part is stored once, by one rank: the node-wide output is one payload.
                streams = is_streaming(ctx, nbytes // size)
                status = reduce_from(
                    ctx, result + low, low, high - low, item_bytes, reduction, streams, True
                )
                if status != context.READY:
                    return status
                ctx[context.ROUND] = 1
            return ending_round(ctx, nbytes)
    return _through_slots(ctx, send, result, count, item_bytes, reduction)


@inlined
def _through_slots(
    ctx: Any, send: int, result: int, count: int, item_bytes: int, reduction: int
) -> int:
    size = ctx[context.SIZE]
    rank = ctx[context.RANK]
    most = scatter_chunk(ctx, count * item_bytes) // item_bytes
    chunks = (count + most - 1) // most
    chunk = (count + chunks - 1) // chunks
    while ctx[context.ROUND] < chunks:
        start = ctx[context.ROUND] * chunk
        elements = min(chunk, count - start)
        low = min(elements, part_start(chunk, item_bytes, size, rank))
        high = min(elements, part_start(chunk, item_bytes, size, rank + 1))
        source = send + start * item_bytes
        if ctx[context.STAGE] == context.DEPOSIT:
            take_slots(ctx, chunk * item_bytes)
            coming = coming_slot(ctx, rank)
            deposit(ctx, COPY_IN, coming, source, low * item_bytes)
            move_bytes(
                coming + high * item_bytes,
                source + high * item_bytes,
                (elements - high) * item_bytes,
                ctx[context.STREAMS_IN] != 0,
            )
            status = publish(ctx)
            if status != context.READY:
                return status
        status = observe(ctx)
        if status != context.READY:
            return status
        reduce_part(
            ctx,
            result + (start + low) * item_bytes,
            0,
            slot(ctx, 0) + low * item_bytes,
            source + low * item_bytes,
            high - low,
            item_bytes,
            reduction,
            False,
        )
        if next_round(ctx):
            return context.PENDING
    return ending_round(ctx, count * item_bytes)
