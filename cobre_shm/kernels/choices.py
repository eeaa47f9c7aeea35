"""Which way payloads take: through the slots or around them, through the caches or past them.

Out of the slots: where ranks have cores of their own, lines are asked for ahead (``copying.py``).

Into them: through the cache or past it. Where the peers' buffers can be read (``sharing.py``):
directly, or into slots past the cache. For what a rank has just stored itself the same holds as for
what it stores into a slot:

What a rank stores in its cache, a peer on another core has to fetch from there, line by line, and
has to be told when the line is stored into again. On some machines that is the fastest way, on
others (and on the same virtual machine after its host has moved a core) it takes ten times as long
as to store past the caches and to fetch from memory. No table can know that, so it is measured: the
cycles that each rank has worked, without its waits, in a collective of a kind and power of two of
the payload. What one rank stores costs or saves another one time, so the sum over all ranks counts.
A program that has both kinds of buffers, private and shared, in one such class mixes what they
cost.

In the line in which it publishes the first round of such a collective, each rank gives the cycles
that the one before took, and rank 0 says what is to be used, a bit per kind and size. All ranks
take these bits for the collectives that follow. Every now and then rank 0 turns a bit.

    W  line[e & 1][me] + COST = cycles     all ranks, before P of the first round
       line[e & 1][0] + CHOICE = bits      rank 0
    R  bits                                all ranks, after O of the first round
       sum of cycles                       rank 0

Which way is taken never changes a byte of a result, so rank 0 may be wrong about it. How payloads
go into the slots need not be agreed upon. Whether slots are used must be: after a probe all ranks
go by the bits which rank 0 has published in the line of this very probe. It is the same word for
all, and is written again only when all have entered the next round.
"""

from __future__ import annotations

from typing import Any

from cobre_shm import layout
from cobre_shm.kernels import context
from cobre_shm.kernels.atomics import load_plain, store_plain
from cobre_shm.kernels.copying import copy_fetching, move_bytes
from cobre_shm.kernels.failing import COPY_OUT, copy_or_fail, fail_at
from cobre_shm.kernels.jit import inlined
from cobre_shm.kernels.switches import has_own_core
from cobre_shm.kernels.system import cycles
from cobre_shm.kernels.waiting import arrival_line

__all__ = [
    "CHOICE",
    "choose",
    "chooses_slots",
    "copy_out",
    "deposit",
    "do_not_measure",
    "offer",
    "pause_measuring",
    "resume_measuring",
    "stop_measuring",
    "take_offer",
]

# Behind the two words of a probe.
CHOICE = layout.INLINE + 16
COST = layout.INLINE + 24
# Sizes below this go through the cache; beyond the last class all are alike.
SMALLEST = 12
# Two of so many collectives try the other way, for the first time when buffers and pages have been
# touched; slots are cold until the ring has been gone round, by large payloads soon, by small ones
# later. Those that follow find nothing in the caches, so it costs more than the two.
TURN_EVERY = 256
FIRST_TURN = 6


@inlined
def choose(ctx: Any, what: int, nbytes: int) -> None:
    """At the beginning of a collective: which way, and begin to measure."""
    ctx[context.STREAMS_IN] = 0
    ctx[context.CLASS] = -1
    if nbytes >> SMALLEST == 0:
        return
    size_class = 0
    while size_class < context.CLASSES - 1 and nbytes >> (SMALLEST + 1 + size_class) != 0:
        size_class += 1
    # Allreduce, allgatherv, broadcast and the shared result; the numbers are those of layout.
    kind = (what & 0xFF) & (context.KINDS - 1)
    chosen = kind * context.CLASSES + size_class
    ctx[context.CLASS] = chosen
    ctx[context.STREAMS_IN] = (ctx[context.CHOICES] >> chosen) & 1
    ctx[context.COST] = -cycles()


