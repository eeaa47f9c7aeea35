"""Without slots: collectives that read the peers' own buffers.

A buffer in the shared heap lies at an offset of its rank's area, and the areas are mapped by all.
Any other buffer is private: peers read it by the system call process_vm_readv, which copies it
once, where slots cost two copies. The system may forbid it (ptrace(2), "access mode checking"), so
the first large collective of a group has a trial, and all ranks go by what all of them found.

A large collective begins with a *probe*: a round whose lines carry

    word 0    the send buffer: 1 + offset in this rank's area if it is shared, or minus its
              address if it is private and can be read, or 0
    word 1    the receive buffer, likewise
    word 4    address of this rank's context, for the trial

After it all ranks know the same of all buffers and choose alike. Where they cannot be read as an
algorithm needs it, or slots have been found to take less time (``choices.py``), the one that copies
through slots follows, for one round more.

The trial: each rank reads the word RANK in the context of every peer, and says in one more round
whether it found the right numbers. A rank offers a private buffer only if the same system call can
read it in its own process, for there is memory (of devices) that it cannot read.

Visible: what a rank wrote into its buffer before the call precedes its P of the probe.

Reuse: a buffer belongs to its program again when the call returns, so every algorithm here ends
with a round, whose P each rank stores after its last access to the buffers of others.

Death: the shared heap stays when a rank dies, private memory does not. A read that fails ends the
collective with LOST, also when the dead rank had published all of its rounds.
"""

from __future__ import annotations

from typing import Any

from cobre_shm import layout, tuning
from cobre_shm.kernels import context
from cobre_shm.kernels.atomics import load_plain, store_plain
from cobre_shm.kernels.choices import chooses_slots
from cobre_shm.kernels.copying import call_reduction, copy_bytes, move_bytes, streaming_fence
from cobre_shm.kernels.failing import COPY_OUT, REDUCE, fail_at
from cobre_shm.kernels.jit import inlined
from cobre_shm.kernels.parts import part_start
from cobre_shm.kernels.rounds import end, observe, own_line, publish
from cobre_shm.kernels.switches import (
    ALLOWED,
    NOT_ALLOWED,
    PIECE_BYTES,
    UNTRIED,
    is_streaming,
    may_read_peers,
)
from cobre_shm.kernels.system import process_vm_read
from cobre_shm.kernels.waiting import arrival_line

__all__ = [
    "SENDS_READABLE",
    "allreduce_without_slots",
    "can_do_without_slots",
    "ending_round",
    "fetch_from",
    "is_readable",
    "probe",
    "reduce_from",
]

# What a probe found, as bits. Readable are those that are shared, and private ones if allowed.
_SENDS_SHARED, _RECVS_SHARED, _APART, SENDS_READABLE, _RECVS_READABLE = 1, 2, 4, 8, 16
# Stages of a probe.
_BUFFERS, _TRIAL, _DONE = 0, 1, 2

_CONTEXT = layout.INLINE + 32
# Of private memory at once: a fraction of the second-level cache.
_READ_BYTES = context.SCRATCH_BYTES // 2
# Of one buffer until Python looks for signals.
_BYTES_PER_CALL = 1 << 26


@inlined
def _read_peer(ctx: Any, rank: int, destination: int, source: int, nbytes: int) -> bool:
    """Copy private memory of a peer; False with SUSPECT: it could not be read."""
    pid = load_plain(ctx[context.CONTROL] + rank * layout.CONTROL_BYTES + layout.PID)
    done = 0
    while done < nbytes:
        copied = process_vm_read(pid, destination + done, source + done, nbytes - done)
        if copied <= 0:
            ctx[context.SUSPECT] = rank
            return False
        done += copied
    return True


