"""Python's part of a collective that a kernel could not finish alone, and the exceptions there.

A signal handler runs where Python code begins or loops. So what it raises can come out of the
function that was to go on with a collective before that function's first statement, where nothing
in it could catch it. Only its caller, which is a kernel, can: it has the collective *abandoned*,
so that the peers learn of it, and passes the exception on.
"""

from __future__ import annotations

from typing import Any

from cobre_shm.kernels import context
from cobre_shm.kernels.atomics import load_acquire
from cobre_shm.kernels.jit import inlined
from cobre_shm.kernels.python_c import (
    as_words,
    call_none,
    clear_exception,
    decref,
    ensure_gil,
    keep_exception,
    leave_gil,
    raise_kept_exception,
)

__all__ = ["call_back", "passed_on"]

# A further signal may interrupt the abandoning in the same way; nobody can send many in time.
_ATTEMPTS = 5


@inlined
def passed_on(ctx: Any, result: int) -> int:
    """Return what Python returned for a collective that it was to finish; 0: it raised."""
    if result == 0 and _is_unfinished(ctx):
        keep_exception(ctx[context.SELF] + 8 * context.RAISED)
        _abandon(ctx)
        raise_kept_exception(ctx[context.SELF] + 8 * context.RAISED)
    return result


@inlined
def call_back(own: int, method: int, finishes: int) -> int:
    """Call a Python method without arguments for jitted code, which knows no exceptions.

    Args:
        own: Address of the context.
        method: Address of the method.
        finishes: Whether it is to finish a collective of this thread.

    Returns:
        READY, or FAILED: what was raised is kept in the context.
    """
    ctx = as_words(own)
    state = ensure_gil()
    result = call_none(method)
    status = context.READY
    if result != 0:
        decref(result)
    else:
        keep_exception(own + 8 * context.RAISED)
        if finishes and _is_unfinished(ctx):
            _abandon(ctx)
        status = context.FAILED
    leave_gil(state)
    return status


@inlined
def _is_unfinished(ctx: Any) -> bool:
    return load_acquire(ctx[context.SELF] + 8 * context.BUSY) != 0


@inlined
def _abandon(ctx: Any) -> None:
    """Fail the group, unless it has failed already; with the GIL, and without an exception."""
    for _ in range(_ATTEMPTS):
        # One rank alone has no peers to tell.
        if ctx[context.ABANDON] == 0:
            return
        result = call_none(ctx[context.ABANDON])
        if result != 0:
            decref(result)
            return
        clear_exception()
