"""Allgatherv: every rank's slot carries a chunk of its block; small blocks are in the lines.

Chunk k of all blocks is copied out while chunk k + 1 of the own block goes into the slot of the
coming epoch, piece by piece, so that reads and writes of main memory overlap; each piece of the own
block also goes to its place in ``recv`` while it is in the first-level cache.
"""

from __future__ import annotations

from typing import Any

from cobre_shm import layout
from cobre_shm.kernels import context
from cobre_shm.kernels.atomics import load_plain, store_plain
from cobre_shm.kernels.choices import copy_out, deposit, do_not_measure
from cobre_shm.kernels.copying import copy_bytes, move_bytes
from cobre_shm.kernels.failing import COPY_IN, COPY_OUT, copy_or_fail, fail_at
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
    SENDS_READABLE,
    ending_round,
    fetch_from,
    probe,
)
from cobre_shm.kernels.switches import PIECE_BYTES, begins_with_probe, gather_chunk, is_streaming
from cobre_shm.kernels.waiting import arrival_line

__all__ = ["allgatherv"]


@inlined
def _hash_of(counts: int, size: int) -> int:
    """32 bits that stand for all counts."""
    value = size
    for rank in range(size):
        value = (value ^ load_plain(counts + 8 * rank)) * 0x2545F4914F6CDD1D
        value ^= (value >> 29) & 0x7FFFFFFFF
    return value & 0xFFFFFFFF


@inlined
def _pack(counts: int, displs: int, size: int) -> None:
    """Write where blocks begin that follow each other."""
    start = 0
    for rank in range(size):
        store_plain(displs + 8 * rank, start)
        start += load_plain(counts + 8 * rank)


@inlined
def allgatherv(
    ctx: Any,
    resume: int,
    what: int,
    tag: int,
    count: int,
    send: int,
    recv: int,
    counts: int,
    displs: int,
    item_bytes: int,
) -> int:
    """Copy rank r's ``counts[r]`` elements to element ``displs[r]`` of ``recv``.

    ``counts`` and ``displs`` are addresses of ``size`` 64-bit integers; ``displs`` 0: the packed
    layout.
    """
    size = ctx[context.SIZE]
    rank = ctx[context.RANK]
    if not resume:
        if what & 0xFF == layout.ALLGATHERV:
            what |= _hash_of(counts, size) << 32
        status = begin(ctx, what, tag, count, count * item_bytes)
        if status != context.READY:
            return status
    if displs == 0:
        # Room of the communicator, which is this collective's alone from ``begin`` on.
        displs = ctx[context.DISPLS]
        if not resume:
            _pack(counts, displs, size)
    largest = 0
    for r in range(size):
        largest = max(largest, load_plain(counts + 8 * r) * item_bytes)
    own = recv + load_plain(displs + 8 * rank) * item_bytes
    own_bytes = load_plain(counts + 8 * rank) * item_bytes
    if largest <= layout.INLINE_BYTES:
        return _inline(ctx, send, recv, own, own_bytes, counts, displs, item_bytes)
    if begins_with_probe(ctx, what, count * item_bytes):
        status = probe(ctx, what, count * item_bytes, send, 0)
        if status != context.READY:
            return status
        if ctx[context.FOUND] & SENDS_READABLE:
            return _without_slots(ctx, send, recv, counts, displs, count, item_bytes)
    chunk = gather_chunk(ctx, count * item_bytes)
    streams = is_streaming(ctx, count * item_bytes)
    while True:
        start = ctx[context.ROUND] * chunk
        if ctx[context.STAGE] == context.DEPOSIT:
            if start == 0:
                take_slots(ctx, min(chunk, largest))
                deposit(ctx, COPY_IN, coming_slot(ctx, rank), send, min(chunk, own_bytes))
            status = publish(ctx)
            if status != context.READY:
                return status
            if start == 0 and own != send:
                # While the others arrive. In place the block is there already.
                move_bytes(own, send, min(chunk, own_bytes), streams)
        status = observe(ctx)
        if status != context.READY:
            return status
        prefetch_coming_slot(ctx, own_bytes)
        if start + chunk < largest:
            take_slots(ctx, min(chunk, largest - start - chunk))
        coming = coming_slot(ctx, rank)
        for step in range(1, size):
            peer = rank + step
            if peer >= size:
                peer -= size
            length = min(chunk, load_plain(counts + 8 * peer) * item_bytes - start)
            destination = recv + load_plain(displs + 8 * peer) * item_bytes + start
            ahead = min(chunk, own_bytes - start - chunk)
            if step < size - 1 or ahead <= 0:
                copy_out(ctx, destination, slot(ctx, peer), length, streams)
            else:
                _copy_out_and_in(
                    destination,
                    slot(ctx, peer),
                    length,
                    own + start + chunk,
                    coming,
                    send + start + chunk,
                    ahead,
                    streams,
                    ctx[context.STREAMS_IN] != 0,
                )
                fail_at(ctx, COPY_OUT)
        if size == 1 and start + chunk < own_bytes and own != send:
            move_bytes(
                own + start + chunk,
                send + start + chunk,
                min(chunk, own_bytes - start - chunk),
                streams,
            )
        if start + chunk >= largest:
            return end(ctx, count * item_bytes)
        if next_round(ctx):
            return context.PENDING


