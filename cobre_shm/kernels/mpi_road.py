"""The fast road to the functions of an MPI library: methods as C functions, like ``road.py``.

Handled is what one call of MPI does: exact numpy arrays, C-contiguous, of a dtype and reduction
that the communicator has met before, below the largest message. Anything else, and whatever is
wrong, goes to the Python method of the same name, before anything is sent. A function of MPI that
fails leaves its code for the Python method ``_finish_...``, which raises.

One thread at a time is inside a communicator: on the road, which has BUSY set meanwhile, or in a
Python method, which has METHOD set. All who set or read these words have the GIL, and so have those
who write the rooms that MPI reads; the road looks at both words and sets its own without giving up
the GIL in between. Who finds another thread inside goes to the Python method, which refuses.

The words are those of ``context.py``, as far as they apply, and those of ``mpi_words.py``. The
kernels of the road are MPI_Barrier, MPI_Bcast, MPI_Allreduce and MPI_Allgatherv; handles are passed
as MPI itself defined them, an integer or a pointer, in one 64-bit argument. In an entry of
``known.py`` TAG is the datatype and WHAT the operation with which MPI reduces, if there is no
REDUCTION.
"""

from __future__ import annotations

from typing import Any

from cobre_shm.kernels import context, known
from cobre_shm.kernels.atomics import load_plain, store_plain
from cobre_shm.kernels.jit import inlined
from cobre_shm.kernels.mpi_words import (
    ALLGATHER,
    BYTE,
    CLOSED,
    COMM,
    COUNTS,
    ERROR,
    IN_PLACE,
    LENGTHS,
    LIST_TYPE,
    METHOD,
    PIECE_BYTES,
    ROOM,
    SMALL_BYTES,
)
from cobre_shm.kernels.objects import (
    ARRAY_DATA,
    ARRAY_DESCR,
    LIST_ITEMS,
    LIST_SIZE,
    TUPLE_ITEMS,
    TUPLE_SIZE,
    TYPE,
)
from cobre_shm.kernels.python_c import (
    call_function,
    call_one,
    call_with_self,
    decref,
    incref,
    integer_of,
    release_gil,
    store_i32,
    take_gil,
)
from cobre_shm.kernels.road import (
    C_CONTIGUOUS,
    WRITEABLE,
    context_of,
    element_count,
    is_integers,
    is_layout,
    is_plain,
    known_entry,
    overlap,
    own_start,
)
from cobre_shm.kernels.rows import reduce_rows

__all__ = [
    "allgatherv_call",
    "allreduce_call",
    "barrier_call",
    "broadcast_call",
]


@inlined
def _is_free(ctx: Any) -> bool:
    """Whether a call may take the road now; with the GIL."""
    return ctx[CLOSED] == 0 and ctx[METHOD] == 0 and ctx[context.BUSY] == 0


@inlined
def _begin(ctx: Any) -> int:
    """Be inside, and give up the GIL; return what takes it back."""
    ctx[context.BUSY] = 1
    return release_gil()


@inlined
def _is_done(ctx: Any, thread: int, code: int) -> bool:
    """Take the GIL back, and let the next call begin, unless MPI's function has failed."""
    take_gil(thread)
    # An int of C: the upper half of the register is anything.
    ctx[ERROR] = code & 0xFFFFFFFF
    if ctx[ERROR] != 0:
        ctx[CLOSED] = 1
    ctx[context.BUSY] = 0
    return ctx[ERROR] == 0


@inlined
def barrier_call(instance: int, unused: int) -> int:
    """METH_NOARGS."""
    ctx = context_of(instance)
    if not _is_free(ctx):
        return call_with_self(ctx[context.BARRIER_METHOD], instance, instance, 0, 0)
    thread = _begin(ctx)
    code = call_function(ctx[context.BARRIER_KERNEL], ctx[COMM], 0, 0, 0, 0, 0, 0, 0, 0, 0)
    if not _is_done(ctx, thread, code):
        return call_with_self(ctx[context.BARRIER_FINISH], instance, instance, 0, 0)
    incref(ctx[context.NONE])
    return ctx[context.NONE]


