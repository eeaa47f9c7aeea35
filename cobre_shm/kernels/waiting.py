"""Publishing what a rank has done and waiting until the peers have done it too.

Actors: the ranks of a group; launcher and ranks may set the poison word at any time.

Shared words: ``arrival[parity][r]`` (the last epoch of that parity that r has published) and
``steps[r]`` (parts of chains that r has finished), both written by r alone, 0 at first, only
growing; ``waiters[r]`` (number of ranks that sleep on a word of r, changed atomically by them);
the poison word (written once); ``state[r]`` (CLOSED when r has left, written by r); the futex word
inside ``death[r]`` (the thread that holds the mutex, which is r's main thread, or 0; SLEEPERS, set
by whoever sleeps; OWNER_DIED, set by the kernel when that thread ends).

    P  arrival[e & 1][me] = e          exchange_seq_cst   <SYNC arrived>
       if waiters[me] != 0: wake all   load_seq_cst_u32   <SYNC waiters>
    O  arrival[e & 1][p] >= e ?        load_acquire       <SYNC arrived>

and likewise with ``steps`` <SYNC steps>. Epochs of the two parities have words of their own, so
that a small payload in the line of its epoch stays when the rank goes on to the next.

Sleeping on p: waiters[p] += 1 (fetch_add_seq_cst_u32, <SYNC waiters>); look at the word of p again
(load_seq_cst); futex_wait on its low half; waiters[p] -= 1.

No wake-up is lost: P writes its word and then reads ``waiters``, the sleeper writes ``waiters``
and then reads the word, all four sequentially consistent. So either the sleeper sees the new
value, or the publisher sees the sleeper; and a publication that falls between the sleeper's look
and its sleep changes the word, so that futex_wait returns at once. A missed change of exactly
2**32 ends with the time slice.

Who sleeps for long also watches the poison word, the state of the peer it waits for, and the deaths
of all others (futex_wait_any: the kernel compares each word when it has queued the sleeper at those
before it in the list, and returns at once if one differs). So such a sleeper is woken, before its
slice ends, by

    poison  stored, then all are woken, by the words on which they sleep <SYNC poison>. A sleeper
            whose comparison has not found it was queued before, so that wake finds the sleeper.
    CLOSED  the same <SYNC state>.
    death   the kernel sets OWNER_DIED and, where it finds SLEEPERS, wakes one who sleeps on this
            word <SYNC died>. Who wakes looks at the marks, whatever has woken it, and if there is
            one wakes all who sleep on that word: the one wake-up is not lost with a sleeper that
            was on its way to something else. Should it die before, its own death does the same.

A slice is lost by a poison that comes between a look and a sleep on one word, by the leave of a
peer for which nobody waits yet, and by a process that is stopped when it is to wake another, or may
not.

>= and not ==: ``steps`` of a fast peer may be ahead already.

The ladder: spin up to a limit, then yield for at most a millisecond, then sleep in slices. The
limit is adapted (additive increase, multiplicative decrease): a wait in which somebody else took
the core that was yielded halves it, any other adds to it. So ranks which share a core stop
spinning into each other's time without anybody counting cores, and begin again when they have one.
A caller that holds the GIL (HOLDING) is sent back with LONGER before the first yield, and after at
most some 10 microseconds, to call again without it. Poison is looked at in every step after
spinning, death before every sleep; spinning itself is at most some 50 microseconds. Each slice ends
with PENDING, so that Python sees signals and the time limit, unless the awaited word has come; then
that is left to the next sleep of this wait, which returns before it begins. So a rank sleeps once
between two looks of Python. The first slice is short, so that a signal that came before it is soon
seen.

Poisoned or dead and yet arrived: arrival wins. The word of the peer is loaded again after the
failure was seen, so a round that all ranks had published before the failure completes on all
survivors. In particular a mismatch is seen by every rank, whatever the first one to see it does
next. A rank that comes to a group which has failed publishes nothing, so that it does not complete
alone what the others gave up.

Checked: tests/unit/test_protocol_model.py, test_sleeping_model.py (interleavings),
tests/stress/test_exchange.py (real cores).
"""

