"""Allreduce, five ways through slots. Each reduces an element in rank order, so the bits agree.

- *inline*: up to 48 bytes travel in the line of the arrival word; everybody reduces everything.
- *direct*: one round with slots; everybody reduces everything.
- *streaming*: such rounds, chunk after chunk, for few ranks. While chunk k is reduced, chunk k + 1
  goes into the slot of the coming epoch.
- *scatter*: reduce-scatter and all-gather, chunk after chunk. A chunk is divided into as many
  parts as there are ranks. In round k a slot carries the rank's values of chunk k, and in the
  place of its own part, which nobody else needs, the reduced own part of chunk k - 1. So one
  round serves the all-gather of one chunk and the reduce-scatter of the next, and nobody copies
  its own part in or out.
- *chain*: one accumulator goes from rank to rank, see ``chain.py``.

Buffers that the peers can read need no slots: ``sharing.py``.

Which one: ``switches.py``.
"""

from __future__ import annotations

from typing import Any

from cobre_shm import layout
from cobre_shm.kernels import context
from cobre_shm.kernels.chain import chain
from cobre_shm.kernels.choices import copy_out, deposit
from cobre_shm.kernels.copying import call_reduction, copy_bytes, move_bytes
from cobre_shm.kernels.failing import COPY_IN, COPY_OUT, REDUCE, copy_or_fail, fail_at
from cobre_shm.kernels.jit import inlined
from cobre_shm.kernels.parts import part_start, reduce_part
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
    allreduce_without_slots,
    can_do_without_slots,
    probe,
)
from cobre_shm.kernels.switches import (
    PIECE_BYTES,
    begins_with_probe,
    direct_chunk,
    is_chain,
    is_direct,
    is_streaming,
    scatter_chunk,
    streams_directly,
)
from cobre_shm.kernels.waiting import arrival_line

__all__ = ["allreduce"]

# Measured with two ranks on own cores: 64 KiB at once take 0.95 of the time of 8 KiB at once.
_PAIR_PIECE_BYTES = 65536


@inlined
def allreduce(
    ctx: Any,
    resume: int,
    what: int,
    tag: int,
    count: int,
    send: int,
    recv: int,
    item_bytes: int,
    reduction: int,
) -> int:
    """Reduce ``count`` elements at ``send`` to ``recv``; ``reduction`` is a kernel's address."""
    nbytes = count * item_bytes
    if not resume:
        status = begin(ctx, what, tag, count, nbytes)
        if status != context.READY:
            return status
    if nbytes <= layout.INLINE_BYTES:
        return _inline(ctx, send, recv, count, item_bytes, reduction)
    if begins_with_probe(ctx, what, nbytes):
        status = probe(ctx, what, nbytes, send, recv)
        if status != context.READY:
            return status
        if can_do_without_slots(ctx):
            return allreduce_without_slots(ctx, recv, count, item_bytes, reduction)
    if is_direct(ctx, nbytes):
        return _direct(ctx, send, recv, count, item_bytes, reduction)
    if is_chain(ctx, nbytes):
        return chain(ctx, send, recv, nbytes, item_bytes, reduction)
    if streams_directly(ctx):
        return _streaming(ctx, send, recv, nbytes, item_bytes, reduction)
    return _scatter(ctx, send, recv, count, item_bytes, reduction)


@inlined
def _reduce_ranks(
    ctx: Any,
    destination: int,
    first: int,
    stride: int,
    own: int,
    count: int,
    item_bytes: int,
    reduction: int,
) -> None:
    """Reduce in rank order the elements of all ranks, at ``first``, ``first + stride``, ...

    Those of this rank are at ``own``.
    """
    size = ctx[context.SIZE]
    rank = ctx[context.RANK]
    if size == 1:
        copy_bytes(destination, own, count * item_bytes)
        return
    a = own if rank == 0 else first
    for other in range(1, size):
        b = own if other == rank else first + other * stride
        call_reduction(reduction, destination, a, b, count)
        fail_at(ctx, REDUCE)
        a = destination


@inlined
def _piece_bytes(ctx: Any) -> int:
    """Bytes to reduce at once: with more ranks than two, the result of the last is read again."""
    return PIECE_BYTES if ctx[context.SIZE] > 2 else _PAIR_PIECE_BYTES


@inlined
def _inline(ctx: Any, send: int, recv: int, count: int, item_bytes: int, reduction: int) -> int:
    if ctx[context.STAGE] == context.DEPOSIT:
        copy_or_fail(ctx, COPY_IN, own_line(ctx) + layout.INLINE, send, count * item_bytes)
        status = publish(ctx)
        if status != context.READY:
            return status
        if send == recv:
            # The own values would be overwritten by those of the ranks before.
            copy_bytes(ctx[context.SCRATCH], send, count * item_bytes)
    status = observe(ctx)
    if status != context.READY:
        return status
    first = arrival_line(ctx, ctx[context.EPOCH], 0) + layout.INLINE
    own = ctx[context.SCRATCH] if send == recv else send
    _reduce_ranks(ctx, recv, first, layout.CONTROL_BYTES, own, count, item_bytes, reduction)
    return end(ctx, 0)