@inlined
def broadcast_call(instance: int, args: int, nargs: int, kwnames: int) -> int:
    """METH_FASTCALL | METH_KEYWORDS: (buf, root=0)."""
    ctx = context_of(instance)
    method = ctx[context.BROADCAST_METHOD]
    root = 0
    is_named = (
        kwnames != 0
        and load_plain(kwnames + TUPLE_SIZE) == 1
        and load_plain(kwnames + TUPLE_ITEMS) == ctx[context.NAME_ROOT]
    )
    given = nargs + 1 if is_named else nargs
    if (kwnames != 0 and not is_named) or nargs < 1 or given > 2 or not _is_free(ctx):
        return call_with_self(method, instance, args, nargs, kwnames)
    if given == 2:
        number = load_plain(args + 8)
        if load_plain(number + TYPE) != ctx[context.INT_TYPE]:
            return call_with_self(method, instance, args, nargs, kwnames)
        root = integer_of(number)
    buf = load_plain(args)
    entry = 0
    if root >= 0 and root < ctx[context.SIZE] and is_plain(ctx, buf, C_CONTIGUOUS | WRITEABLE):
        entry = known_entry(ctx, load_plain(buf + ARRAY_DESCR), 0)
    if entry == 0:
        return call_with_self(method, instance, args, nargs, kwnames)
    nbytes = element_count(buf) * load_plain(entry + known.ITEM_BYTES)
    if nbytes > ctx[PIECE_BYTES]:
        return call_with_self(method, instance, args, nargs, kwnames)
    data = load_plain(buf + ARRAY_DATA)
    thread = _begin(ctx)
    code = call_function(
        ctx[context.BROADCAST_KERNEL], data, nbytes, ctx[BYTE], root, ctx[COMM], 0, 0, 0, 0, 0
    )
    if not _is_done(ctx, thread, code):
        return call_with_self(ctx[context.BROADCAST_FINISH], instance, args, nargs, kwnames)
    incref(buf)
    return buf


@inlined
def _reduce(ctx: Any, entry: int, source: int, target: int, count: int, nbytes: int) -> int:
    """Reduce by one function of MPI, or gather and reduce in rank order here."""
    reduction = load_plain(entry + known.REDUCTION)
    comm, size = ctx[COMM], ctx[context.SIZE]
    if reduction == 0:
        datatype, operation = load_plain(entry + known.TAG), load_plain(entry + known.WHAT)
        if source == target:
            source = ctx[IN_PLACE]
        return call_function(
            ctx[context.ALLREDUCE_KERNEL],
            source,
            target,
            count,
            datatype,
            operation,
            comm,
            0,
            0,
            0,
            0,
        )
    room, byte = ctx[ROOM], ctx[BYTE]
    code = call_function(ctx[ALLGATHER], source, nbytes, byte, room, nbytes, byte, comm, 0, 0, 0)
    if code & 0xFFFFFFFF == 0:
        reduce_rows(
            reduction, target, room, nbytes, size, count, load_plain(entry + known.ITEM_BYTES)
        )
    return code


