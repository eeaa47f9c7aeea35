"""Which algorithm and which chunk: the switch points of ``cobre_shm.tuning``, read by kernels.

Everything here depends on the call and on words that are equal on all ranks, so all ranks choose
the same.
"""

from __future__ import annotations

from typing import Any

from cobre_shm import layout, tuning
from cobre_shm.kernels import context
from cobre_shm.kernels.jit import inlined

__all__ = [
    "ALLOWED",
    "NOT_ALLOWED",
    "PIECE_BYTES",
    "UNTRIED",
    "begins_with_probe",
    "broadcast_chunk",
    "chain_chunk",
    "direct_chunk",
    "gather_chunk",
    "has_own_core",
    "is_chain",
    "is_direct",
    "is_probing",
    "is_streaming",
    "may_read_peers",
    "scatter_chunk",
    "streams_directly",
]

# What stays in the first-level cache while several streams go by.
PIECE_BYTES = 8192

# Whether the ranks may read each other's private memory.
UNTRIED, ALLOWED, NOT_ALLOWED = 0, 1, 2


@inlined
def _word(ctx: Any, index: int) -> int:
    return ctx[context.TUNING + index]


@inlined
def has_own_core(ctx: Any) -> bool:
    """Whether ranks are expected to have cores of their own."""
    return _word(ctx, tuning.SPIN_PAUSES) != 0


@inlined
def _at_most_a_slot(ctx: Any, nbytes: int) -> int:
    return min(nbytes, ctx[context.SLOT_BYTES])


@inlined
def is_streaming(ctx: Any, nbytes: int) -> bool:
    """Whether what all ranks write leaves the caches anyway, so that stores go past them."""
    return nbytes * ctx[context.SIZE] >= _word(ctx, tuning.STREAM_BYTES)


@inlined
def _to_spare(ctx: Any, what: int, nbytes: int) -> int:
    """Bytes by which to decide whether to do without slots.

    Of the two copies of a broadcast one is the root's alone. For an allreduce every rank copies
    into its slots what the others reduce.
    """
    operation = what & 0xFF
    if operation == layout.BROADCAST:
        return nbytes // 2
    if operation in (layout.ALLREDUCE, layout.ALLREDUCE_SHARED):
        return nbytes * max(1, ctx[context.SIZE] - 1)
    return nbytes


@inlined
def may_read_peers(ctx: Any, what: int, nbytes: int) -> bool:
    """Whether ranks offer private buffers of such a collective to be read, if that is allowed."""
    if ctx[context.PEER_READS] == NOT_ALLOWED or ctx[context.SIZE] == 1:
        return False
    if what & 0xFF == layout.BROADCAST and is_streaming(ctx, nbytes // 2):
        return False  # the kernel does not copy past the caches
    return _to_spare(ctx, what, nbytes) >= _word(ctx, tuning.READ_BYTES)


@inlined
def is_probing(ctx: Any, what: int, nbytes: int) -> bool:
    """Whether a collective of ``nbytes`` would begin with a probe; ``what``: its first call word.

    The first probe may find out that nothing can be read, and then this changes.
    """
    if ctx[context.HEAP] != 0 and _to_spare(ctx, what, nbytes) >= _word(ctx, tuning.SHARE_BYTES):
        return True
    return may_read_peers(ctx, what, nbytes)


@inlined
def begins_with_probe(ctx: Any, what: int, nbytes: int) -> bool:
    """Whether a collective that has begun does; also when it goes on, whatever it has found."""
    return ctx[context.PROBED] != 0 or is_probing(ctx, what, nbytes)


@inlined
def is_direct(ctx: Any, nbytes: int) -> bool:
    """Whether an allreduce is one round in which everybody reduces everything."""
    return nbytes <= _at_most_a_slot(ctx, _word(ctx, tuning.DIRECT_BYTES))


@inlined
def streams_directly(ctx: Any) -> bool:
    """Whether a larger allreduce is a sequence of such rounds."""
    return ctx[context.SIZE] <= _word(ctx, tuning.STREAM_RANKS)


@inlined
def is_chain(ctx: Any, nbytes: int) -> bool:
    """Whether an allreduce hands one accumulator from rank to rank."""
    return ctx[context.SIZE] > 1 and nbytes >= _word(ctx, tuning.CHAIN_MIN_BYTES)


@inlined
def chain_chunk(ctx: Any, per_slot: int) -> int:
    """Bytes of a part of a chain, of which a slot holds ``per_slot``."""
    return min(_word(ctx, tuning.CHAIN_CHUNK), ctx[context.SLOT_BYTES] // per_slot)


@inlined
def direct_chunk(ctx: Any) -> int:
    """Bytes of a chunk of a direct streaming allreduce."""
    return _at_most_a_slot(ctx, _word(ctx, tuning.DIRECT_CHUNK))


@inlined
def scatter_chunk(ctx: Any, nbytes: int) -> int:
    """Bytes of a chunk of an allreduce by reduce-scatter and all-gather."""
    if is_streaming(ctx, nbytes):
        return _at_most_a_slot(ctx, _word(ctx, tuning.SCATTER_STREAM_CHUNK))
    return _at_most_a_slot(ctx, _word(ctx, tuning.SCATTER_CHUNK))


@inlined
def gather_chunk(ctx: Any, total: int) -> int:
    """Bytes of a rank's chunk of an allgatherv of ``total`` bytes."""
    if is_streaming(ctx, total):
        return _at_most_a_slot(ctx, _word(ctx, tuning.GATHER_STREAM_CHUNK))
    return _at_most_a_slot(ctx, _word(ctx, tuning.GATHER_CHUNK))


@inlined
def broadcast_chunk(ctx: Any, nbytes: int) -> int:
    """Bytes of a chunk of a broadcast."""
    if nbytes <= _word(ctx, tuning.BROADCAST_SMALL_BYTES):
        return _at_most_a_slot(ctx, _word(ctx, tuning.BROADCAST_SMALL_CHUNK))
    return _at_most_a_slot(ctx, _word(ctx, tuning.BROADCAST_CHUNK))
