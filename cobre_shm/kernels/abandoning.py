"""Python's part of a collective that a kernel could not finish alone, and the exceptions there.

A signal handler runs where Python code begins or loops. So what it raises can come out of the
function that was to go on with a collective before that function's first statement, where nothing
in it could catch it. Only its caller, which is a kernel, can: it has the collective *abandoned*,
so that the peers learn of it, and passes the exception on. Jitted code knows no exceptions, so
there it waits in the context until ``jit.check`` asks for it.

Whatever touches the exception in the context has the GIL from the first look to the last.
"""

from __future__ import annotations

from typing import Any

from cobre_shm.kernels import context
from cobre_shm.kernels.atomics import load_acquire, store_release
from cobre_shm.kernels.jit import inlined
from cobre_shm.kernels.python_c import (
    as_words,
    call_none,
    call_one,
    clear_exception,
    decref,
    ensure_gil,
    fetch_exception,
    leave_gil,
    new_integer,
    print_exception,
    restore_exception,
)

__all__ = ["call_back", "passed_on", "raise_kept"]

# A further signal may interrupt the abandoning in the same way; nobody can send many in time.
_ATTEMPTS = 5


@inlined
def passed_on(ctx: Any, result: int) -> int:
    """Return what Python returned for a collective that it was to finish; 0: it raised."""
    if result == 0 and _is_unfinished(ctx):
        kind, value, trace = fetch_exception()
        _abandon(ctx)
        restore_exception(kind, value, trace)
    return result


@inlined
def call_back(own: int, method: int, finishes: int, vector: int) -> int:
    """Call a Python method for jitted code.

    Args:
        own: Address of the context.
        method: Address of the method, which takes the address of a vector.
        finishes: Whether it is to finish a collective of this thread.
        vector: Address of ten integers.

    Returns:
        READY, or FAILED: what was raised is kept in the context, in the place of what was there.
    """
    ctx = as_words(own)
    state = ensure_gil()
    status = context.READY
    number = new_integer(vector)
    result = call_one(method, number) if number != 0 else 0
    if result != 0:
        decref(result)
    else:
        kind, value, trace = fetch_exception()
        if finishes and _is_unfinished(ctx):
            _abandon(ctx)
        _keep(ctx, kind, value, trace)
        status = context.FAILED
    if number != 0:
        decref(number)
    leave_gil(state)
    return status


@inlined
def raise_kept(own: int) -> int:
    """Set the exception that is kept in the context, if there is one; for a caller with the GIL."""
    ctx = as_words(own)
    kind, value, trace = ctx[context.RAISED], ctx[context.RAISED + 1], ctx[context.RAISED + 2]
    ctx[context.RAISED], ctx[context.RAISED + 1], ctx[context.RAISED + 2] = 0, 0, 0
    if kind != 0:
        restore_exception(kind, value, trace)
    return 0


@inlined
def _keep(ctx: Any, kind: int, value: int, trace: int) -> None:
    old = ctx[context.RAISED], ctx[context.RAISED + 1], ctx[context.RAISED + 2]
    ctx[context.RAISED], ctx[context.RAISED + 1], ctx[context.RAISED + 2] = kind, value, trace
    # Last: what goes with it may be any code.
    for reference in old:
        if reference != 0:
            decref(reference)


@inlined
def _is_unfinished(ctx: Any) -> bool:
    return load_acquire(ctx[context.SELF] + 8 * context.BUSY) != 0


@inlined
def _abandon(ctx: Any) -> None:
    """Fail the group, unless it has failed already; with the GIL, and without an exception."""
    # One rank alone has no peers to tell: it may begin anew, unless it was closed behind the last.
    if ctx[context.ABANDON] == 0:
        if ctx[context.STAGE] != context.IDLE:
            ctx[context.STAGE] = context.IDLE
            store_release(ctx[context.SELF] + 8 * context.BUSY, 0)
        return
    for attempt in range(_ATTEMPTS):
        result = call_none(ctx[context.ABANDON])
        if result != 0:
            decref(result)
            return
        if attempt < _ATTEMPTS - 1:
            clear_exception()
        else:
            print_exception()
