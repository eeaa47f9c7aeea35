"""The collectives, built from one step: the exchange round.

A round with epoch e = 1, 2, 3, ... (one sequence per communicator, over all collectives):

    W  slot[e & 1][me], call[e & 1][me] = ...     plain stores
    P  arrived[me] = e                            waiting.publish_arrival    <SYNC arrived>
    O  for each p: wait until arrived[p] >= e     waiting.wait_all_arrived   <SYNC arrived>
    R  read slot[e & 1][p], call[e & 1][p]        plain loads

Visible: O on p reads what p's P stored (or a later one of p), so p's W precedes my R.

Reuse: slot[e & 1] and call[e & 1] were last read by others in R of epoch e-2. I write them for e
only after O of e-1, when every p had published e-1, which it does only after its own R of e-2.
Release keeps those reads before p's store, acquire keeps my writes after my load. One slot would
not do: a slow peer may still be in R of e-1 when I write for e. More than two are not needed,
because nobody can be two epochs ahead: e+1 needs my e.

This holds for any sequence of rounds, whatever they carry, so every algorithm below may use the
slot of the coming epoch after its wait, and none needs a buffer or a flag of its own.

The first round of each collective carries the call words. Every rank compares those of all ranks
with its own before it uses any payload; lengths, and so the number of rounds, are equal from
there on. A rank that sees a mismatch publishes nothing more, so the words stay readable.

Large payloads go in chunks of one slot. ``allreduce`` of one small chunk: everybody reduces
everything (one round). Otherwise reduce-scatter and all-gather: in the second round of each chunk
a rank's slot carries its reduced part. In both, an element is reduced in rank order.

Relies on: 8-byte aligned words, one writer per arrived word, epochs never wrap 63 bits.
Checked: interleavings by tests/unit/test_protocol_model.py, real cores by
tests/stress/test_exchange.py.
"""

from __future__ import annotations

from typing import Any

from cobre_shm import layout
from cobre_shm.kernels import context
from cobre_shm.kernels.atomics import load_plain, store_plain, store_release
from cobre_shm.kernels.copying import call_reduction, copy_bytes
from cobre_shm.kernels.failing import COPY_IN, COPY_OUT, REDUCE, copy_or_fail, fail_at
from cobre_shm.kernels.jit import compiling, entry_point, inlined
from cobre_shm.kernels.system import monotonic_ns
from cobre_shm.kernels.waiting import publish_arrival, wait_all_arrived

__all__ = ["allgatherv", "allreduce", "barrier", "broadcast"]

# Above this the reads of all ranks' slots by all ranks cost more than a second round; the
# crossover was between 2 and 8 KiB for 2 to 8 ranks.
DIRECT_BYTES = 4096
# Rounds after which a large collective lets Python look for signals: 8 MiB at 128 KiB slots.
ROUNDS_PER_CALL = 64
# The accumulator part that stays in the first-level cache while the ranks' slots stream by.
BLOCK_BYTES = 8192


@inlined
def _slot(ctx: Any, epoch: int, rank: int) -> int:
    return ctx[context.SLOTS] + (2 * rank + (epoch & 1)) * ctx[context.SLOT_BYTES]


@inlined
def _call(ctx: Any, epoch: int, rank: int) -> int:
    block = ctx[context.CONTROL] + rank * layout.CONTROL_BYTES
    return block + layout.CALL + (epoch & 1) * layout.CALL_BYTES


@inlined
def _begin(ctx: Any, what: int, tag: int, count: int) -> None:
    """Write the call words for the coming epoch, and the recorder's entry."""
    own = _call(ctx, ctx[context.EPOCH] + 1, ctx[context.RANK])
    store_plain(own, what)
    store_plain(own + 8, tag)
    store_plain(own + 16, count)
    ctx[context.SEQUENCE] += 1
    sequence = ctx[context.SEQUENCE]
    entry = ctx[context.RECORDER] + ((sequence - 1) % layout.RECORDER_ENTRIES) * layout.ENTRY_BYTES
    ctx[context.ENTRY] = entry
    # Each store releases, so that readers see them in this order, the sequence number first.
    store_release(entry + layout.ENTRY_SEQUENCE, sequence)
    store_release(entry + layout.ENTRY_CALL, what)
    store_release(entry + layout.ENTRY_CALL + 8, tag)
    store_release(entry + layout.ENTRY_CALL + 16, count)
    store_release(entry + layout.ENTRY_START, monotonic_ns())
    store_release(entry + layout.ENTRY_WAITED, 0)
    store_release(entry + layout.ENTRY_END, 0)
    store_release(entry + layout.ENTRY_STATUS, context.PENDING)
    own_block = ctx[context.CONTROL] + ctx[context.RANK] * layout.CONTROL_BYTES
    store_release(own_block + layout.RECORDED, sequence)  # <SYNC recorded>
    ctx[context.ROUND] = 0
    ctx[context.STAGE] = context.DEPOSIT


