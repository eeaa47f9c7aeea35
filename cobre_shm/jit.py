"""Collectives that are called inside ``@numba.njit`` functions, on the backends shm and local.

    from cobre_shm import jit

    @numba.njit
    def sweep(handle, x, total):
        for turn in range(1000):
            status = jit.allreduce(handle, x, total, jit.SUM)
            if status:
                return status
            ...
        return jit.OK

    with cobre_shm.create_communicator() as comm:
        jit.check(comm, sweep(jit.handle(comm), x, total))

A function returns a status, :data:`OK` (0) or another; with another the collective has failed, and
:func:`check` raises, in Python, what the method of the communicator would have raised there. Until
then the jitted code must return. Buffers are C-contiguous arrays of a dtype that numba computes
with (not ``float16``, which is refused when the code is compiled); all other preconditions are
those of :class:`cobre_shm.Communicator`. Two of them are not told as the method tells them: buffers
that overlap are not noticed, and an ``op`` that is none is an ``InvalidDatatype``.

Waits, time limits, the death of a peer and signals (^C) are seen as in Python: a wait that gets
long is taken over by the interpreter.
"""

from __future__ import annotations

import hashlib
import weakref
from typing import Any

import numba
import numpy as np
from numba import types
from numba.core.errors import TypingError
from numba.extending import overload
from numba.np.numpy_support import as_dtype

from cobre_shm import layout
from cobre_shm.communicator import Communicator
from cobre_shm.datatypes import ReduceOp, dtype_tag, is_movable, is_reducible
from cobre_shm.errors import (
    InvalidBufferSize,
    InvalidCommunicator,
    InvalidDatatype,
    InvalidRoot,
)
from cobre_shm.jit_support import JitSupport
from cobre_shm.kernels import context, known
from cobre_shm.kernels.atomics import load_acquire, load_plain
from cobre_shm.kernels.context import FAILED
from cobre_shm.kernels.jit import OPTIONS, inlined
from cobre_shm.kernels.python_c import (
    as_words,
    call_back_with,
    call_kernel_3,
    call_kernel_6,
    call_kernel_7,
    call_kernel_8,
)

__all__ = [
    "FAILED",
    "MAX",
    "MIN",
    "OK",
    "PROD",
    "SUM",
    "allgatherv",
    "allreduce",
    "barrier",
    "broadcast",
    "check",
    "handle",
]

OK = 0
WRONG_SIZE, WRONG_ROOT, WRONG_LAYOUT, WRONG_OPERATION, WRONG_BUILD = 101, 102, 103, 104, 105

# A program's own cache of jitted code outlives an upgrade of ours, and what is inlined there knows
# the words of a context by their places. So a handle has 15 bits of their hash above the address,
# and code that was compiled with others refuses it.
_BUILD_SHIFT = 48
_ADDRESS = (1 << _BUILD_SHIFT) - 1
_PLACES = sorted(
    (name, value)
    for module in (context, known, layout)
    for name, value in vars(module).items()
    if name.isupper() and isinstance(value, int)
)
_BUILD = int.from_bytes(hashlib.blake2b(repr(_PLACES).encode(), digest_size=2).digest()) >> 1

SUM, PROD, MIN, MAX = (int(op) for op in (ReduceOp.SUM, ReduceOp.PROD, ReduceOp.MIN, ReduceOp.MAX))

_BARRIER, _BROADCAST, _ALLREDUCE, _ALLGATHERV = range(4)


def handle(comm: Communicator) -> int:
    """Return what stands for ``comm`` in jitted code, as long as it is open.

    No signal handler runs in a loop of jitted code. So from now on, where our launcher has started
    the ranks, a Ctrl-C fails the group's collectives a quarter of a second later.

    Raises:
        InvalidCommunicator: The backend cannot be called there.
    """
    support = _supports.get(comm)
    if support is None:
        support = JitSupport(comm)
        _supports[comm] = support
    return support.address | _BUILD << _BUILD_SHIFT


_supports: weakref.WeakKeyDictionary[Communicator, JitSupport] = weakref.WeakKeyDictionary()