@inlined
def _without_slots(
    ctx: Any, send: int, recv: int, counts: int, displs: int, count: int, item_bytes: int
) -> int:
    """Copy from the peers' own buffers. In place too: a block is written by its rank alone."""
    size = ctx[context.SIZE]
    rank = ctx[context.RANK]
    streams = is_streaming(ctx, count * item_bytes)
    while ctx[context.ROUND] < size:
        peer = rank + ctx[context.ROUND]
        if peer >= size:
            peer -= size
        destination = recv + load_plain(displs + 8 * peer) * item_bytes
        if destination != send or peer != rank:
            nbytes = load_plain(counts + 8 * peer) * item_bytes
            status = fetch_from(ctx, peer, destination, nbytes, streams)
            if status != context.READY:
                return status
        ctx[context.ROUND] += 1
    return ending_round(ctx, count * item_bytes)


@inlined
def _copy_out_and_in(
    destination: int,
    source: int,
    nbytes: int,
    own: int,
    coming: int,
    send: int,
    ahead: int,
    streams: bool,
    streams_in: bool,
) -> None:
    """Copy a peer's chunk out and the own next one in, piece by piece in turn."""
    at = 0
    while at < nbytes or at < ahead:
        move_bytes(destination + at, source + at, min(PIECE_BYTES, nbytes - at), streams)
        piece = min(PIECE_BYTES, ahead - at)
        if piece > 0:
            move_bytes(coming + at, send + at, piece, streams_in)
            if own != send:
                move_bytes(own + at, send + at, piece, streams)
        at += PIECE_BYTES


@inlined
def _inline(
    ctx: Any,
    send: int,
    recv: int,
    own: int,
    own_bytes: int,
    counts: int,
    displs: int,
    item_bytes: int,
) -> int:
    """One round; the blocks come with the arrival words."""
    size = ctx[context.SIZE]
    rank = ctx[context.RANK]
    if ctx[context.STAGE] == context.DEPOSIT:
        do_not_measure(ctx)
        copy_or_fail(ctx, COPY_IN, own_line(ctx) + layout.INLINE, send, own_bytes)
        status = publish(ctx)
        if status != context.READY:
            return status
        if own != send:
            copy_bytes(own, send, own_bytes)  # while the others arrive
    status = observe(ctx)
    if status != context.READY:
        return status
    epoch = ctx[context.EPOCH]
    total = 0
    for peer in range(size):
        nbytes = load_plain(counts + 8 * peer) * item_bytes
        total += nbytes
        if peer != rank:
            destination = recv + load_plain(displs + 8 * peer) * item_bytes
            line = arrival_line(ctx, epoch, peer)
            copy_or_fail(ctx, COPY_OUT, destination, line + layout.INLINE, nbytes)
    return end(ctx, total)
