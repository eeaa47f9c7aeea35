"""The fast road: methods of the shm communicator as C functions for CPython's own calling.

Each function has the form of METH_FASTCALL | METH_KEYWORDS, ``(self, args, nargs, kwnames)``, and
is called with the GIL. It handles what loops call: exact numpy arrays, C-contiguous, of a dtype and
reduction that the communicator has met before. Anything else, however slightly unusual, goes to
the Python method of the same name, which checks, explains, and remembers.

The GIL is kept for the first microseconds of a small operation, for giving it up and taking it back
costs more than a barrier; LONGER tells that the peers are not there yet, and that it has to go.

A kernel that comes back with anything but READY has begun the operation: the Python method
``_finish_...`` goes on with it, sees signals, time limits and failures, and raises. What it raises
before it is there leaves the operation unfinished, see ``abandoning.py``.
"""

from __future__ import annotations

from typing import Any

from cobre_shm import layout
from cobre_shm.kernels import context, known, plans
from cobre_shm.kernels.abandoning import passed_on
from cobre_shm.kernels.atomics import load_acquire, load_plain, store_plain
from cobre_shm.kernels.jit import inlined
from cobre_shm.kernels.objects import (
    ARRAY_DATA,
    ARRAY_DESCR,
    ARRAY_DIMS,
    ARRAY_FLAGS,
    ARRAY_NDIM,
    STATE,
    TUPLE_ITEMS,
    TUPLE_SIZE,
    TYPE,
)
from cobre_shm.kernels.python_c import (
    as_words,
    call_kernel_3,
    call_kernel_6,
    call_kernel_7,
    call_kernel_8,
    call_one,
    call_with_self,
    decref,
    incref,
    integer_of,
    load_i32,
    release_gil,
    store_i32,
    take_gil,
)
from cobre_shm.tuning import COMMON_BYTES

__all__ = [
    "C_CONTIGUOUS",
    "WRITEABLE",
    "allgatherv_call",
    "allreduce_call",
    "allreduce_shared_call",
    "barrier_call",
    "broadcast_call",
    "context_of",
    "element_count",
    "is_free",
    "is_integers",
    "is_layout",
    "is_plain",
    "known_entry",
    "overlap",
    "plan_call",
]

C_CONTIGUOUS, WRITEABLE = 0x1, 0x400
# Payloads up to this size are exchanged with the GIL held, as long as nobody is late.
_HOLD_BYTES = 16384


@inlined
def context_of(instance: int) -> Any:
    """The words of a communicator."""
    return as_words(load_plain(load_plain(instance + STATE) + ARRAY_DATA))


@inlined
def is_plain(ctx: Any, obj: int, flags: int) -> bool:
    """Whether it is an exact numpy array with all of ``flags``."""
    if load_plain(obj + TYPE) != ctx[context.ARRAY_TYPE]:
        return False
    return (load_i32(obj + ARRAY_FLAGS) & flags) == flags


@inlined
def element_count(array: int) -> int:
    """Elements of a numpy array."""
    count = 1
    dims = load_plain(array + ARRAY_DIMS)
    for axis in range(load_i32(array + ARRAY_NDIM)):
        count *= load_plain(dims + 8 * axis)
    return count


@inlined
def known_entry(ctx: Any, descr: int, op: int) -> int:
    """Address of what is known of a dtype and reduction; 0: nothing."""
    entry = ctx[context.KNOWN]
    for _ in range(ctx[context.KNOWN_COUNT]):
        if load_plain(entry + known.DESCR) == descr and load_plain(entry + known.OP) == op:
            return entry
        entry += known.BYTES
    return 0


@inlined
def overlap(a: int, b: int, nbytes: int) -> bool:
    """Whether two pieces of memory of ``nbytes`` have a byte in common."""
    return a < b + nbytes and b < a + nbytes


