"""Zero copy: collectives that read the peers' own buffers, where these are shared arrays.

A buffer in the shared heap lies at an offset of its rank's area, and the areas are mapped by all.
In a group that has a heap, a large collective begins with a *probe*: a round whose lines carry

    word 0    1 + offset of the send buffer in this rank's area, or 0: it is private
    word 1    the same of the receive buffer

After it all ranks know the same of all buffers and choose alike. Where a rank's buffers are not
shared as an algorithm needs it, the one that copies through slots follows, for one round more.

Visible: what a rank wrote into its buffer before the call precedes its P of the probe.

Reuse: a buffer belongs to its program again when the call returns, so every algorithm here ends
with a round, whose P each rank stores after its last access to the buffers of others.
"""

from __future__ import annotations

from typing import Any

from cobre_shm import layout, tuning
from cobre_shm.kernels import context
from cobre_shm.kernels.atomics import load_plain, store_plain
from cobre_shm.kernels.copying import call_reduction, copy_bytes, move_bytes
from cobre_shm.kernels.failing import COPY_OUT, REDUCE, fail_at
from cobre_shm.kernels.jit import inlined
from cobre_shm.kernels.parts import part_start
from cobre_shm.kernels.rounds import end, observe, own_line, publish
from cobre_shm.kernels.switches import PIECE_BYTES, is_streaming
from cobre_shm.kernels.waiting import arrival_line

__all__ = [
    "ALL_RECV",
    "ALL_SEND",
    "APART",
    "ending_round",
    "is_shared",
    "is_shared_allreduce",
    "probe",
    "reduce_from",
    "shared_allreduce",
    "source",
]

# What a probe found, as bits.
ALL_SEND, ALL_RECV, APART = 1, 2, 4


@inlined
def _word_of(ctx: Any, address: int) -> int:
    stride = ctx[context.HEAP_STRIDE]
    offset = address - ctx[context.HEAP] - ctx[context.RANK] * stride
    return offset + 1 if offset >= 0 and offset < stride else 0


@inlined
def source(ctx: Any, rank: int) -> int:
    """Address of a rank's send buffer, valid after a probe that found it shared."""
    return load_plain(ctx[context.SOURCES] + 16 * rank)


@inlined
def _target(ctx: Any, rank: int) -> int:
    return load_plain(ctx[context.SOURCES] + 16 * rank + 8)


@inlined
def probe(ctx: Any, send: int, recv: int) -> int:
    """The first round of a collective that may do without copies; READY at once when done."""
    if ctx[context.PROBED]:
        return context.READY
    if ctx[context.STAGE] == context.DEPOSIT:
        line = own_line(ctx) + layout.INLINE
        store_plain(line, _word_of(ctx, send))
        store_plain(line + 8, _word_of(ctx, recv))
        status = publish(ctx)
        if status != context.READY:
            return status
    status = observe(ctx)
    if status != context.READY:
        return status
    found = ALL_SEND | ALL_RECV | APART
    for rank in range(ctx[context.SIZE]):
        line = arrival_line(ctx, ctx[context.EPOCH], rank) + layout.INLINE
        area = ctx[context.HEAP] + rank * ctx[context.HEAP_STRIDE] - 1
        ours, theirs = load_plain(line), load_plain(line + 8)
        if ours == 0:
            found &= ~ALL_SEND
        if theirs == 0:
            found &= ~ALL_RECV
        if ours == theirs:
            found &= ~APART
        store_plain(ctx[context.SOURCES] + 16 * rank, area + ours)
        store_plain(ctx[context.SOURCES] + 16 * rank + 8, area + theirs)
    ctx[context.PROBED] = 1
    ctx[context.FOUND] = found
    ctx[context.STAGE] = context.DEPOSIT
    return context.READY


@inlined
def ending_round(ctx: Any, nbytes: int) -> int:
    """The last round of a collective without copies; resumable."""
    if ctx[context.STAGE] == context.DEPOSIT:
        status = publish(ctx)
        if status != context.READY:
            return status
    status = observe(ctx)
    if status != context.READY:
        return status
    return end(ctx, nbytes)