@inlined
def _end(ctx: Any) -> int:
    entry = ctx[context.ENTRY]
    store_release(entry + layout.ENTRY_END, monotonic_ns())
    store_release(entry + layout.ENTRY_STATUS, context.READY)
    ctx[context.STAGE] = context.IDLE
    return context.READY


@inlined
def _publish(ctx: Any) -> int:
    status = publish_arrival(ctx)
    if status == context.READY:
        ctx[context.STAGE] = context.WAIT
    return status


@inlined
def _observe(ctx: Any) -> int:
    """Wait for the round; in a collective's first, compare the calls of all ranks."""
    before = ctx[context.YIELD_SINCE]
    status = wait_all_arrived(ctx)
    if ctx[context.YIELD_SINCE] != 0:
        # Waits that ended while spinning are too short to be worth two looks at the clock.
        now = monotonic_ns()
        since = ctx[context.YIELD_SINCE] if before == 0 else ctx[context.WAIT_SINCE]
        entry = ctx[context.ENTRY]
        waited = load_plain(entry + layout.ENTRY_WAITED)
        store_plain(entry + layout.ENTRY_WAITED, waited + now - since)
        ctx[context.WAIT_SINCE] = now
    if status == context.READY and ctx[context.ROUND] == 0 and not _calls_agree(ctx):
        return context.MISMATCH
    return status


@inlined
def _calls_agree(ctx: Any) -> bool:
    epoch = ctx[context.EPOCH]
    own = _call(ctx, epoch, ctx[context.RANK])
    agree = True
    for rank in range(ctx[context.SIZE]):
        call = _call(ctx, epoch, rank)
        for word in range(layout.CALL_WORDS):
            agree = agree and load_plain(call + 8 * word) == load_plain(own + 8 * word)
    return agree


@inlined
def _next_round(ctx: Any) -> bool:
    """Go on to the next round; whether to let Python look for signals before it."""
    ctx[context.ROUND] += 1
    ctx[context.STAGE] = context.DEPOSIT
    return ctx[context.ROUND] % ROUNDS_PER_CALL == 0