from __future__ import annotations

from typing import Any

from cobre_shm import layout
from cobre_shm.kernels import context
from cobre_shm.kernels.atomics import (
    exchange_seq_cst,
    fetch_add_seq_cst_u32,
    fetch_or_seq_cst_u32,
    load_acquire,
    load_seq_cst,
    load_seq_cst_u32,
    pause,
    store_plain,
)
from cobre_shm.kernels.failing import PUBLISH, SLEEP, SPIN, fail_at
from cobre_shm.kernels.jit import inlined
from cobre_shm.kernels.system import (
    FUTEX_32,
    futex_wait,
    futex_wait_any,
    futex_wake_all,
    monotonic_ns,
    yield_processor,
)

__all__ = [
    "arrival_line",
    "begin_wait",
    "publish_arrival",
    "publish_steps",
    "wait_all_arrived",
    "wait_steps",
]

YIELD_NS = 1_000_000
# At most; those that follow last for SLICE_NS, for on a machine that was idle, where everything is
# cold, waking costs up to a millisecond of CPU.
FIRST_SLICE_NS = 20_000_000
# At most, of who watches nothing but its word.
BLIND_SLICE_NS = 100_000_000
# Bits of the futex word of a robust mutex (FUTEX_OWNER_DIED, FUTEX_WAITERS).
OWNER_DIED, SLEEPERS = 0x40000000, 0x80000000

# Turns without a pause at the beginning, 0.2 us on a Xeon: one pause can take half as long as a
# short collective waits.
EAGER_TURNS = 100
SPIN_STEP = 2
LONELY_STEP = 16
# A yield that nobody takes returns within half of this, clock included; one switch to another
# process and back takes more than twice as long.
CROWDED_NS = 1_000
# Interrupts make single yields long.
CROWDED_SHARE = 8
# Pauses for which a caller may keep the GIL; measured: 24 ns each on an EPYC, so 10 us.
HOLD_PAUSES = 400


@inlined
def arrival_line(ctx: Any, epoch: int, rank: int) -> int:
    """Address of the line in which ``rank`` publishes ``epoch``."""
    block = ctx[context.CONTROL] + rank * layout.CONTROL_BYTES
    return block + layout.ARRIVAL + (epoch & 1) * layout.ARRIVAL_BYTES


@inlined
def publish_arrival(ctx: Any) -> int:
    """P: enter the next epoch: READY, or POISONED and nothing was published."""
    if load_acquire(ctx[context.POISON]) != 0:  # <SYNC poison>
        return context.POISONED
    epoch = ctx[context.EPOCH] + 1
    word = arrival_line(ctx, epoch, ctx[context.RANK])
    exchange_seq_cst(word, epoch)  # <SYNC arrived>
    _wake_waiters(ctx, word)
    ctx[context.EPOCH] = epoch
    fail_at(ctx, PUBLISH)
    begin_wait(ctx)
    return context.READY


@inlined
def publish_steps(ctx: Any, steps: int) -> None:
    """P of a chain: this rank has finished ``steps`` parts since the group began."""
    word = ctx[context.CONTROL] + ctx[context.RANK] * layout.CONTROL_BYTES + layout.STEPS
    exchange_seq_cst(word, steps)  # <SYNC steps>
    _wake_waiters(ctx, word)
    fail_at(ctx, PUBLISH)
    begin_wait(ctx)


@inlined
def _wake_waiters(ctx: Any, word: int) -> None:
    own = ctx[context.CONTROL] + ctx[context.RANK] * layout.CONTROL_BYTES
    if load_seq_cst_u32(own + layout.WAITERS) != 0:  # <SYNC waiters>
        futex_wake_all(word)


@inlined
def begin_wait(ctx: Any) -> None:
    """Start the ladder anew."""
    ctx[context.SPUN] = 0
    ctx[context.YIELD_SINCE] = 0
    ctx[context.ASLEEP] = 0
    ctx[context.YIELDS] = 0
    ctx[context.CROWDED] = 0


