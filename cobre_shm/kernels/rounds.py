"""The exchange round, of which every collective is made, and a collective's beginning and end.

A round with epoch e = 1, 2, 3, ... (one sequence per communicator, over all collectives):

    W  slot[e][me], line[e & 1][me] = ...         plain stores
    P  arrival[e & 1][me] = e                     waiting.publish_arrival    <SYNC arrived>
    O  for each p: wait until arrival of p >= e   waiting.wait_all_arrived   <SYNC arrived>
    R  read slot[e][p], line[e & 1][p], p != me   plain loads

``line`` is the rest of the cache line of the arrival word: the signature of the call, and a payload
of at most 48 bytes, which so comes with the word itself. ``slot[e]`` is a place in each rank's
ring, the same on all ranks, chosen by ``take_slots`` from what all ranks know.

Visible: O on p reads what p's P stored, so p's W precedes my R.

Reuse: I write for e only after O of e-1, when every p had published e-1, which it does only after
its own R of e-2. So of what is written for e only the memory of e-1 must be left alone, where a
slow peer may still be in R. Release keeps reads before p's store, acquire keeps my writes after my
load. Lines and small slots alternate between two places; one would not do. Large slots follow each
other in the ring: ``take_slots`` moves on by at least what the last one had, and begins anew, at
least one slot before it, when the largest slot would not fit any more; the ring has room for three.
Small and large ones do not meet. Nobody can be two epochs ahead: e+1 needs my e.

A rank does not read its own line and slot after P. A peer that waits takes the line away at once,
and to read it then takes as long as to read a peer's: a quarter of the time of a barrier of two.
(Probes of large payloads do, where it does not matter.)

This holds for any sequence of rounds, whatever they carry, so every algorithm may use the slot of
the coming epoch after its wait, and needs no buffer of its own. ``chain.py`` uses those of
all ranks at once, and the same ones over several rounds, each time between two.

The signature: the first round of each collective carries a hash of what was called. Every rank
compares those of all ranks with its own before it uses any payload; lengths, and so the number of
rounds, are equal from there on. Each of the three call words is multiplied by an odd number, so
any difference in one of them changes the signature for certain, and differences in several cancel
with probability 2**-64. What was really called stands in the recorder. A rank that sees a mismatch
calls nothing more, so that stays readable.

Relies on: 8-byte aligned words, one writer per arrival word, epochs never wrap 63 bits.
Checked: interleavings by tests/unit/test_protocol_model.py, real cores by
tests/stress/test_exchange.py.
"""

from __future__ import annotations

from typing import Any

from cobre_shm import layout
from cobre_shm.kernels import context
from cobre_shm.kernels.atomics import exchange_seq_cst, load_plain, store_plain, store_release
from cobre_shm.kernels.choices import (
    choose,
    offer,
    pause_measuring,
    resume_measuring,
    stop_measuring,
    take_offer,
)
from cobre_shm.kernels.copying import prefetch_for_writing, streaming_fence
from cobre_shm.kernels.jit import inlined
from cobre_shm.kernels.switches import is_probing
from cobre_shm.kernels.system import coarse_monotonic_ns, monotonic_ns
from cobre_shm.kernels.waiting import arrival_line, publish_arrival, wait_all_arrived

__all__ = [
    "begin",
    "claim",
    "coming_slot",
    "end",
    "next_round",
    "observe",
    "own_line",
    "prefetch_coming_slot",
    "publish",
    "recorded_wait",
    "slot",
    "take_slots",
]

# Rounds after which a large collective lets Python look for signals.
ROUNDS_PER_CALL = 64
# From here on a collective's duration is worth two looks at the precise clock.
TIMED_BYTES = 32768

# Up to here the own slot of a collective to come is prefetched; of larger ones that takes longer
# than what it is done beside.
PREFETCHED_BYTES = 16384

# Odd numbers without a pattern: the fractional digits of the square roots of 2, 3 and 5.
_K1, _K2, _K3 = 0x6A09E667F3BCC909, 0x3B67AE8584CAA73B, 0x3C6EF372FE94F82B