@inlined
def _offer(ctx: Any, what: int, nbytes: int, address: int) -> int:
    """The word of a probe for an own buffer; address 0: nobody needs it."""
    stride = ctx[context.HEAP_STRIDE]
    offset = address - ctx[context.HEAP] - ctx[context.RANK] * stride
    if offset >= 0 and offset < stride:
        return offset + 1
    if address == 0 or not may_read_peers(ctx, what, nbytes):
        return 0
    readable = _read_peer(ctx, ctx[context.RANK], ctx[context.SCRATCH], address, 1)
    return -address if readable else 0


@inlined
def _place(ctx: Any, rank: int, word: int) -> int:
    """Where this rank finds what a peer offered: an address here, minus one there, or 0."""
    if word > ctx[context.HEAP_STRIDE]:
        return 0  # damaged
    if word > 0:
        return ctx[context.HEAP] + rank * ctx[context.HEAP_STRIDE] + word - 1
    # Its own memory a rank reads directly.
    return -word if rank == ctx[context.RANK] else word


@inlined
def _source(ctx: Any, rank: int) -> int:
    return load_plain(ctx[context.SOURCES] + 16 * rank)


@inlined
def _target(ctx: Any, rank: int) -> int:
    return load_plain(ctx[context.SOURCES] + 16 * rank + 8)


@inlined
def is_readable(ctx: Any, rank: int) -> bool:
    """Whether all can read this rank's send buffer, after a probe."""
    return _source(ctx, rank) != 0


@inlined
def probe(ctx: Any, what: int, nbytes: int, send: int, recv: int) -> int:
    """The first round of a collective that may do without slots; READY at once when done.

    ``send`` and ``recv``: the buffers that others may read, or 0. ``what`` and ``nbytes``: of the
    collective.
    """
    if ctx[context.PROBED] == _DONE:
        return context.READY
    if ctx[context.STAGE] == context.DEPOSIT:
        line = own_line(ctx) + layout.INLINE
        if ctx[context.PROBED] == _BUFFERS:
            store_plain(line, _offer(ctx, what, nbytes, send))
            store_plain(line + 8, _offer(ctx, what, nbytes, recv))
            store_plain(own_line(ctx) + _CONTEXT, ctx[context.SELF])
        else:
            store_plain(line, ctx[context.READS_SUCCEED])
        status = publish(ctx)
        if status != context.READY:
            return status
    status = observe(ctx)
    if status != context.READY:
        return status
    ctx[context.STAGE] = context.DEPOSIT
    if ctx[context.PROBED] == _BUFFERS:
        _look_at_buffers(ctx)
        if ctx[context.PEER_READS] == UNTRIED and may_read_peers(ctx, what, nbytes):
            _try_to_read(ctx)
            ctx[context.PROBED] = _TRIAL
            return context.PENDING
    else:
        ctx[context.PEER_READS] = ALLOWED
        for rank in range(ctx[context.SIZE]):
            line = arrival_line(ctx, ctx[context.EPOCH], rank) + layout.INLINE
            if load_plain(line) == 0:
                ctx[context.PEER_READS] = NOT_ALLOWED
    if ctx[context.PEER_READS] != ALLOWED:
        _forget_private_buffers(ctx)
    if chooses_slots(ctx):
        _forget_all_buffers(ctx)
    _find(ctx)
    ctx[context.PROBED] = _DONE
    ctx[context.PROGRESS] = 0
    return context.READY


@inlined
def _look_at_buffers(ctx: Any) -> None:
    found = _APART
    for rank in range(ctx[context.SIZE]):
        line = arrival_line(ctx, ctx[context.EPOCH], rank) + layout.INLINE
        ours, theirs = load_plain(line), load_plain(line + 8)
        if ours == theirs:
            found = 0
        store_plain(ctx[context.SOURCES] + 16 * rank, _place(ctx, rank, ours))
        store_plain(ctx[context.SOURCES] + 16 * rank + 8, _place(ctx, rank, theirs))
    ctx[context.FOUND] = found