@inlined
def _adapt_spinning(ctx: Any) -> None:
    if ctx[context.CROWDED] * CROWDED_SHARE > ctx[context.YIELDS]:
        ctx[context.SPIN_LIMIT] //= 2
    elif ctx[context.SPIN_LIMIT] < ctx[context.SPIN_LIMIT_MAX]:
        if ctx[context.YIELD_SINCE] != 0:
            ctx[context.SPIN_LIMIT] += LONELY_STEP
        elif ctx[context.SPUN] != 0:
            ctx[context.SPIN_LIMIT] += SPIN_STEP


@inlined
def wait_all_arrived(ctx: Any) -> int:
    """O for every peer: READY, or PENDING, POISONED, DEAD, LEFT, LONGER; resumable.

    Starts at the next rank, so that not all ranks look at the same line first.
    """
    size = ctx[context.SIZE]
    rank = ctx[context.RANK]
    epoch = ctx[context.EPOCH]
    for step in range(1, size):
        peer = rank + step
        if peer >= size:
            peer -= size
        word = arrival_line(ctx, epoch, peer)
        if load_acquire(word) < epoch:  # <SYNC arrived>
            status = _climb(ctx, word, epoch, peer)
            if status != context.READY:
                return status
    _adapt_spinning(ctx)
    return context.READY


@inlined
def wait_steps(ctx: Any, peer: int, steps: int) -> int:
    """O of a chain: wait until ``peer`` has finished ``steps`` parts; as wait_all_arrived."""
    word = ctx[context.CONTROL] + peer * layout.CONTROL_BYTES + layout.STEPS
    if load_acquire(word) < steps:  # <SYNC steps>
        status = _climb(ctx, word, steps, peer)
        if status != context.READY:
            return status
    _adapt_spinning(ctx)
    return context.READY


@inlined
def _climb(ctx: Any, word: int, target: int, peer: int) -> int:
    """The ladder, until the word of ``peer`` has reached ``target``."""
    limit = ctx[context.SPIN_LIMIT]
    if ctx[context.HOLDING] and limit > HOLD_PAUSES:
        limit = HOLD_PAUSES
    while load_acquire(word) < target:  # <SYNC arrived> <SYNC steps>
        if ctx[context.SPUN] < limit:
            ctx[context.SPUN] += 1
            fail_at(ctx, SPIN)
            if ctx[context.SPUN] > EAGER_TURNS:
                pause()
            continue
        if ctx[context.HOLDING]:
            return context.LONGER
        status = _yield_or_sleep(ctx, word, target, peer)
        if status != context.READY:
            return status
    return context.READY


@inlined
def _yield_or_sleep(ctx: Any, word: int, target: int, peer: int) -> int:
    """One step of the ladder's upper rungs; READY means: look at the peer again."""
    if load_acquire(ctx[context.POISON]) != 0:  # <SYNC poison>
        if load_acquire(word) >= target:  # <SYNC arrived> <SYNC steps>
            return context.READY
        return context.POISONED
    now = monotonic_ns()
    if ctx[context.YIELD_SINCE] == 0:
        ctx[context.YIELD_SINCE] = now
    if ctx[context.ASLEEP] == 0 and now - ctx[context.YIELD_SINCE] < YIELD_NS:
        yield_processor()
        ctx[context.YIELDS] += 1
        # At once: most waits end with their first yield.
        if monotonic_ns() - now > CROWDED_NS:
            ctx[context.CROWDED] += 1
        return context.READY
    if _some_rank_died(ctx):
        if load_acquire(word) >= target:  # <SYNC arrived> <SYNC steps>
            return context.READY
        return context.DEAD
    if load_acquire(_state(ctx, peer)) == layout.CLOSED:  # <SYNC state>
        # It leaves after its last publication.
        if load_acquire(word) >= target:  # <SYNC arrived> <SYNC steps>
            return context.READY
        ctx[context.SUSPECT] = peer
        return context.LEFT
    if ctx[context.ASLEEP] == context.SLEPT:
        ctx[context.ASLEEP] = context.SEEN
        return context.PENDING
    # Of a wait as long as this it tells nothing that somebody else has run meanwhile.
    ctx[context.CROWDED] = 0
    waiters = ctx[context.CONTROL] + peer * layout.CONTROL_BYTES + layout.WAITERS
    fetch_add_seq_cst_u32(waiters, 1)  # <SYNC waiters>
    seen = load_seq_cst(word)  # <SYNC arrived> <SYNC steps>
    fail_at(ctx, SLEEP)
    if seen < target:
        if ctx[context.ASLEEP] and ctx[context.WATCH_LIST]:
            _sleep_watching_all(ctx, word, seen, peer)
        else:
            _sleep_on_one(ctx, word, seen)
        ctx[context.ASLEEP] = context.SLEPT
        seen = load_acquire(word)  # <SYNC arrived> <SYNC steps>
    fetch_add_seq_cst_u32(waiters, -1)
    if seen >= target:
        return context.READY
    ctx[context.ASLEEP] = context.SEEN
    return context.PENDING