@inlined
def take_slots(ctx: Any, nbytes: int) -> None:
    """Choose the place of the slots of the coming round, ``nbytes`` each; once, on all ranks."""
    if nbytes <= layout.SMALL_SLOT_BYTES:
        ctx[context.COMING] = ((ctx[context.EPOCH] + 1) & 1) * layout.SMALL_SLOT_BYTES
        return
    place = ctx[context.POSITION]
    after = place + ((nbytes + layout.LINE_BYTES - 1) & -layout.LINE_BYTES)
    if after + ctx[context.SLOT_BYTES] > ctx[context.RING_BYTES]:
        after = layout.SMALL_SLOTS_BYTES
    ctx[context.COMING] = place
    ctx[context.POSITION] = after


@inlined
def prefetch_coming_slot(ctx: Any, nbytes: int) -> None:
    """Between O and R, as if another collective of ``nbytes`` followed: take back the own slot.

    A peer's cache has what the peer read there. The lines come back while R waits for those of the
    peers. It changes nothing that anybody reads, so nothing is lost if something else follows.
    """
    if nbytes <= PREFETCHED_BYTES and nbytes <= ctx[context.SLOT_BYTES]:
        place = ctx[context.RINGS] + ctx[context.RANK] * ctx[context.RING_BYTES]
        if nbytes <= layout.SMALL_SLOT_BYTES:
            place += ((ctx[context.EPOCH] + 1) & 1) * layout.SMALL_SLOT_BYTES
        else:
            place += ctx[context.POSITION]
        for at in range(0, nbytes, layout.LINE_BYTES):
            prefetch_for_writing(place + at)


@inlined
def coming_slot(ctx: Any, rank: int) -> int:
    """Address of ``rank``'s slot of the coming round, after :func:`take_slots`."""
    return ctx[context.RINGS] + rank * ctx[context.RING_BYTES] + ctx[context.COMING]


@inlined
def slot(ctx: Any, rank: int) -> int:
    """Address of ``rank``'s slot of the round that was published last."""
    return ctx[context.RINGS] + rank * ctx[context.RING_BYTES] + ctx[context.CURRENT]


@inlined
def own_line(ctx: Any) -> int:
    """Address of this rank's line of the coming epoch."""
    return arrival_line(ctx, ctx[context.EPOCH] + 1, ctx[context.RANK])


@inlined
def claim(ctx: Any, resume: int) -> int:
    """Become busy: READY, or TAKEN if it was; of two threads one gets it."""
    if exchange_seq_cst(ctx[context.SELF] + 8 * context.BUSY, 1) != 0:
        return context.TAKEN
    return context.READY


@inlined
def begin(ctx: Any, what: int, tag: int, count: int, nbytes: int) -> int:
    """Write signature and recorder entry; READY, or TAKEN: another thread is inside.

    BUSY is given back by :func:`end` alone: after a failure the communicator is out of use.
    """
    if claim(ctx, 0) != context.READY:
        return context.TAKEN
    # A rank without the heap that the others have would take their probe for a payload.
    ctx[context.SIGNATURE] = what * _K1 ^ tag * _K2 ^ count * _K3 ^ is_probing(ctx, what, nbytes)
    choose(ctx, what, nbytes)
    sequence = ctx[context.SEQUENCE] + 1
    ctx[context.SEQUENCE] = sequence
    entry = ctx[context.RECORDER] + ((sequence - 1) & (layout.RECORDER_ENTRIES - 1)) * (
        layout.ENTRY_BYTES
    )
    ctx[context.ENTRY] = entry
    # Each store releases, so that readers see them in this order, the sequence number first.
    store_release(entry + layout.ENTRY_SEQUENCE, sequence)
    store_release(entry + layout.ENTRY_CALL, what)
    store_release(entry + layout.ENTRY_CALL + 8, tag)
    store_release(entry + layout.ENTRY_CALL + 16, count)
    now = monotonic_ns() if nbytes >= TIMED_BYTES else coarse_monotonic_ns()
    store_release(entry + layout.ENTRY_START, now)
    store_release(entry + layout.ENTRY_WAITED, 0)
    store_release(entry + layout.ENTRY_END, 0)
    store_release(entry + layout.ENTRY_STATUS, context.PENDING)
    own_block = ctx[context.CONTROL] + ctx[context.RANK] * layout.CONTROL_BYTES
    store_release(own_block + layout.RECORDED, sequence)  # <SYNC recorded>
    ctx[context.ROUND] = 0
    ctx[context.COMPARED] = 0
    ctx[context.PROBED] = 0
    ctx[context.STAGE] = context.DEPOSIT
    return context.READY