@inlined
def _begin_holding(ctx: Any, nbytes: int) -> int:
    """Keep the GIL (0), or give it up and return what takes it back."""
    if nbytes <= _HOLD_BYTES:
        ctx[context.HOLDING] = 1
        return 0
    return release_gil()


@inlined
def _end_holding(ctx: Any, thread: int) -> None:
    if thread != 0:
        take_gil(thread)
    else:
        ctx[context.HOLDING] = 0


@inlined
def is_free(ctx: Any) -> bool:
    """Whether a collective may begin; otherwise the Python method says why not."""
    return load_acquire(ctx[context.SELF] + 8 * context.BUSY) == 0


@inlined
def barrier_call(instance: int, unused: int) -> int:
    """METH_NOARGS."""
    ctx = context_of(instance)
    if not is_free(ctx):
        return call_with_self(ctx[context.BARRIER_METHOD], instance, instance, 0, 0)
    own = ctx[context.SELF]
    kernel = ctx[context.BARRIER_KERNEL]
    ctx[context.HOLDING] = 1
    status = call_kernel_3(kernel, own, 0, layout.BARRIER, 0, 0)
    ctx[context.HOLDING] = 0
    if status == context.LONGER:
        thread = release_gil()
        status = call_kernel_3(kernel, own, 1, layout.BARRIER, 0, 0)
        take_gil(thread)
    if status != context.READY:
        if status == context.TAKEN:
            return call_with_self(ctx[context.BARRIER_METHOD], instance, instance, 0, 0)
        return passed_on(ctx, call_with_self(ctx[context.BARRIER_FINISH], instance, instance, 0, 0))
    incref(ctx[context.NONE])
    return ctx[context.NONE]


@inlined
def allreduce_call(instance: int, args: int, nargs: int, kwnames: int) -> int:
    """METH_FASTCALL | METH_KEYWORDS: (send, recv=None, op=SUM)."""
    ctx = context_of(instance)
    method = ctx[context.ALLREDUCE_METHOD]
    op = ctx[context.SUM]
    if kwnames != 0:
        is_op = (
            load_plain(kwnames + TUPLE_SIZE) == 1
            and load_plain(kwnames + TUPLE_ITEMS) == ctx[context.NAME_OP]
        )
        if not is_op or nargs > 2:
            return call_with_self(method, instance, args, nargs, kwnames)
        op = load_plain(args + 8 * nargs)
    elif nargs == 3:
        op = load_plain(args + 16)
    if nargs < 1 or nargs > 3 or not is_free(ctx):
        return call_with_self(method, instance, args, nargs, kwnames)
    send = load_plain(args)
    recv = load_plain(args + 8) if nargs > 1 else ctx[context.NONE]
    if not is_plain(ctx, send, C_CONTIGUOUS):
        return call_with_self(method, instance, args, nargs, kwnames)
    entry = known_entry(ctx, load_plain(send + ARRAY_DESCR), op)
    count = element_count(send)
    if entry == 0 or count == 0:
        return call_with_self(method, instance, args, nargs, kwnames)
    item_bytes = load_plain(entry + known.ITEM_BYTES)
    nbytes = count * item_bytes
    source = load_plain(send + ARRAY_DATA)
    is_new = recv == ctx[context.NONE]
    if is_new:
        recv = call_one(ctx[context.EMPTY_LIKE], send)
        if recv == 0:
            return 0
        target = load_plain(recv + ARRAY_DATA)
    else:
        if not is_plain(ctx, recv, C_CONTIGUOUS | WRITEABLE):
            return call_with_self(method, instance, args, nargs, kwnames)
        target = load_plain(recv + ARRAY_DATA)
        if (
            load_plain(recv + ARRAY_DESCR) != load_plain(send + ARRAY_DESCR)
            or element_count(recv) != count
            or (source != target and overlap(source, target, nbytes))
        ):
            return call_with_self(method, instance, args, nargs, kwnames)
    own = ctx[context.SELF]
    kernel = ctx[context.ALLREDUCE_KERNEL]
    what = load_plain(entry + known.WHAT)
    tag = load_plain(entry + known.TAG)
    reduction = load_plain(entry + known.REDUCTION)
    thread = _begin_holding(ctx, nbytes)
    status = call_kernel_7(kernel, own, 0, what, tag, count, source, target, item_bytes, reduction)
    _end_holding(ctx, thread)
    if status == context.LONGER:
        thread = release_gil()
        status = call_kernel_7(
            kernel, own, 1, what, tag, count, source, target, item_bytes, reduction
        )
        take_gil(thread)
    if status == context.READY:
        if not is_new:
            incref(recv)
        return recv
    place = ctx[context.ARGUMENTS]
    store_plain(place, send)
    store_plain(place + 8, recv)
    store_plain(place + 16, op)
    if status == context.TAKEN:
        result = call_with_self(method, instance, place, 3, 0)
    else:
        finish = ctx[context.ALLREDUCE_FINISH]
        result = passed_on(ctx, call_with_self(finish, instance, place, 3, 0))
    if is_new:
        decref(recv)
    return result