@inlined
def is_shared(ctx: Any, rank: int) -> bool:
    """Whether the probe found this rank's send buffer shared."""
    area = ctx[context.HEAP] + rank * ctx[context.HEAP_STRIDE]
    return source(ctx, rank) >= area


@inlined
def reduce_from(
    ctx: Any,
    destination: int,
    offset: int,
    nbytes: int,
    item_bytes: int,
    reduction: int,
    streams: bool,
    apart: bool,
) -> None:
    """Reduce ``nbytes`` at ``offset`` of all ranks' send buffers, in rank order.

    ``apart``: the destination is none of them. Otherwise, and past the caches, each piece is
    made in private memory first.
    """
    size = ctx[context.SIZE]
    done = 0
    while done < nbytes:
        piece = min(PIECE_BYTES, nbytes - done)
        at = offset + done
        place = destination + done if apart and not streams else ctx[context.SCRATCH]
        if size == 1:
            copy_bytes(place, source(ctx, 0) + at, piece)
        else:
            count = piece // item_bytes
            call_reduction(reduction, place, source(ctx, 0) + at, source(ctx, 1) + at, count)
            for rank in range(2, size):
                fail_at(ctx, REDUCE)
                call_reduction(reduction, place, place, source(ctx, rank) + at, count)
        if place != destination + done:
            move_bytes(destination + done, place, piece, streams)
        done += piece


@inlined
def is_shared_allreduce(ctx: Any) -> bool:
    """Whether the buffers that a probe found allow an allreduce without copies through slots."""
    found = ctx[context.FOUND]
    if found & ALL_SEND == 0:
        return False
    if found & ALL_RECV != 0:
        return True
    # Everybody reads everything: for few ranks, and only where nobody writes what others read.
    return found & APART != 0 and ctx[context.SIZE] <= ctx[context.TUNING + tuning.STREAM_RANKS]


@inlined
def shared_allreduce(ctx: Any, recv: int, count: int, item_bytes: int, reduction: int) -> int:
    """Allreduce of shared buffers; resumable.

    With shared receive buffers each rank reduces its part, and copies those of the others from
    where they have put them. A rank reads of a send buffer only its own part, and writes of its
    receive buffer in the first step only its own part: so in place is as good. Otherwise each
    rank reduces everything.
    """
    nbytes = count * item_bytes
    size = ctx[context.SIZE]
    rank = ctx[context.RANK]
    streams = is_streaming(ctx, nbytes)
    apart = ctx[context.FOUND] & APART != 0
    if ctx[context.FOUND] & ALL_RECV == 0 or size == 1:
        if ctx[context.ROUND] == 0:
            reduce_from(ctx, recv, 0, nbytes, item_bytes, reduction, streams, apart)
            ctx[context.ROUND] = 1
        return ending_round(ctx, nbytes)
    if ctx[context.ROUND] == 0:
        low = part_start(count, item_bytes, size, rank) * item_bytes
        high = part_start(count, item_bytes, size, rank + 1) * item_bytes
        reduce_from(ctx, recv + low, low, high - low, item_bytes, reduction, streams, apart)
        ctx[context.ROUND] = 1
    if ctx[context.ROUND] == 1:
        if ctx[context.STAGE] == context.DEPOSIT:
            status = publish(ctx)
            if status != context.READY:
                return status
        status = observe(ctx)
        if status != context.READY:
            return status
        for step in range(1, size):
            peer = rank + step
            if peer >= size:
                peer -= size
            low = part_start(count, item_bytes, size, peer) * item_bytes
            high = part_start(count, item_bytes, size, peer + 1) * item_bytes
            move_bytes(recv + low, _target(ctx, peer) + low, high - low, streams)
            fail_at(ctx, COPY_OUT)
        ctx[context.ROUND] = 2
        ctx[context.STAGE] = context.DEPOSIT
    return ending_round(ctx, nbytes)