@inlined
def end(ctx: Any, nbytes: int) -> int:
    """Close the recorder entry and let the next collective begin."""
    entry = ctx[context.ENTRY]
    if nbytes >= TIMED_BYTES or load_plain(entry + layout.ENTRY_WAITED) != 0:
        now = monotonic_ns()
    else:
        # It ended while spinning: as far as the coarse clock can tell, at once.
        now = load_plain(entry + layout.ENTRY_START)
    stop_measuring(ctx)
    store_release(entry + layout.ENTRY_END, now)
    store_release(entry + layout.ENTRY_STATUS, context.READY)
    ctx[context.STAGE] = context.IDLE
    store_release(ctx[context.SELF] + 8 * context.BUSY, 0)
    return context.READY


@inlined
def publish(ctx: Any) -> int:
    """P, and the stage in which the round is waited for."""
    if ctx[context.STREAMS_IN]:
        streaming_fence()
    if ctx[context.COMPARED] == 0:
        # Late, so that a peer that waits already does not take the line away between two stores.
        line = own_line(ctx)
        offer(ctx, line)
        store_plain(line + layout.SIGNATURE, ctx[context.SIGNATURE])
    status = publish_arrival(ctx)
    if status == context.READY:
        ctx[context.CURRENT] = ctx[context.COMING]
        pause_measuring(ctx)
        ctx[context.STAGE] = context.WAIT
    return status


@inlined
def observe(ctx: Any) -> int:
    """O, and in a collective's first round the comparison of the calls of all ranks."""
    before = ctx[context.YIELD_SINCE]
    status = wait_all_arrived(ctx)
    recorded_wait(ctx, before)
    if status == context.READY:
        resume_measuring(ctx)
        if ctx[context.COMPARED] == 0:
            if not _calls_agree(ctx):
                return context.MISMATCH
            ctx[context.COMPARED] = 1
            take_offer(ctx)
    return status


@inlined
def recorded_wait(ctx: Any, before: int) -> None:
    """Add a wait to the recorder; ``before`` is YIELD_SINCE at its beginning."""
    if ctx[context.YIELD_SINCE] != 0:
        # Waits that ended while spinning are too short to be worth two looks at the clock.
        now = monotonic_ns()
        entry = ctx[context.ENTRY]
        waited = load_plain(entry + layout.ENTRY_WAITED)
        since = ctx[context.YIELD_SINCE] if before == 0 else ctx[context.WAIT_SINCE]
        store_plain(entry + layout.ENTRY_WAITED, waited + max(1, now - since))
        ctx[context.WAIT_SINCE] = now


@inlined
def _calls_agree(ctx: Any) -> bool:
    epoch = ctx[context.EPOCH]
    own = ctx[context.SIGNATURE]
    agree = True
    for rank in range(ctx[context.SIZE]):
        if rank != ctx[context.RANK]:
            line = arrival_line(ctx, epoch, rank)
            agree = agree and load_plain(line + layout.SIGNATURE) == own
    return agree


@inlined
def next_round(ctx: Any) -> bool:
    """Go on to the next round; whether to let Python look for signals before it."""
    ctx[context.ROUND] += 1
    ctx[context.STAGE] = context.DEPOSIT
    return ctx[context.ROUND] % ROUNDS_PER_CALL == 0