with compiling():

    @entry_point("int64(int64[::1], int64, int64, int64)")
    def barrier(ctx: Any, what: int, tag: int, count: int) -> int:
        """Enter and wait for all."""
        if ctx[context.STAGE] == context.IDLE:
            _begin(ctx, what, tag, count)
            status = _publish(ctx)
            if status != context.READY:
                return status
        status = _observe(ctx)
        if status != context.READY:
            return status
        return _end(ctx)

    @entry_point("int64(int64[::1], int64, int64, int64, int64, int64, int64)")
    def broadcast(
        ctx: Any, what: int, tag: int, count: int, root: int, buf: int, nbytes: int
    ) -> int:
        """Copy ``nbytes`` at ``buf`` of ``root`` to ``buf`` everywhere."""
        if ctx[context.STAGE] == context.IDLE:
            _begin(ctx, what, tag, count)
        slot_bytes = ctx[context.SLOT_BYTES]
        while True:
            start = ctx[context.ROUND] * slot_bytes
            length = min(slot_bytes, nbytes - start)
            if ctx[context.STAGE] == context.DEPOSIT:
                if ctx[context.RANK] == root:
                    slot = _slot(ctx, ctx[context.EPOCH] + 1, root)
                    copy_or_fail(ctx, COPY_IN, slot, buf + start, length)
                status = _publish(ctx)
                if status != context.READY:
                    return status
            status = _observe(ctx)
            if status != context.READY:
                return status
            if ctx[context.RANK] != root:
                slot = _slot(ctx, ctx[context.EPOCH], root)
                copy_or_fail(ctx, COPY_OUT, buf + start, slot, length)
            if start + slot_bytes >= nbytes:
                return _end(ctx)
            if _next_round(ctx):
                return context.PENDING

    @entry_point(
        "int64(int64[::1], int64, int64, int64, int64, int64, int64[::1], int64[::1], int64)"
    )
    def allgatherv(
        ctx: Any,
        what: int,
        tag: int,
        count: int,
        send: int,
        recv: int,
        counts: Any,
        displs: Any,
        item_bytes: int,
    ) -> int:
        """Copy rank r's ``counts[r]`` elements to element ``displs[r]`` of ``recv``."""
        if ctx[context.STAGE] == context.IDLE:
            _begin(ctx, what, tag, count)
        slot_bytes = ctx[context.SLOT_BYTES]
        size = ctx[context.SIZE]
        rank = ctx[context.RANK]
        largest = 0
        for r in range(size):
            largest = max(largest, counts[r] * item_bytes)
        own = recv + displs[rank] * item_bytes
        while True:
            start = ctx[context.ROUND] * slot_bytes
            if ctx[context.STAGE] == context.DEPOSIT:
                length = min(slot_bytes, counts[rank] * item_bytes - start)
                if length > 0:
                    slot = _slot(ctx, ctx[context.EPOCH] + 1, rank)
                    copy_or_fail(ctx, COPY_IN, slot, send + start, length)
                status = _publish(ctx)
                if status != context.READY:
                    return status
                # While the others arrive. In place the block is there already.
                if length > 0 and own != send:
                    copy_bytes(own + start, send + start, length)
            status = _observe(ctx)
            if status != context.READY:
                return status
            for step in range(1, size):
                peer = (rank + step) % size
                length = min(slot_bytes, counts[peer] * item_bytes - start)
                if length > 0:
                    destination = recv + displs[peer] * item_bytes + start
                    slot = _slot(ctx, ctx[context.EPOCH], peer)
                    copy_or_fail(ctx, COPY_OUT, destination, slot, length)
            if start + slot_bytes >= largest:
                return _end(ctx)
            if _next_round(ctx):
                return context.PENDING

    @inlined
    def _reduce_slots(
        ctx: Any,
        epoch: int,
        destination: int,
        first: int,
        stop: int,
        item_bytes: int,
        reduction: int,
    ) -> None:
        """Reduce elements first..stop of all ranks' slots, in rank order, to ``destination``."""
        block = BLOCK_BYTES // item_bytes
        while first < stop:
            count = min(block, stop - first)
            offset = first * item_bytes
            copy_bytes(destination, _slot(ctx, epoch, 0) + offset, count * item_bytes)
            for rank in range(1, ctx[context.SIZE]):
                call_reduction(reduction, destination, _slot(ctx, epoch, rank) + offset, count)
                fail_at(ctx, REDUCE)
            destination += count * item_bytes
            first += count

    @inlined
    def _part_start(elements: int, item_bytes: int, size: int, rank: int) -> int:
        """First element of ``rank``'s part of a chunk; parts start on cache lines."""
        per_line = max(1, layout.LINE_BYTES // item_bytes)
        lines = (elements + per_line - 1) // per_line
        return min(elements, (lines * rank // size) * per_line)

    @entry_point("int64(int64[::1], int64, int64, int64, int64, int64, int64, int64)")
    def allreduce(
        ctx: Any,
        what: int,
        tag: int,
        count: int,
        send: int,
        recv: int,
        item_bytes: int,
        reduction: int,
    ) -> int:
        """Reduce ``count`` elements at ``send`` to ``recv``; ``reduction`` is a kernel's address.

        Even rounds carry a chunk of every rank, odd ones the reduced parts of that chunk. Only
        the even ones exist when one small chunk is all there is.
        """
        if ctx[context.STAGE] == context.IDLE:
            _begin(ctx, what, tag, count)
        size = ctx[context.SIZE]
        rank = ctx[context.RANK]
        per_chunk = ctx[context.SLOT_BYTES] // item_bytes
        is_direct = count * item_bytes <= min(DIRECT_BYTES, ctx[context.SLOT_BYTES])
        while True:
            odd = ctx[context.ROUND] & 1
            start = (ctx[context.ROUND] >> 1) * per_chunk
            elements = min(per_chunk, count - start)
            first = _part_start(elements, item_bytes, size, rank)
            if ctx[context.STAGE] == context.DEPOSIT:
                slot = _slot(ctx, ctx[context.EPOCH] + 1, rank)
                if odd:
                    stop = _part_start(elements, item_bytes, size, rank + 1)
                    _reduce_slots(
                        ctx,
                        ctx[context.EPOCH],
                        slot + first * item_bytes,
                        first,
                        stop,
                        item_bytes,
                        reduction,
                    )
                else:
                    source, nbytes = send + start * item_bytes, elements * item_bytes
                    copy_or_fail(ctx, COPY_IN, slot, source, nbytes)
                status = _publish(ctx)
                if status != context.READY:
                    return status
            status = _observe(ctx)
            if status != context.READY:
                return status
            epoch = ctx[context.EPOCH]
            if is_direct:
                _reduce_slots(ctx, epoch, recv, 0, count, item_bytes, reduction)
                return _end(ctx)
            if odd:
                for step in range(size):
                    peer = (rank + step) % size
                    first = _part_start(elements, item_bytes, size, peer)
                    stop = _part_start(elements, item_bytes, size, peer + 1)
                    copy_or_fail(
                        ctx,
                        COPY_OUT,
                        recv + (start + first) * item_bytes,
                        _slot(ctx, epoch, peer) + first * item_bytes,
                        (stop - first) * item_bytes,
                    )
                if start + elements >= count:
                    return _end(ctx)
            if _next_round(ctx):
                return context.PENDING