def check(comm: Communicator, status: int) -> None:
    """Raise the error for a status other than :data:`OK`.

    Raises:
        CommError: What happened; as the communicator's own method would raise.
        KeyboardInterrupt: Likewise, or what else a signal handler raised.
        ValueError: No jitted collective has returned this status.
    """
    if status == OK:
        return
    if status == WRONG_SIZE:
        raise InvalidBufferSize("jit", "buffers of equal and sufficient size", "others")
    if status == WRONG_ROOT:
        raise InvalidRoot(None, comm.size, is_known=False)
    if status == WRONG_LAYOUT:
        raise InvalidBufferSize("jit.allgatherv", "blocks in rank order inside recv", "others")
    if status == WRONG_OPERATION:
        raise InvalidDatatype("jit.allreduce", "op is no reduction, or is undefined for this dtype")
    if status == WRONG_BUILD:
        raise InvalidCommunicator(
            "The jitted code was compiled with another version of cobre_shm: delete its cache "
            "(the __pycache__ beside it, or NUMBA_CACHE_DIR), or the handle is none of jit.handle"
        )
    if comm in _supports:
        _supports[comm].raise_kept()
    raise ValueError(f"status {status} is of no jitted collective")


@numba.njit(**OPTIONS)
def barrier(handle: int) -> int:
    """See :meth:`cobre_shm.Communicator.barrier`; returns a status."""
    if handle >> _BUILD_SHIFT != _BUILD:
        return WRONG_BUILD
    address = handle & _ADDRESS
    ctx = as_words(address)
    kernel = ctx[context.BARRIER_KERNEL]
    status = call_kernel_3(kernel, address, 0, layout.BARRIER, 0, 0)
    if status == context.READY:
        return OK
    return _taken_over(ctx, _BARRIER, status, layout.BARRIER, 0, 0, 0, 0, 0, 0, 0)


@inlined
def _taken_over(
    ctx: Any,
    kernel: int,
    status: int,
    a: int,
    b: int,
    c: int,
    d: int,
    e: int,
    f: int,
    g: int,
    h: int,
) -> int:
    """Let the interpreter go on with a collective that came back unfinished."""
    return call_back_with(
        *(ctx[context.CALL_BACK], ctx[context.SELF], ctx[context.TAKE_OVER]),
        status != context.TAKEN,
        *(kernel, status, a, b, c, d, e, f, g, h),
    )


@inlined
def _reduction(ctx: Any, tag: int, op: int) -> int:
    """Address of the kernel that reduces; 0: there is none; below: Python has raised."""
    what = layout.ALLREDUCE | op << 8
    for _ in range(2):
        entry = ctx[context.KNOWN]
        for _ in range(ctx[context.KNOWN_COUNT]):
            if load_plain(entry + known.TAG) == tag and load_plain(entry + known.WHAT) == what:
                kernel = load_acquire(entry + known.REDUCTION)
                # Another thread may have put another one there meanwhile.
                if (
                    load_acquire(entry + known.TAG) == tag
                    and load_plain(entry + known.WHAT) == what
                ):
                    return kernel
            entry += known.BYTES
        # The first call with this dtype and reduction: Python compiles or loads the kernel.
        own, method = ctx[context.SELF], ctx[context.PREPARE]
        if call_back_with(ctx[context.CALL_BACK], own, method, 0, tag, op, 0, 0, 0, 0, 0, 0, 0, 0):
            return -1
    return 0


def _element(operation: str, name: str, array: Any) -> np.dtype[Any]:
    if not isinstance(array, types.Array) or array.layout != "C":
        raise TypingError(f"jit.{operation}: {name} must be a C-contiguous array, got {array}")
    dtype = as_dtype(array.dtype)
    if not is_movable(dtype):
        raise TypingError(f"jit.{operation}: {name} has dtype {dtype}: it cannot travel")
    return dtype


def _outside(name: str) -> RuntimeError:
    return RuntimeError(f"jit.{name} is for jitted code; call the communicator's method in Python")


def allreduce(handle: int, send: Any, recv: Any, op: int) -> int:
    """See :meth:`cobre_shm.Communicator.allreduce`; ``op`` is jit.SUM, PROD, MIN or MAX."""
    raise _outside("allreduce")