@inlined
def _sleep_on_one(ctx: Any, word: int, seen: int) -> None:
    """Sleep for a slice, until the word changes."""
    most = BLIND_SLICE_NS if ctx[context.ASLEEP] else FIRST_SLICE_NS
    if futex_wait(word, seen, min(ctx[context.SLICE_NS], most)) < 0:
        # A system that refuses this would not wake either.
        ctx[context.WATCH_LIST] = 0


@inlined
def _sleep_watching_all(ctx: Any, word: int, seen: int, peer: int) -> None:
    """Sleep for a slice, until its word changes, or something that ends the wait otherwise."""
    state = load_acquire(_state(ctx, peer))  # <SYNC state>
    if state == layout.CLOSED:
        return
    end = ctx[context.WATCH_LIST]
    # First the word by which the next two wake.
    end = _watch(end, word, seen)
    end = _watch(end, ctx[context.POISON], 0)  # <SYNC poison>
    end = _watch(end, _state(ctx, peer), state)  # <SYNC state>
    for other in range(ctx[context.SIZE]):
        mark = _death_mark(ctx, other)
        owner = load_seq_cst_u32(mark)
        # 0: nobody's, its rank has left.
        if other != ctx[context.RANK] and owner != 0:
            if owner & SLEEPERS == 0:
                owner = fetch_or_seq_cst_u32(mark, SLEEPERS) | SLEEPERS  # <SYNC died>
            end = _watch(end, mark, owner & ~OWNER_DIED)
    count = (end - ctx[context.WATCH_LIST]) // context.WATCH_BYTES
    if futex_wait_any(ctx[context.WATCH_LIST], count, monotonic_ns() + ctx[context.SLICE_NS]) < 0:
        ctx[context.WATCH_LIST] = 0
    if _some_rank_died(ctx):  # <SYNC died>
        futex_wake_all(_death_mark(ctx, ctx[context.SUSPECT]))


@inlined
def _watch(entry: int, word: int, expected: int) -> int:
    """Write an entry of futex_wait_any; return the address of the next."""
    store_plain(entry, expected & 0xFFFFFFFF)
    store_plain(entry + 8, word)
    store_plain(entry + 16, FUTEX_32)
    return entry + context.WATCH_BYTES


@inlined
def _state(ctx: Any, rank: int) -> int:
    return ctx[context.CONTROL] + rank * layout.CONTROL_BYTES + layout.STATE


@inlined
def _death_mark(ctx: Any, rank: int) -> int:
    return ctx[context.CONTROL] + rank * layout.CONTROL_BYTES + layout.DEATH_MUTEX


@inlined
def _some_rank_died(ctx: Any) -> bool:
    for peer in range(ctx[context.SIZE]):
        if load_seq_cst_u32(_death_mark(ctx, peer)) & OWNER_DIED:  # <SYNC died>
            ctx[context.SUSPECT] = peer
            return True
    return False