@inlined
def allreduce_shared_call(instance: int, args: int, nargs: int, kwnames: int) -> int:
    """METH_FASTCALL | METH_KEYWORDS: (send, op=SUM), of less than makes one result for all."""
    ctx = context_of(instance)
    method = ctx[context.ALLREDUCE_SHARED_METHOD]
    op = ctx[context.SUM]
    is_named = kwnames != 0
    if is_named and (
        nargs != 1
        or load_plain(kwnames + TUPLE_SIZE) != 1
        or load_plain(kwnames + TUPLE_ITEMS) != ctx[context.NAME_OP]
    ):
        return call_with_self(method, instance, args, nargs, kwnames)
    if is_named or nargs == 2:
        op = load_plain(args + 8)
    if nargs < 1 or nargs > 2 or not is_plain(ctx, load_plain(args), C_CONTIGUOUS):
        return call_with_self(method, instance, args, nargs, kwnames)
    send = load_plain(args)
    entry = known_entry(ctx, load_plain(send + ARRAY_DESCR), op)
    nbytes = element_count(send) * load_plain(entry + known.ITEM_BYTES) if entry != 0 else 0
    if nbytes == 0 or nbytes >= ctx[context.TUNING + COMMON_BYTES]:
        return call_with_self(method, instance, args, nargs, kwnames)
    place = ctx[context.ARGUMENTS]
    store_plain(place, send)
    store_plain(place + 8, ctx[context.NONE])
    store_plain(place + 16, op)
    result = allreduce_call(instance, place, 3, 0)
    if result != 0:
        # A new array, of which nobody else knows yet.
        store_i32(result + ARRAY_FLAGS, load_i32(result + ARRAY_FLAGS) & ~WRITEABLE)
    return result