@inlined
def _try_to_read(ctx: Any) -> None:
    ctx[context.READS_SUCCEED] = 1
    for rank in range(ctx[context.SIZE]):
        theirs = load_plain(arrival_line(ctx, ctx[context.EPOCH], rank) + _CONTEXT)
        room = ctx[context.SCRATCH]
        is_read = _read_peer(ctx, rank, room, theirs + 8 * context.RANK, 8)
        if not is_read or load_plain(room) != rank:
            ctx[context.READS_SUCCEED] = 0


@inlined
def _forget_private_buffers(ctx: Any) -> None:
    for index in range(2 * ctx[context.SIZE]):
        word = ctx[context.SOURCES] + 8 * index
        stride = ctx[context.HEAP_STRIDE]
        offset = load_plain(word) - ctx[context.HEAP]
        if offset < 0 or offset >= ctx[context.SIZE] * stride:
            store_plain(word, 0)


@inlined
def _forget_all_buffers(ctx: Any) -> None:
    for index in range(2 * ctx[context.SIZE]):
        store_plain(ctx[context.SOURCES] + 8 * index, 0)


@inlined
def _find(ctx: Any) -> None:
    """Sum up the table of buffers."""
    found = _SENDS_SHARED | _RECVS_SHARED | SENDS_READABLE | _RECVS_READABLE
    first, stride = ctx[context.HEAP], ctx[context.HEAP_STRIDE]
    for rank in range(ctx[context.SIZE]):
        area = first + rank * stride
        send, recv = _source(ctx, rank) - area, _target(ctx, rank) - area
        if send < 0 or send >= stride:
            found &= ~_SENDS_SHARED
        if recv < 0 or recv >= stride:
            found &= ~_RECVS_SHARED
        if _source(ctx, rank) == 0:
            found &= ~SENDS_READABLE
        if _target(ctx, rank) == 0:
            found &= ~_RECVS_READABLE
    ctx[context.FOUND] |= found


@inlined
def ending_round(ctx: Any, nbytes: int) -> int:
    """The last round of a collective without slots; resumable."""
    if ctx[context.STAGE] == context.DEPOSIT:
        status = publish(ctx)
        if status != context.READY:
            return status
    status = observe(ctx)
    if status != context.READY:
        return status
    return end(ctx, nbytes)


@inlined
def _fetch(
    ctx: Any, rank: int, place: int, offset: int, destination: int, nbytes: int, streams: bool
) -> int:
    """Copy ``nbytes`` at ``offset`` of a rank's buffer; READY, PENDING, LOST; resumable."""
    while ctx[context.PROGRESS] < nbytes:
        done = ctx[context.PROGRESS]
        piece = min(_BYTES_PER_CALL, nbytes - done)
        if place > 0:
            move_bytes(destination + done, place + offset + done, piece, streams)
        elif not _read_peer(ctx, rank, destination + done, offset + done - place, piece):
            return context.LOST
        fail_at(ctx, COPY_OUT)
        ctx[context.PROGRESS] += piece
        if ctx[context.PROGRESS] < nbytes:
            return context.PENDING
    ctx[context.PROGRESS] = 0
    return context.READY


@inlined
def fetch_from(ctx: Any, rank: int, destination: int, nbytes: int, streams: bool) -> int:
    """Copy a rank's send buffer; READY, PENDING, LOST; resumable."""
    return _fetch(ctx, rank, _source(ctx, rank), 0, destination, nbytes, streams)