@inlined
def chooses_slots(ctx: Any) -> bool:
    """After the first observation of a probe: whether slots are used though buffers can be read."""
    if ctx[context.CLASS] >= 0:
        ctx[context.STREAMS_IN] = (ctx[context.CHOICES] >> ctx[context.CLASS]) & 1
    return ctx[context.STREAMS_IN] != 0


@inlined
def do_not_measure(ctx: Any) -> None:
    """Before the first publication, where a payload stands in the line: there is no room beside it.

    The size by which a collective is measured need not be that of a round: large blocks may end
    with a small one, and many small blocks are much together.
    """
    ctx[context.CLASS] = -1


@inlined
def offer(ctx: Any, line: int) -> None:
    """Before the first publication: what the last one took, and rank 0's word."""
    if ctx[context.CLASS] >= 0:
        store_plain(line + COST, ctx[context.LAST_COST])
        if ctx[context.RANK] == 0:
            store_plain(line + CHOICE, ctx[context.OFFER])


@inlined
def pause_measuring(ctx: Any) -> None:
    """After a publication, when all that was stored is stored."""
    if ctx[context.CLASS] >= 0:
        ctx[context.COST] += cycles()


@inlined
def resume_measuring(ctx: Any) -> None:
    """After an observation."""
    if ctx[context.CLASS] >= 0:
        ctx[context.COST] -= cycles()


@inlined
def stop_measuring(ctx: Any) -> None:
    """At the end of a collective."""
    if ctx[context.CLASS] >= 0:
        ctx[context.LAST_COST] = ctx[context.COST] + cycles()
        ctx[context.LAST_CLASS] = ctx[context.CLASS]
        ctx[context.LAST_WAY] = ctx[context.STREAMS_IN]


@inlined
def take_offer(ctx: Any) -> None:
    """After the first observation: rank 0's word is taken, and rank 0 learns."""
    if ctx[context.CLASS] >= 0:
        epoch = ctx[context.EPOCH]
        if ctx[context.RANK] != 0:
            ctx[context.CHOICES] = load_plain(arrival_line(ctx, epoch, 0) + CHOICE)
            return
        # What stands in the own line is known without it.
        ctx[context.CHOICES] = ctx[context.OFFER]
        if ctx[context.LAST_COST] > 0:
            cost = ctx[context.LAST_COST]
            for rank in range(1, ctx[context.SIZE]):
                cost += load_plain(arrival_line(ctx, epoch, rank) + COST)
            _learn(ctx, ctx[context.LAST_CLASS], ctx[context.LAST_WAY], cost)


@inlined
def _learn(ctx: Any, chosen: int, way: int, cost: int) -> None:
    """Rank 0 remembers what a way cost, and decides what it will say next."""
    if cost <= 0:
        return  # a core's counter went back
    entry = ctx[context.COSTS] + 8 * context.WORDS_PER_CLASS * chosen
    known = load_plain(entry + 8 * way)
    if known == 0:
        known = cost
    # An interrupt is no property of the way: less is believed at once, more only by and by.
    if cost < known:
        known = cost
    else:
        known += (min(cost, 4 * known) - known) // 16
    store_plain(entry + 8 * way, known)
    turn = load_plain(entry + 16) + 1
    store_plain(entry + 16, turn)
    past = load_plain(entry + 8)
    best = 1 if past > 0 and past < load_plain(entry) else 0
    since = turn % TURN_EVERY - FIRST_TURN
    if since == 0 or since == 1:
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


@inlined
def copy_out(ctx: Any, destination: int, source: int, nbytes: int, streams: bool) -> None:
    """Copy ``nbytes``, if that is more than 0, out of the slot of a peer."""
    if nbytes > 0 and not streams and has_own_core(ctx):
        copy_fetching(destination, source, nbytes)
    else:
        # Ranks that take turns on a core find there what the last one has stored.
        move_bytes(destination, source, nbytes, streams)
    fail_at(ctx, COPY_OUT)
