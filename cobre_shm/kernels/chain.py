"""Allreduce by one accumulator that goes from rank to rank, for more ranks than cores.

Where ranks share cores, the sum of all work decides and not the latency, and the reading of all
ranks' slots is most of it. Here rank 0 copies each part of its values into the accumulator, rank r
adds its own as soon as rank r - 1 has, and when the last rank has, everybody copies the result
out. Each rank reads and writes one accumulator, which stays in a cache.

A block is two parts for each rank, so that the accumulator stays in the second-level caches, as
long as a core has a few ranks, and every core soon has a part to work on. All blocks use the same
memory, the slots of the first round of all ranks. Of each:

    a round; of the first block, calls are compared; its slots carry nothing and are free after it
    A(c)  rank r > 0 waits until steps[r - 1] >= base + c + 1         <SYNC steps>
          part c of the accumulator
          steps[r] = base + c + 1                                     <SYNC steps>
    B(c)  waits until steps[size - 1] >= base + c + 1, copies part c out

and behind the last one, a round more. ``base`` counts the parts of all blocks before, of this chain
and of earlier ones: the same number on all ranks.

One writer at a time: part c is written by r only after r - 1 has finished it, and is only read
after the last rank has. Reuse: nobody writes the slots, for the next block or for another
collective, before O of the round behind the block, and a rank publishes that after its own B.
"""

from __future__ import annotations

from typing import Any

from cobre_shm.kernels import context
from cobre_shm.kernels.copying import call_reduction, move_bytes
from cobre_shm.kernels.failing import COPY_IN, COPY_OUT, REDUCE, copy_or_fail, fail_at
from cobre_shm.kernels.jit import inlined
from cobre_shm.kernels.rounds import end, observe, publish, recorded_wait, slot, take_slots
from cobre_shm.kernels.switches import PIECE_BYTES, chain_chunk, is_streaming
from cobre_shm.kernels.waiting import begin_wait, publish_steps, wait_steps

__all__ = ["chain"]

# Of a block. A part is worked on by one rank at a time, so fewer would leave cores idle.
_PARTS_PER_RANK = 2
# Blocks after which Python looks for signals.
_BLOCKS_PER_CALL = 16


@inlined
def chain(ctx: Any, send: int, recv: int, nbytes: int, item_bytes: int, reduction: int) -> int:
    """Reduce ``nbytes`` at ``send`` to ``recv``; resumable."""
    chunk = chain_chunk(ctx, _PARTS_PER_RANK)
    parts = (nbytes + chunk - 1) // chunk
    per_block = min(parts, _PARTS_PER_RANK * ctx[context.SIZE])
    # ROUND counts the steps of all blocks: 0, the round; 1..per_block, A; then as many of B.
    while True:
        first = ctx[context.ROUND] // (1 + 2 * per_block) * per_block
        step = ctx[context.ROUND] % (1 + 2 * per_block)
        if step == 0:
            if ctx[context.STAGE] == context.DEPOSIT:
                if first == 0:
                    take_slots(ctx, _PARTS_PER_RANK * chunk)
                status = publish(ctx)
                if status != context.READY:
                    return status
            status = observe(ctx)
            if status != context.READY:
                return status
            if first >= parts:
                ctx[context.STEPS] += parts
                return end(ctx, nbytes)
        else:
            is_adding = step <= per_block
            within = step - 1 if is_adding else step - 1 - per_block
            if first + within < parts:
                status = _part(
                    ctx, first, within, is_adding, chunk, send, recv, nbytes, item_bytes, reduction
                )
                if status != context.READY:
                    return status
        ctx[context.ROUND] += 1
        ctx[context.STAGE] = context.DEPOSIT
        begin_wait(ctx)
        if step == 0 and first > 0 and first % (_BLOCKS_PER_CALL * per_block) == 0:
            return context.PENDING


@inlined
def _part(
    ctx: Any,
    first: int,
    within: int,
    is_adding: bool,
    chunk: int,
    send: int,
    recv: int,
    nbytes: int,
    item_bytes: int,
    reduction: int,
) -> int:
    """Part ``within`` of the block that begins with part ``first``."""
    size = ctx[context.SIZE]
    rank = ctx[context.RANK]
    start = (first + within) * chunk
    length = min(chunk, nbytes - start)
    target = ctx[context.STEPS] + first + within + 1
    place = slot(ctx, within // _PARTS_PER_RANK) + within % _PARTS_PER_RANK * chunk
    is_last = rank == size - 1
    streams = is_streaming(ctx, nbytes)
    if is_adding:
        if rank == 0:
            copy_or_fail(ctx, COPY_IN, place, send + start, length)
        else:
            status = _wait(ctx, rank - 1, target)
            if status != context.READY:
                return status
            result = recv + start if is_last else 0
            _add(ctx, place, send + start, result, length, item_bytes, reduction, streams)
        publish_steps(ctx, target)
    elif not is_last:
        status = _wait(ctx, size - 1, target)
        if status != context.READY:
            return status
        move_bytes(recv + start, place, length, streams)
        fail_at(ctx, COPY_OUT)
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
    result: int,
    nbytes: int,
    item_bytes: int,
    reduction: int,
    streams: bool,
) -> None:
    """Reduce the own values into the accumulator; the last rank, with ``result``, copies it out."""
    at = 0
    while at < nbytes:
        piece = min(PIECE_BYTES, nbytes - at)
        place = accumulator + at
        call_reduction(reduction, place, place, values + at, piece // item_bytes)
        fail_at(ctx, REDUCE)
        if result != 0:
            move_bytes(result + at, place, piece, streams)
        at += PIECE_BYTES
