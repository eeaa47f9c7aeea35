"""How payloads go into the slots: through the cache or past it, as measured.

What a rank stores in its cache, a peer on another core has to fetch from there, line by line. On
some machines that is the fastest way, on others (and on the same virtual machine after its host has
moved a core) it takes four times as long as to store past the caches and to fetch from memory. No
table can know that, so rank 0 measures: the cycles from the call to its first publication and from
its first observation to the end, for each kind of collective and power of two of the payload.

It does not choose for itself alone: the readers have the cost or the gain. So the line in which it
publishes the first round of each large collective carries a bit per kind and size, and all ranks
take these for the collectives that follow. Every now and then the bit is turned for one collective.

    W  line[e & 1][0] + CHOICE = bits      rank 0, before P of the first round
    R  bits                                all ranks, after O of the first round

Which way is taken never changes a byte of a result, so a rank may be wrong about it: nothing here
has to be agreed upon to be correct.
"""

from __future__ import annotations

from typing import Any

from cobre_shm import layout
from cobre_shm.kernels import context
from cobre_shm.kernels.atomics import load_plain, store_plain
from cobre_shm.kernels.copying import move_bytes
from cobre_shm.kernels.failing import copy_or_fail, fail_at
from cobre_shm.kernels.jit import inlined
from cobre_shm.kernels.system import cycles
from cobre_shm.kernels.waiting import arrival_line

__all__ = ["CHOICE", "choose", "deposit", "judge", "offer", "take_offer"]

# Behind the two words of a probe.
CHOICE = layout.INLINE + 16
# Sizes below this go through the cache; beyond the last class all are alike.
SMALLEST = 14
CLASSES = 14
# Words of a kind and size: cycles through the cache, cycles past it, number of collectives.
WORDS_PER_CLASS = 3
# One of so many collectives tries the other way.
TURN_EVERY = 128
# The first ones try each way a few times.
FIRST_TURNS = 8


@inlined
def choose(ctx: Any, what: int, nbytes: int) -> None:
    """At the beginning of a collective: which way, and begin to measure."""
    ctx[context.STREAMS_IN] = 0
    ctx[context.CLASS] = -1
    if nbytes >> SMALLEST == 0:
        return
    size_class = 0
    while size_class < CLASSES - 1 and nbytes >> (SMALLEST + 1 + size_class) != 0:
        size_class += 1
    # Allreduce, allgatherv, broadcast and the shared result; the numbers are those of layout.
    kind = (what & 0xFF) & 3
    chosen = kind * CLASSES + size_class
    ctx[context.CLASS] = chosen
    ctx[context.STREAMS_IN] = (ctx[context.CHOICES] >> chosen) & 1
    ctx[context.COST] = -cycles()


@inlined
def offer(ctx: Any, line: int) -> None:
    """Before the first publication: rank 0 says what is to be used from now on."""
    if ctx[context.CLASS] >= 0:
        ctx[context.COST] += cycles()
        if ctx[context.RANK] == 0:
            store_plain(line + CHOICE, ctx[context.OFFER])


@inlined
def take_offer(ctx: Any) -> None:
    """After the first observation: what rank 0 has said; the rest is measured again."""
    if ctx[context.CLASS] >= 0:
        ctx[context.CHOICES] = load_plain(arrival_line(ctx, ctx[context.EPOCH], 0) + CHOICE)
        ctx[context.COST] -= cycles()


@inlined
def judge(ctx: Any) -> None:
    """At the end: rank 0 learns, and decides what it will say in the next collective."""
    chosen = ctx[context.CLASS]
    if chosen < 0 or ctx[context.RANK] != 0:
        return
    cost = ctx[context.COST] + cycles()
    entry = ctx[context.COSTS] + 8 * WORDS_PER_CLASS * chosen
    way = ctx[context.STREAMS_IN]
    known = load_plain(entry + 8 * way)
    if known == 0:
        known = cost
    # An interrupt is no property of the way.
    known += (min(cost, 4 * known) - known) // 4
    store_plain(entry + 8 * way, known)
    turn = load_plain(entry + 16) + 1
    store_plain(entry + 16, turn)
    best = 1 if load_plain(entry + 8) < load_plain(entry) else 0
    if turn < FIRST_TURNS:
        best = (turn >> 1) & 1
    elif turn % TURN_EVERY == 0:
        best = 1 - best
    bit = 1 << chosen
    ctx[context.OFFER] = ctx[context.OFFER] | bit if best else ctx[context.OFFER] & ~bit


@inlined
def deposit(ctx: Any, phase: int, destination: int, source: int, nbytes: int) -> None:
    """Copy into the own slot, the way that was chosen."""
    if ctx[context.STREAMS_IN]:
        move_bytes(destination, source, nbytes, True)
        fail_at(ctx, phase)
    else:
        copy_or_fail(ctx, phase, destination, source, nbytes)