@inlined
def _operand(ctx: Any, rank: int, offset: int, nbytes: int, room: int) -> int:
    """Address of a part of a rank's send buffer, perhaps after a copy to ``room``; 0: LOST."""
    place = _source(ctx, rank)
    if place > 0:
        return place + offset
    return room if _read_peer(ctx, rank, room, offset - place, nbytes) else 0


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
) -> int:
    """Reduce ``nbytes`` at ``offset`` of all ranks' send buffers, in rank order; resumable.

    ``apart``: the destination is none of them. Otherwise, and past the caches, each piece is
    made in private memory first.
    """
    size = ctx[context.SIZE]
    all_shared = ctx[context.FOUND] & _SENDS_SHARED != 0
    most = PIECE_BYTES if all_shared else _READ_BYTES
    room = ctx[context.SCRATCH] + _READ_BYTES
    while ctx[context.PROGRESS] < nbytes:
        done = ctx[context.PROGRESS]
        piece = min(most, nbytes - done)
        at = offset + done
        place = destination + done if apart and not streams else ctx[context.SCRATCH]
        if size == 1:
            copy_bytes(place, _source(ctx, 0) + at, piece)
        else:
            count = piece // item_bytes
            a = _operand(ctx, 0, at, piece, place)
            if a == 0:
                return context.LOST
            for rank in range(1, size):
                b = _operand(ctx, rank, at, piece, room)
                if b == 0:
                    return context.LOST
                call_reduction(reduction, place, a, b, count)
                fail_at(ctx, REDUCE)
                a = place
        if place != destination + done:
            move_bytes(destination + done, place, piece, streams)
        ctx[context.PROGRESS] += piece
        if ctx[context.PROGRESS] % _BYTES_PER_CALL == 0 and ctx[context.PROGRESS] < nbytes:
            return context.PENDING
    if streams:
        # Peers read it after the next publication.
        streaming_fence()
    ctx[context.PROGRESS] = 0
    return context.READY


@inlined
def _reduces_everything(ctx: Any) -> bool:
    """Everybody reads everything: for few ranks, and only where nobody writes what others read."""
    found = ctx[context.FOUND]
    if found & _SENDS_SHARED == 0 or found & _RECVS_SHARED != 0 or found & _APART == 0:
        return False
    return ctx[context.SIZE] <= ctx[context.TUNING + tuning.STREAM_RANKS]


@inlined
def can_do_without_slots(ctx: Any) -> bool:
    """Whether the buffers that a probe found allow an allreduce without copies through slots."""
    found = ctx[context.FOUND]
    if found & SENDS_READABLE != 0 and found & _RECVS_READABLE != 0:
        return True
    return _reduces_everything(ctx)


@inlined
def allreduce_without_slots(
    ctx: Any, recv: int, count: int, item_bytes: int, reduction: int
) -> int:
    """Allreduce of buffers that all can read; resumable.

    Each rank reduces its part, and copies those of the others from where they have put them. A
    rank reads of a send buffer only its own part, and writes of its receive buffer in the first
    step only its own part: so in place is as good. Where only the send buffers can be read, each
    rank reduces everything.
    """
    nbytes = count * item_bytes
    size = ctx[context.SIZE]
    rank = ctx[context.RANK]
    streams = is_streaming(ctx, nbytes)
    apart = ctx[context.FOUND] & _APART != 0
    everything = size == 1 or _reduces_everything(ctx)
    if ctx[context.ROUND] == 0:
        low, high = 0, nbytes
        if not everything:
            low = part_start(count, item_bytes, size, rank) * item_bytes
            high = part_start(count, item_bytes, size, rank + 1) * item_bytes
        status = reduce_from(
            ctx, recv + low, low, high - low, item_bytes, reduction, streams, apart
        )
        if status != context.READY:
            return status
        ctx[context.ROUND] = size + 1 if everything else 1
    if ctx[context.ROUND] == 1 and ctx[context.STAGE] == context.DEPOSIT:
        status = publish(ctx)
        if status != context.READY:
            return status
    if ctx[context.ROUND] == 1:
        status = observe(ctx)
        if status != context.READY:
            return status
        ctx[context.ROUND] = 2
        ctx[context.STAGE] = context.DEPOSIT
    while ctx[context.ROUND] <= size:
        peer = rank + ctx[context.ROUND] - 1
        if peer >= size:
            peer -= size
        low = part_start(count, item_bytes, size, peer) * item_bytes
        high = part_start(count, item_bytes, size, peer + 1) * item_bytes
        status = _fetch(ctx, peer, _target(ctx, peer), low, recv + low, high - low, streams)
        if status != context.READY:
            return status
        ctx[context.ROUND] += 1
    return ending_round(ctx, nbytes)
