"""Calls from kernels to the operating system: clock, yield, futex, memory of other processes.

Linux x86-64: the system call numbers are those of that architecture.
"""

from __future__ import annotations

import errno
from typing import Any

from llvmlite import ir
from numba import types

from cobre_shm.kernels.jit import intrinsic

__all__ = [
    "FUTEX_32",
    "coarse_monotonic_ns",
    "cycles",
    "futex_wait",
    "futex_wait_any",
    "futex_wake_all",
    "monotonic_ns",
    "process_vm_read",
    "yield_processor",
]

_SYS_FUTEX = 202
_SYS_FUTEX_WAITV = 449
_SYS_PROCESS_VM_READV = 310
# Without FUTEX_PRIVATE_FLAG: the word is shared between processes.
_FUTEX_WAIT, _FUTEX_WAKE = 0, 1
FUTEX_32 = 2
_CLOCK_MONOTONIC = 1
_CLOCK_MONOTONIC_COARSE = 6

_I64 = ir.IntType(64)
_I32 = ir.IntType(32)
_TIMESPEC = ir.ArrayType(_I64, 2)
_IOVEC = ir.ArrayType(_I64, 2)
_NANO = 1_000_000_000


def _external(builder: Any, name: str, kind: Any) -> Any:
    module = builder.module
    return module.globals.get(name) or ir.Function(module, kind, name)


def _syscall(builder: Any, *args: Any) -> Any:
    kind = ir.FunctionType(_I64, [_I64], var_arg=True)
    return builder.call(_external(builder, "syscall", kind), args)


def _refusal(builder: Any, result: Any) -> Any:
    """-1 if a call that sleeps has failed otherwise than by not sleeping to the end; else 0."""
    kind = ir.FunctionType(_I32.as_pointer(), [])
    error = builder.load(builder.call(_external(builder, "__errno_location", kind), []))
    is_refused = builder.icmp_signed("<", result, _I64(0))
    for usual in (errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT):
        is_refused = builder.and_(is_refused, builder.icmp_signed("!=", error, _I32(usual)))
    return builder.select(is_refused, _I64(-1), _I64(0))


def _timespec(builder: Any) -> Any:
    with builder.goto_entry_block():
        return builder.alloca(_TIMESPEC)


def _clock_code(clock: int) -> Any:
    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        spec = _timespec(builder)
        address = builder.ptrtoint(spec, _I64)
        kind = ir.FunctionType(_I32, [_I32, _I64])
        builder.call(_external(builder, "clock_gettime", kind), [_I32(clock), address])
        seconds = builder.load(builder.gep(spec, [_I32(0), _I32(0)]))
        nanoseconds = builder.load(builder.gep(spec, [_I32(0), _I32(1)]))
        return builder.add(builder.mul(seconds, _I64(_NANO)), nanoseconds)

    return code


@intrinsic
def monotonic_ns(typing_context: Any) -> Any:
    """Return CLOCK_MONOTONIC in nanoseconds (the clock of ``time.monotonic_ns``)."""
    return types.int64(), _clock_code(_CLOCK_MONOTONIC)


@intrinsic
def coarse_monotonic_ns(typing_context: Any) -> Any:
    """Return the same clock at its last tick (4 ms at 250 Hz), at an eighth of the cost."""
    return types.int64(), _clock_code(_CLOCK_MONOTONIC_COARSE)


@intrinsic
def cycles(typing_context: Any) -> Any:
    """Return the time stamp counter of this core."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(_I64, [])
        return builder.call(_external(builder, "llvm.readcyclecounter", kind), [])

    return types.int64(), code


@intrinsic
def yield_processor(typing_context: Any) -> Any:
    """Let another runnable process have this core (sched_yield)."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(_I32, [])
        builder.call(_external(builder, "sched_yield", kind), [])
        return context.get_dummy_value()

    return types.void(), code


@intrinsic
def futex_wait(typing_context: Any, address: Any, expected: Any, timeout_ns: Any) -> Any:
    """Sleep while the 32-bit word at ``address`` equals the low half of ``expected``.

    Returns on a wake, a signal, after ``timeout_ns`` (below 1e9), or for no reason: 0, and the
    caller looks again. Where the system refuses, at once: -1.
    """

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        spec = _timespec(builder)
        builder.store(_I64(0), builder.gep(spec, [_I32(0), _I32(0)]))
        builder.store(args[2], builder.gep(spec, [_I32(0), _I32(1)]))
        expected32 = builder.and_(args[1], _I64(0xFFFFFFFF))
        timeout = builder.ptrtoint(spec, _I64)
        zero = _I64(0)
        result = _syscall(
            builder, _I64(_SYS_FUTEX), args[0], _I64(_FUTEX_WAIT), expected32, timeout, zero, zero
        )
        return _refusal(builder, result)

    return types.int64(types.int64, types.int64, types.int64), code


@intrinsic
def futex_wait_any(typing_context: Any, words: Any, count: Any, deadline_ns: Any) -> Any:
    """Sleep while every 32-bit word of a list equals what is expected of it (futex_waitv).

    At ``words`` stand ``count`` entries, at most 128, of three 64-bit integers: the expected
    value, the address of the word, FUTEX_32. The deadline is on the clock of ``monotonic_ns``.
    Returns as ``futex_wait``; Linux knows the call from 5.16 on.
    """

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        spec = _timespec(builder)
        seconds = builder.udiv(args[2], _I64(_NANO))
        builder.store(seconds, builder.gep(spec, [_I32(0), _I32(0)]))
        rest = builder.urem(args[2], _I64(_NANO))
        builder.store(rest, builder.gep(spec, [_I32(0), _I32(1)]))
        result = _syscall(
            builder,
            _I64(_SYS_FUTEX_WAITV),
            args[0],
            args[1],
            _I64(0),
            builder.ptrtoint(spec, _I64),
            _I64(_CLOCK_MONOTONIC),
        )
        return _refusal(builder, result)

    return types.int64(types.int64, types.int64, types.int64), code


@intrinsic
def futex_wake_all(typing_context: Any, address: Any) -> Any:
    """Wake everybody who sleeps on the 32-bit word at ``address``."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        zero = _I64(0)
        _syscall(
            builder, _I64(_SYS_FUTEX), args[0], _I64(_FUTEX_WAKE), _I64(2**31 - 1), zero, zero, zero
        )
        return context.get_dummy_value()

    return types.void(types.int64), code


@intrinsic
def process_vm_read(
    typing_context: Any, pid: Any, destination: Any, source: Any, nbytes: Any
) -> Any:
    """Copy from address ``source`` of process ``pid``: bytes copied, perhaps fewer, or -1."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pid, destination, source, nbytes = args
        vectors = []
        for base in (destination, source):
            with builder.goto_entry_block():
                vector = builder.alloca(_IOVEC)
            builder.store(base, builder.gep(vector, [_I32(0), _I32(0)]))
            builder.store(nbytes, builder.gep(vector, [_I32(0), _I32(1)]))
            vectors.append(builder.ptrtoint(vector, _I64))
        local, remote = vectors
        number = _I64(_SYS_PROCESS_VM_READV)
        return _syscall(builder, number, pid, local, _I64(1), remote, _I64(1), _I64(0))

    return types.int64(types.int64, types.int64, types.int64, types.int64), code