@inlined
def allreduce_call(instance: int, args: int, nargs: int, kwnames: int) -> int:
    """METH_FASTCALL | METH_KEYWORDS: (send, recv=None, op=SUM)."""
    ctx = context_of(instance)
    method = ctx[context.ALLREDUCE_METHOD]
    op = ctx[context.SUM]
    is_named = (
        kwnames != 0
        and load_plain(kwnames + TUPLE_SIZE) == 1
        and load_plain(kwnames + TUPLE_ITEMS) == ctx[context.NAME_OP]
    )
    if (
        (kwnames != 0 and not is_named)
        or nargs < 1
        or nargs > (2 if is_named else 3)
        or not _is_free(ctx)
    ):
        return call_with_self(method, instance, args, nargs, kwnames)
    if is_named:
        op = load_plain(args + 8 * nargs)
    elif nargs == 3:
        op = load_plain(args + 16)
    send = load_plain(args)
    recv = load_plain(args + 8) if nargs > 1 else ctx[context.NONE]
    if not is_plain(ctx, send, C_CONTIGUOUS):
        return call_with_self(method, instance, args, nargs, kwnames)
    entry = known_entry(ctx, load_plain(send + ARRAY_DESCR), op)
    count = element_count(send)
    if entry == 0 or count == 0:
        return call_with_self(method, instance, args, nargs, kwnames)
    nbytes = count * load_plain(entry + known.ITEM_BYTES)
    is_by_mpi = load_plain(entry + known.REDUCTION) == 0
    # Beyond these it takes several functions of MPI. Both are the same on all ranks.
    if nbytes > (ctx[PIECE_BYTES] if is_by_mpi else ctx[SMALL_BYTES] // ctx[context.SIZE]):
        return call_with_self(method, instance, args, nargs, kwnames)
    source = load_plain(send + ARRAY_DATA)
    is_new = recv == ctx[context.NONE]
    if is_new:
        recv = call_one(ctx[context.EMPTY_LIKE], send)
        if recv == 0:
            return 0
    else:
        if not is_plain(ctx, recv, C_CONTIGUOUS | WRITEABLE):
            return call_with_self(method, instance, args, nargs, kwnames)
        place = load_plain(recv + ARRAY_DATA)
        if (
            load_plain(recv + ARRAY_DESCR) != load_plain(send + ARRAY_DESCR)
            or element_count(recv) != count
            or (source != place and overlap(source, place, nbytes))
        ):
            return call_with_self(method, instance, args, nargs, kwnames)
    if not _is_free(ctx):
        # What made the array may have run any code.
        if is_new:
            decref(recv)
        return call_with_self(method, instance, args, nargs, kwnames)
    target = load_plain(recv + ARRAY_DATA)
    thread = _begin(ctx)
    code = _reduce(ctx, entry, source, target, count, nbytes)
    if not _is_done(ctx, thread, code):
        if is_new:
            decref(recv)
        return call_with_self(ctx[context.ALLREDUCE_FINISH], instance, args, nargs, kwnames)
    if not is_new:
        incref(recv)
    return recv


@inlined
def _integers(ctx: Any, obj: int, room: int) -> int:
    """Address of one 64-bit integer per rank; 0: it is neither such a vector nor a list of int."""
    if is_integers(ctx, obj):
        return load_plain(obj + ARRAY_DATA)
    size = ctx[context.SIZE]
    if load_plain(obj + TYPE) != ctx[LIST_TYPE] or load_plain(obj + LIST_SIZE) != size:
        return 0
    items = load_plain(obj + LIST_ITEMS)
    for rank in range(size):
        item = load_plain(items + 8 * rank)
        if load_plain(item + TYPE) != ctx[context.INT_TYPE]:
            return 0
        store_plain(room + 8 * rank, integer_of(item))
    return room


@inlined
def allgatherv_call(instance: int, args: int, nargs: int, kwnames: int) -> int:
    """METH_FASTCALL | METH_KEYWORDS: (send, recv, counts, displs=None)."""
    ctx = context_of(instance)
    method = ctx[context.ALLGATHERV_METHOD]
    if kwnames != 0 or nargs < 3 or nargs > 4 or not _is_free(ctx):
        return call_with_self(method, instance, args, nargs, kwnames)
    send, recv = load_plain(args), load_plain(args + 8)
    if (
        not is_plain(ctx, send, C_CONTIGUOUS)
        or not is_plain(ctx, recv, C_CONTIGUOUS | WRITEABLE)
        or load_plain(recv + ARRAY_DESCR) != load_plain(send + ARRAY_DESCR)
    ):
        return call_with_self(method, instance, args, nargs, kwnames)
    size, room = ctx[context.SIZE], element_count(recv)
    counts = _integers(ctx, load_plain(args + 16), ctx[COUNTS])
    displs = 0
    if nargs == 4 and load_plain(args + 24) != ctx[context.NONE]:
        displs = _integers(ctx, load_plain(args + 24), ctx[COUNTS] + 8 * size)
        if displs == 0:
            return call_with_self(method, instance, args, nargs, kwnames)
    entry = known_entry(ctx, load_plain(send + ARRAY_DESCR), 0)
    if counts == 0 or entry == 0 or not is_layout(ctx, counts, displs, element_count(send), room):
        return call_with_self(method, instance, args, nargs, kwnames)
    item_bytes = load_plain(entry + known.ITEM_BYTES)
    lengths, starts = ctx[LENGTHS], ctx[LENGTHS] + 4 * size
    end = 0
    for rank in range(size):
        length = load_plain(counts + 8 * rank) * item_bytes
        start = load_plain(displs + 8 * rank) * item_bytes if displs != 0 else end
        store_i32(lengths + 4 * rank, length)
        store_i32(starts + 4 * rank, start)
        end = start + length
    # Blocks are in rank order, so this bounds them all, and their sum.
    if end > ctx[PIECE_BYTES]:
        return call_with_self(method, instance, args, nargs, kwnames)
    own = ctx[context.RANK]
    source, target = load_plain(send + ARRAY_DATA), load_plain(recv + ARRAY_DATA)
    own_bytes = load_plain(counts + 8 * own) * item_bytes
    if own_bytes > 0 and source == target + own_start(ctx, counts, displs) * item_bytes:
        source = ctx[IN_PLACE]
    elif source < target + room * item_bytes and target < source + own_bytes:
        return call_with_self(method, instance, args, nargs, kwnames)
    byte = ctx[BYTE]
    thread = _begin(ctx)
    code = call_function(
        ctx[context.ALLGATHERV_KERNEL],
        source,
        own_bytes,
        byte,
        target,
        lengths,
        starts,
        byte,
        ctx[COMM],
        0,
        0,
    )
    if not _is_done(ctx, thread, code):
        return call_with_self(ctx[context.ALLGATHERV_FINISH], instance, args, nargs, kwnames)
    incref(recv)
    return recv