@inlined
def broadcast_call(instance: int, args: int, nargs: int, kwnames: int) -> int:
    """METH_FASTCALL | METH_KEYWORDS: (buf, root=0)."""
    ctx = context_of(instance)
    method = ctx[context.BROADCAST_METHOD]
    root = 0
    given = 0
    if kwnames != 0:
        is_root = (
            load_plain(kwnames + TUPLE_SIZE) == 1
            and load_plain(kwnames + TUPLE_ITEMS) == ctx[context.NAME_ROOT]
        )
        if not is_root or nargs != 1:
            return call_with_self(method, instance, args, nargs, kwnames)
        given = load_plain(args + 8)
    elif nargs == 2:
        given = load_plain(args + 8)
    if nargs < 1 or nargs > 2 or not is_free(ctx):
        return call_with_self(method, instance, args, nargs, kwnames)
    if given != 0:
        if load_plain(given + TYPE) != ctx[context.INT_TYPE]:
            return call_with_self(method, instance, args, nargs, kwnames)
        root = integer_of(given)
    buf = load_plain(args)
    entry = 0
    if root >= 0 and root < ctx[context.SIZE] and is_plain(ctx, buf, C_CONTIGUOUS | WRITEABLE):
        entry = known_entry(ctx, load_plain(buf + ARRAY_DESCR), 0)
    if entry == 0:
        return call_with_self(method, instance, args, nargs, kwnames)
    count = element_count(buf)
    nbytes = count * load_plain(entry + known.ITEM_BYTES)
    own = ctx[context.SELF]
    kernel = ctx[context.BROADCAST_KERNEL]
    what = layout.BROADCAST | root << 16
    tag = load_plain(entry + known.TAG)
    data = load_plain(buf + ARRAY_DATA)
    thread = _begin_holding(ctx, nbytes)
    status = call_kernel_6(kernel, own, 0, what, tag, count, root, data, nbytes)
    _end_holding(ctx, thread)
    if status == context.LONGER:
        thread = release_gil()
        status = call_kernel_6(kernel, own, 1, what, tag, count, root, data, nbytes)
        take_gil(thread)
    if status == context.READY:
        incref(buf)
        return buf
    if status == context.TAKEN:
        return call_with_self(method, instance, args, nargs, kwnames)
    finish = ctx[context.BROADCAST_FINISH]
    return passed_on(ctx, call_with_self(finish, instance, args, nargs, kwnames))


@inlined
def is_integers(ctx: Any, obj: int) -> bool:
    """Whether it is a vector of one 64-bit integer per rank."""
    if not is_plain(ctx, obj, C_CONTIGUOUS):
        return False
    if load_plain(obj + ARRAY_DESCR) != ctx[context.INT64] or load_i32(obj + ARRAY_NDIM) != 1:
        return False
    return load_plain(load_plain(obj + ARRAY_DIMS)) == ctx[context.SIZE]


@inlined
def is_layout(ctx: Any, counts: int, displs: int, send: int, recv: int) -> bool:
    """Whether the blocks lie in ``recv`` in rank order without an overlap.

    ``counts`` and ``displs`` are addresses of integers, ``displs`` 0 where blocks follow each
    other; ``send`` and ``recv`` numbers of elements.
    """
    size = ctx[context.SIZE]
    end = 0
    for rank in range(size):
        count = load_plain(counts + 8 * rank)
        start = load_plain(displs + 8 * rank) if displs != 0 else end
        if count < 0 or count > recv or start < end or start > recv - count:
            return False
        end = start + count
    return load_plain(counts + 8 * ctx[context.RANK]) == send


@inlined
def own_start(ctx: Any, counts: int, displs: int) -> int:
    """Where this rank's block begins in ``recv``, in elements; arguments as of ``is_layout``."""
    rank = ctx[context.RANK]
    if displs != 0:
        return load_plain(displs + 8 * rank)
    start = 0
    for before in range(rank):
        start += load_plain(counts + 8 * before)
    return start


