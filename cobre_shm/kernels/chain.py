"""Allreduce by one accumulator that goes from rank to rank, for more ranks than cores.

Where ranks share cores, the sum of all work decides and not the latency, and the reading of all
ranks' slots is most of it. Here rank 0 copies each part of its values into the accumulator, rank r
adds its own as soon as rank r - 1 has, and when the last rank has, everybody copies the result
out. Each rank reads and writes one accumulator, which stays in a cache.

    round e            calls are compared; its slots carry nothing and are free after it
    A(c)  rank r > 0 waits until steps[r - 1] >= base + c + 1         <SYNC steps>
          part c of the accumulator, in the slots of e of all ranks
          steps[r] = base + c + 1                                     <SYNC steps>
    B(c)  waits until steps[size - 1] >= base + c + 1, copies part c out
    round e + 1        without payload

``base`` counts the parts of all chains before: the same number on all ranks.

One writer at a time: part c is written by r only after r - 1 has finished it, and is only read
after the last rank has. Reuse: nobody else uses the slots of e, which carried nothing, before O of
round e + 1, and a rank publishes that after its own B.
"""

from __future__ import annotations

from typing import Any

from cobre_shm.kernels import context
from cobre_shm.kernels.copying import call_reduction, copy_bytes
from cobre_shm.kernels.failing import COPY_IN, COPY_OUT, REDUCE, copy_or_fail, fail_at
from cobre_shm.kernels.jit import inlined
from cobre_shm.kernels.rounds import end, observe, publish, recorded_wait, slot, take_slots
from cobre_shm.kernels.switches import PIECE_BYTES, chain_chunk
from cobre_shm.kernels.waiting import begin_wait, publish_steps, wait_steps

__all__ = ["chain"]


@inlined
def chain(ctx: Any, send: int, recv: int, nbytes: int, item_bytes: int, reduction: int) -> int:
    """Reduce ``nbytes`` at ``send`` to ``recv``; resumable."""
    chunk = chain_chunk(ctx)
    parts = (nbytes + chunk - 1) // chunk
    # ROUND 0: the first round. 1..parts: A. parts + 1..2 parts: B. Then the last round.
    while True:
        position = ctx[context.ROUND]
        if position == 0 or position > 2 * parts:
            if ctx[context.STAGE] == context.DEPOSIT:
                if position == 0:
                    take_slots(ctx, min(nbytes, ctx[context.SLOT_BYTES]))
                status = publish(ctx)
                if status != context.READY:
                    return status
            status = observe(ctx)
            if status != context.READY:
                return status
            if position > 0:
                ctx[context.STEPS] += parts
                return end(ctx, nbytes)
        else:
            part = position - 1 if position <= parts else position - 1 - parts
            status = _part(
                ctx, part, position <= parts, chunk, send, recv, nbytes, item_bytes, reduction
            )
            if status != context.READY:
                return status
        ctx[context.ROUND] += 1
        ctx[context.STAGE] = context.DEPOSIT
        begin_wait(ctx)


@inlined
def _part(
    ctx: Any,
    part: int,
    is_adding: bool,
    chunk: int,
    send: int,
    recv: int,
    nbytes: int,
    item_bytes: int,
    reduction: int,
) -> int:
    size = ctx[context.SIZE]
    rank = ctx[context.RANK]
    start = part * chunk
    length = min(chunk, nbytes - start)
    target = ctx[context.STEPS] + part + 1
    slot_bytes = ctx[context.SLOT_BYTES]
    place = slot(ctx, start // slot_bytes) + start % slot_bytes
    is_last = rank == size - 1
    if is_adding:
        if rank == 0:
            copy_or_fail(ctx, COPY_IN, place, send + start, length)
        else:
            status = _wait(ctx, rank - 1, target)
            if status != context.READY:
                return status
            _add(ctx, place, send + start, recv + start, length, item_bytes, reduction, is_last)
        publish_steps(ctx, target)
    elif not is_last:
        status = _wait(ctx, size - 1, target)
        if status != context.READY:
            return status
        copy_or_fail(ctx, COPY_OUT, recv + start, place, length)
    return context.READY


@inlined
def _wait(ctx: Any, peer: int, target: int) -> int:
    before = ctx[context.YIELD_SINCE]
    ctx[context.AWAITED_STEPS] = target
    status = wait_steps(ctx, peer, target)
    recorded_wait(ctx, before)
    if status == context.READY:
        ctx[context.AWAITED_STEPS] = 0
    return status


@inlined
def _add(
    ctx: Any,
    accumulator: int,
    values: int,
    recv: int,
    nbytes: int,
    item_bytes: int,
    reduction: int,
    is_last: bool,
) -> None:
    """Reduce the own values into the accumulator; the last rank takes the result along."""
    at = 0
    while at < nbytes:
        piece = min(PIECE_BYTES, nbytes - at)
        place = accumulator + at
        call_reduction(reduction, place, place, values + at, piece // item_bytes)
        fail_at(ctx, REDUCE)
        if is_last:
            copy_bytes(recv + at, place, piece)
        at += PIECE_BYTES