@overload(allreduce)
def _allreduce(handle: Any, send: Any, recv: Any, op: Any) -> Any:
    dtype = _element("allreduce", "send", send)
    if _element("allreduce", "recv", recv) != dtype:
        raise TypingError(f"jit.allreduce: send is {send}, recv is {recv}")
    if not recv.mutable:
        raise TypingError("jit.allreduce: recv is read-only")
    if not any(is_reducible(dtype, op) for op in ReduceOp):
        raise TypingError(f"jit.allreduce: no reduction is defined for dtype {dtype}")
    tag, item_bytes = dtype_tag(dtype), dtype.itemsize

    def implementation(handle: Any, send: Any, recv: Any, op: Any) -> Any:
        if handle >> _BUILD_SHIFT != _BUILD:
            return WRONG_BUILD
        address = handle & _ADDRESS
        ctx = as_words(address)
        if send.size != recv.size or send.size == 0:
            return WRONG_SIZE
        reduction = _reduction(ctx, tag, op)
        if reduction <= 0:
            return WRONG_OPERATION if reduction == 0 else FAILED
        what = layout.ALLREDUCE | op << 8
        source, target = send.ctypes.data, recv.ctypes.data
        status = call_kernel_7(
            ctx[context.ALLREDUCE_KERNEL],
            address,
            0,
            what,
            tag,
            send.size,
            source,
            target,
            item_bytes,
            reduction,
        )
        if status == context.READY:
            return OK
        return _taken_over(
            ctx,
            _ALLREDUCE,
            status,
            what,
            tag,
            send.size,
            source,
            target,
            item_bytes,
            reduction,
            0,
        )

    return implementation


def broadcast(handle: int, buf: Any, root: int) -> int:
    """See :meth:`cobre_shm.Communicator.broadcast`; returns a status."""
    raise _outside("broadcast")


@overload(broadcast)
def _broadcast(handle: Any, buf: Any, root: Any) -> Any:
    dtype = _element("broadcast", "buf", buf)
    if not buf.mutable:
        raise TypingError("jit.broadcast: buf is read-only")
    tag, item_bytes = dtype_tag(dtype), dtype.itemsize

    def implementation(handle: Any, buf: Any, root: Any) -> Any:
        if handle >> _BUILD_SHIFT != _BUILD:
            return WRONG_BUILD
        address = handle & _ADDRESS
        ctx = as_words(address)
        if root < 0 or root >= ctx[context.SIZE]:
            return WRONG_ROOT
        what = layout.BROADCAST | root << 16
        data, nbytes = buf.ctypes.data, buf.size * item_bytes
        status = call_kernel_6(
            ctx[context.BROADCAST_KERNEL], address, 0, what, tag, buf.size, root, data, nbytes
        )
        if status == context.READY:
            return OK
        return _taken_over(ctx, _BROADCAST, status, what, tag, buf.size, root, data, nbytes, 0, 0)

    return implementation


def allgatherv(handle: int, send: Any, recv: Any, counts: Any, displs: Any) -> int:
    """See :meth:`cobre_shm.Communicator.allgatherv`; blocks lie in ``recv`` in rank order.

    ``counts`` and ``displs`` are int64 arrays of one element per rank.
    """
    raise _outside("allgatherv")


@overload(allgatherv)
def _allgatherv(handle: Any, send: Any, recv: Any, counts: Any, displs: Any) -> Any:
    dtype = _element("allgatherv", "send", send)
    if _element("allgatherv", "recv", recv) != dtype:
        raise TypingError(f"jit.allgatherv: send is {send}, recv is {recv}")
    if not recv.mutable:
        raise TypingError("jit.allgatherv: recv is read-only")
    for name, array in (("counts", counts), ("displs", displs)):
        if _element("allgatherv", name, array) != np.dtype(np.int64) or array.ndim != 1:
            raise TypingError(f"jit.allgatherv: {name} must be a vector of int64, got {array}")
    tag, item_bytes = dtype_tag(dtype), dtype.itemsize

    def implementation(handle: Any, send: Any, recv: Any, counts: Any, displs: Any) -> Any:
        if handle >> _BUILD_SHIFT != _BUILD:
            return WRONG_BUILD
        address = handle & _ADDRESS
        ctx = as_words(address)
        size = ctx[context.SIZE]
        if counts.size != size or displs.size != size or counts[ctx[context.RANK]] != send.size:
            return WRONG_SIZE
        end, total = 0, 0
        for rank in range(size):
            if counts[rank] < 0 or displs[rank] < end or displs[rank] > recv.size - counts[rank]:
                return WRONG_LAYOUT
            end = displs[rank] + counts[rank]
            total += counts[rank]
        source, target = send.ctypes.data, recv.ctypes.data
        lengths, starts = counts.ctypes.data, displs.ctypes.data
        what = layout.ALLGATHERV
        status = call_kernel_8(
            ctx[context.ALLGATHERV_KERNEL],
            address,
            0,
            what,
            tag,
            total,
            source,
            target,
            lengths,
            starts,
            item_bytes,
        )
        if status == context.READY:
            return OK
        return _taken_over(
            ctx,
            _ALLGATHERV,
            status,
            what,
            tag,
            total,
            source,
            target,
            lengths,
            starts,
            item_bytes,
        )

    return implementation
