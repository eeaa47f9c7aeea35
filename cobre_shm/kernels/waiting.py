"""Publishing an epoch and waiting for the epochs of all peers.

Actors: the ranks of a group; launcher and ranks may set the poison word at any time.

Shared words: ``arrived[r]`` (written by r alone, 0 at first, only grows), ``waiters[r]`` (number
of ranks that sleep on ``arrived[r]``, changed atomically by them), the poison word (written once),
the futex word inside ``death[r]`` (the kernel sets OWNER_DIED in it when r's main thread ends).

    P  arrived[me] = e                 exchange_seq_cst   <SYNC arrived>
       if waiters[me] != 0: wake all   load_seq_cst_u32   <SYNC waiters>
    O  arrived[p] >= e ?               load_acquire       <SYNC arrived>

Sleeping on p: waiters[p] += 1 (fetch_add_seq_cst_u32, <SYNC waiters>); look at arrived[p] again
(load_seq_cst); futex_wait on its low half; waiters[p] -= 1.

No wake-up is lost: P writes ``arrived`` and then reads ``waiters``, the sleeper writes
``waiters`` and then reads ``arrived``, all four sequentially consistent. So either the sleeper
sees the new epoch, or the publisher sees the sleeper; and a publication that falls between the
sleeper's look and its sleep changes the word, so that futex_wait returns at once. A missed change
of exactly 2**32 epochs, and a wake sent before a poison was seen, end with the time slice.

>= and not ==: a fast peer may be one epoch ahead already.

The ladder: spin up to a limit, then yield for at most a millisecond, then sleep in slices. The
limit is adapted (additive increase, multiplicative decrease): a wait that ended while spinning
adds to it, one that had to yield halves it, so that ranks which share a core stop spinning into
each other's time without anybody counting cores. Poison and death are looked at in every step
after spinning; spinning itself is at most some 50 microseconds. Each slice ends with PENDING, so
that Python sees signals and the time limit.

Poisoned or dead and yet arrived: arrival wins. ``arrived[p]`` is loaded again after the failure was
seen, so a round that all ranks had published before the failure completes on all survivors. In
particular a mismatch is seen by every rank, whatever the first one to see it does next. A rank
that comes to a group which has failed publishes nothing, so that it does not complete alone what
the others gave up.

Checked: tests/unit/test_protocol_model.py (interleavings), tests/stress/test_exchange.py (real
cores).
"""

from __future__ import annotations

from typing import Any

from cobre_shm import layout
from cobre_shm.kernels import context
from cobre_shm.kernels.atomics import (
    exchange_seq_cst,
    fetch_add_seq_cst_u32,
    load_acquire,
    load_seq_cst,
    load_seq_cst_u32,
    pause,
)
from cobre_shm.kernels.failing import PUBLISH, SLEEP, SPIN, fail_at
from cobre_shm.kernels.jit import inlined
from cobre_shm.kernels.system import futex_wait, futex_wake_all, monotonic_ns, yield_processor

__all__ = ["publish_arrival", "wait_all_arrived"]

YIELD_NS = 1_000_000
SLICE_NS = 20_000_000
OWNER_DIED = 0x40000000

# A wait counts as spinning until this many pauses; measured: 24 ns each on an EPYC, so 50 us.
SPIN_STEP = 2


@inlined
def publish_arrival(ctx: Any) -> int:
    """P: enter the next epoch: READY, or POISONED and nothing was published."""
    if load_acquire(ctx[context.POISON]) != 0:  # <SYNC poison>
        return context.POISONED
    epoch = ctx[context.EPOCH] + 1
    own = ctx[context.CONTROL] + ctx[context.RANK] * layout.CONTROL_BYTES
    exchange_seq_cst(own + layout.ARRIVED, epoch)  # <SYNC arrived>
    if load_seq_cst_u32(own + layout.WAITERS) != 0:  # <SYNC waiters>
        futex_wake_all(own + layout.ARRIVED)
    ctx[context.EPOCH] = epoch
    fail_at(ctx, PUBLISH)
    ctx[context.SPUN] = 0
    ctx[context.YIELD_SINCE] = 0
    ctx[context.ASLEEP] = 0
    return context.READY


@inlined
def wait_all_arrived(ctx: Any) -> int:
    """O for every peer: READY, or PENDING, POISONED, DEAD; resumable.

    Starts at the next rank, so that not all ranks look at the same line first.
    """
    size = ctx[context.SIZE]
    rank = ctx[context.RANK]
    epoch = ctx[context.EPOCH]
    for step in range(1, size):
        peer = rank + step
        if peer >= size:
            peer -= size
        block = ctx[context.CONTROL] + peer * layout.CONTROL_BYTES
        while load_acquire(block + layout.ARRIVED) < epoch:  # <SYNC arrived>
            if ctx[context.SPUN] < ctx[context.SPIN_LIMIT]:
                ctx[context.SPUN] += 1
                fail_at(ctx, SPIN)
                pause()
                continue
            status = _yield_or_sleep(ctx, block, epoch)
            if status != context.READY:
                return status
    if ctx[context.YIELD_SINCE] != 0:
        ctx[context.SPIN_LIMIT] //= 2
    elif ctx[context.SPUN] != 0 and ctx[context.SPIN_LIMIT] < ctx[context.SPIN_LIMIT_MAX]:
        ctx[context.SPIN_LIMIT] += SPIN_STEP
    return context.READY


@inlined
def _yield_or_sleep(ctx: Any, block: int, epoch: int) -> int:
    """One step of the ladder's upper rungs; READY means: look at the peer again."""
    if load_acquire(ctx[context.POISON]) != 0:  # <SYNC poison>
        if load_acquire(block + layout.ARRIVED) >= epoch:  # <SYNC arrived>
            return context.READY
        return context.POISONED
    now = monotonic_ns()
    if ctx[context.YIELD_SINCE] == 0:
        ctx[context.YIELD_SINCE] = now
    if ctx[context.ASLEEP] == 0 and now - ctx[context.YIELD_SINCE] < YIELD_NS:
        yield_processor()
        return context.READY
    if _some_rank_died(ctx):
        if load_acquire(block + layout.ARRIVED) >= epoch:  # <SYNC arrived>
            return context.READY
        return context.DEAD
    ctx[context.ASLEEP] = 1
    fetch_add_seq_cst_u32(block + layout.WAITERS, 1)  # <SYNC waiters>
    seen = load_seq_cst(block + layout.ARRIVED)  # <SYNC arrived>
    fail_at(ctx, SLEEP)
    if seen < epoch:
        futex_wait(block + layout.ARRIVED, seen, SLICE_NS)
        seen = load_acquire(block + layout.ARRIVED)  # <SYNC arrived>
    fetch_add_seq_cst_u32(block + layout.WAITERS, -1)
    return context.READY if seen >= epoch else context.PENDING


@inlined
def _some_rank_died(ctx: Any) -> bool:
    for peer in range(ctx[context.SIZE]):
        block = ctx[context.CONTROL] + peer * layout.CONTROL_BYTES
        if load_seq_cst_u32(block + layout.DEATH_MUTEX) & OWNER_DIED:
            ctx[context.SUSPECT] = peer
            return True
    return False