@inlined
def _direct(ctx: Any, send: int, recv: int, count: int, item_bytes: int, reduction: int) -> int:
    if ctx[context.STAGE] == context.DEPOSIT:
        take_slots(ctx, count * item_bytes)
        place = coming_slot(ctx, ctx[context.RANK])
        deposit(ctx, COPY_IN, place, send, count * item_bytes)
        status = publish(ctx)
        if status != context.READY:
            return status
    status = observe(ctx)
    if status != context.READY:
        return status
    prefetch_coming_slot(ctx, count * item_bytes)
    first = slot(ctx, 0)
    stride = ctx[context.RING_BYTES]
    per_piece = _piece_bytes(ctx) // item_bytes
    done = 0
    while done < count:
        elements = min(per_piece, count - done)
        at = done * item_bytes
        own = send + at
        if send == recv:
            # As above.
            own = ctx[context.SCRATCH]
            copy_bytes(own, send + at, elements * item_bytes)
        _reduce_ranks(ctx, recv + at, first + at, stride, own, elements, item_bytes, reduction)
        done += elements
    return end(ctx, count * item_bytes)


@inlined
def _streaming(ctx: Any, send: int, recv: int, nbytes: int, item_bytes: int, reduction: int) -> int:
    rank = ctx[context.RANK]
    stride = ctx[context.RING_BYTES]
    streams = is_streaming(ctx, nbytes)
    # In place, recv still holds what goes into the slot.
    by_scratch = streams or send == recv
    piece = (PIECE_BYTES if by_scratch else _piece_bytes(ctx)) // item_bytes * item_bytes
    chunk = direct_chunk(ctx) // item_bytes * item_bytes
    scratch = ctx[context.SCRATCH]
    streams_in = ctx[context.STREAMS_IN] != 0
    while True:
        start = ctx[context.ROUND] * chunk
        if ctx[context.STAGE] == context.DEPOSIT:
            if start == 0:
                take_slots(ctx, min(chunk, nbytes))
                deposit(ctx, COPY_IN, coming_slot(ctx, rank), send, min(chunk, nbytes))
            status = publish(ctx)
            if status != context.READY:
                return status
        status = observe(ctx)
        if status != context.READY:
            return status
        length = min(chunk, nbytes - start)
        ahead = min(chunk, nbytes - start - chunk)
        first = slot(ctx, 0)
        if ahead > 0:
            take_slots(ctx, ahead)
        coming = coming_slot(ctx, rank)
        at = 0
        while at < length:
            step = min(piece, length - at)
            elements = step // item_bytes
            own = send + start + at
            place = scratch if by_scratch else recv + start + at
            _reduce_ranks(ctx, place, first + at, stride, own, elements, item_bytes, reduction)
            if at < ahead:
                # Before recv is written: in place it is the same memory further on.
                source = send + start + chunk + at
                move_bytes(coming + at, source, min(piece, ahead - at), streams_in)
            if by_scratch:
                move_bytes(recv + start + at, scratch, step, streams)
            fail_at(ctx, COPY_OUT)
            at += piece
        if start + chunk >= nbytes:
            return end(ctx, nbytes)
        if next_round(ctx):
            return context.PENDING


@inlined
def _scatter(ctx: Any, send: int, recv: int, count: int, item_bytes: int, reduction: int) -> int:
    size = ctx[context.SIZE]
    rank = ctx[context.RANK]
    streams = is_streaming(ctx, count * item_bytes)
    # Chunks of equal length, and parts at the same places in all of them.
    most = scatter_chunk(ctx, count * item_bytes) // item_bytes
    chunks = (count + most - 1) // most
    chunk = (count + chunks - 1) // chunks
    own_first = part_start(chunk, item_bytes, size, rank)
    own_stop = part_start(chunk, item_bytes, size, rank + 1)
    while True:
        k = ctx[context.ROUND]
        before = (k - 1) * chunk  # first element of the chunk whose parts are gathered
        if ctx[context.STAGE] == context.DEPOSIT:
            take_slots(ctx, chunk * item_bytes)
            coming = coming_slot(ctx, rank)
            if k < chunks:
                elements = min(chunk, count - k * chunk)
                low, high = min(own_first, elements), min(own_stop, elements)
                source = send + k * chunk * item_bytes
                deposit(ctx, COPY_IN, coming, source, low * item_bytes)
                move_bytes(
                    coming + high * item_bytes,
                    source + high * item_bytes,
                    (elements - high) * item_bytes,
                    ctx[context.STREAMS_IN] != 0,
                )
            if k > 0:
                elements = min(chunk, count - before)
                low, high = min(own_first, elements), min(own_stop, elements)
                reduce_part(
                    ctx,
                    coming + low * item_bytes,
                    recv + (before + low) * item_bytes,
                    slot(ctx, 0) + low * item_bytes,
                    send + (before + low) * item_bytes,
                    high - low,
                    item_bytes,
                    reduction,
                    streams,
                )
            status = publish(ctx)
            if status != context.READY:
                return status
        status = observe(ctx)
        if status != context.READY:
            return status
        if k > 0:
            elements = min(chunk, count - before)
            for step in range(1, size):
                peer = rank + step
                if peer >= size:
                    peer -= size
                low = min(elements, part_start(chunk, item_bytes, size, peer))
                high = min(elements, part_start(chunk, item_bytes, size, peer + 1))
                source = slot(ctx, peer) + low * item_bytes
                destination = recv + (before + low) * item_bytes
                copy_out(ctx, destination, source, (high - low) * item_bytes, streams)
        if k == chunks:
            return end(ctx, count * item_bytes)
        if next_round(ctx):
            return context.PENDING