@inlined
def allgatherv_call(instance: int, args: int, nargs: int, kwnames: int) -> int:
    """METH_FASTCALL | METH_KEYWORDS: (send, recv, counts, displs=None)."""
    ctx = context_of(instance)
    method = ctx[context.ALLGATHERV_METHOD]
    if kwnames != 0 or nargs < 3 or nargs > 4 or not is_free(ctx):
        return call_with_self(method, instance, args, nargs, kwnames)
    send, recv, lengths = load_plain(args), load_plain(args + 8), load_plain(args + 16)
    if (
        not is_plain(ctx, send, C_CONTIGUOUS)
        or not is_plain(ctx, recv, C_CONTIGUOUS | WRITEABLE)
        or load_plain(recv + ARRAY_DESCR) != load_plain(send + ARRAY_DESCR)
        or not is_integers(ctx, lengths)
    ):
        return call_with_self(method, instance, args, nargs, kwnames)
    displs = 0
    if nargs == 4 and load_plain(args + 24) != ctx[context.NONE]:
        if not is_integers(ctx, load_plain(args + 24)):
            return call_with_self(method, instance, args, nargs, kwnames)
        displs = load_plain(load_plain(args + 24) + ARRAY_DATA)
    counts = load_plain(lengths + ARRAY_DATA)
    entry = known_entry(ctx, load_plain(send + ARRAY_DESCR), 0)
    room = element_count(recv)
    if entry == 0 or not is_layout(ctx, counts, displs, element_count(send), room):
        return call_with_self(method, instance, args, nargs, kwnames)
    item_bytes = load_plain(entry + known.ITEM_BYTES)
    source, target = load_plain(send + ARRAY_DATA), load_plain(recv + ARRAY_DATA)
    own_bytes = load_plain(counts + 8 * ctx[context.RANK]) * item_bytes
    is_in_place = source == target + own_start(ctx, counts, displs) * item_bytes
    if not is_in_place and source < target + room * item_bytes and target < source + own_bytes:
        return call_with_self(method, instance, args, nargs, kwnames)
    count = 0
    for r in range(ctx[context.SIZE]):
        count += load_plain(counts + 8 * r)
    own = ctx[context.SELF]
    kernel = ctx[context.ALLGATHERV_KERNEL]
    tag = load_plain(entry + known.TAG)
    what = layout.ALLGATHERV
    thread = _begin_holding(ctx, count * item_bytes)
    status = call_kernel_8(
        kernel, own, 0, what, tag, count, source, target, counts, displs, item_bytes
    )
    _end_holding(ctx, thread)
    if status == context.LONGER:
        thread = release_gil()
        status = call_kernel_8(
            kernel, own, 1, what, tag, count, source, target, counts, displs, item_bytes
        )
        take_gil(thread)
    if status == context.READY:
        incref(recv)
        return recv
    if status == context.TAKEN:
        return call_with_self(method, instance, args, nargs, kwnames)
    finish = ctx[context.ALLGATHERV_FINISH]
    return passed_on(ctx, call_with_self(finish, instance, args, nargs, kwnames))


@inlined
def plan_call(plan: int, unused: int) -> int:
    """METH_NOARGS of a plan, whose ``self`` is a tuple that begins with its words."""
    words = as_words(load_plain(load_plain(plan + TUPLE_ITEMS) + ARRAY_DATA))
    ctx = as_words(words[plans.CONTEXT])
    if not is_free(ctx):
        return call_with_self(words[plans.START], plan, plan, 0, 0)
    thread = _begin_holding(ctx, words[plans.NBYTES])
    status = _run_plan(words, 0)
    _end_holding(ctx, thread)
    if status == context.LONGER:
        thread = release_gil()
        status = _run_plan(words, 1)
        take_gil(thread)
    if status == context.TAKEN:
        return call_with_self(words[plans.START], plan, plan, 0, 0)
    if status != context.READY:
        return passed_on(ctx, call_with_self(words[plans.FINISH], plan, plan, 0, 0))
    incref(words[plans.RESULT])
    return words[plans.RESULT]


@inlined
def _run_plan(words: Any, resume: int) -> int:
    kernel, ctx, arity = words[plans.KERNEL], words[plans.CONTEXT], words[plans.ARITY]
    a, b, c = words[plans.ARGUMENTS], words[plans.ARGUMENTS + 1], words[plans.ARGUMENTS + 2]
    if arity == 3:
        return call_kernel_3(kernel, ctx, resume, a, b, c)
    d, e, f = words[plans.ARGUMENTS + 3], words[plans.ARGUMENTS + 4], words[plans.ARGUMENTS + 5]
    if arity == 6:
        return call_kernel_6(kernel, ctx, resume, a, b, c, d, e, f)
    g, h = words[plans.ARGUMENTS + 6], words[plans.ARGUMENTS + 7]
    if arity == 7:
        return call_kernel_7(kernel, ctx, resume, a, b, c, d, e, f, g)
    return call_kernel_8(kernel, ctx, resume, a, b, c, d, e, f, g, h)
