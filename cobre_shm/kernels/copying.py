"""Bytes from one address to another, and calls of reduction kernels by address."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from cobre_shm.kernels.jit import inlined, intrinsic

__all__ = [
    "call_reduction",
    "copy_bytes",
    "copy_fetching",
    "copy_streaming",
    "move_bytes",
    "prefetch_for_writing",
    "streaming_fence",
]

_I32 = ir.IntType(32)
_I64 = ir.IntType(64)
_BYTE_POINTER = ir.IntType(8).as_pointer()
# One line: eight lanes of eight bytes.
_LINE = ir.VectorType(_I64, 8)
_LINE_BYTES = 64
_LINES_PER_TURN = 4
_TURN_BYTES = _LINE_BYTES * _LINES_PER_TURN

# How far ahead lines of another core are asked for, and from which length on: measured on a Xeon,
# 32 to 512 KiB arrive in 0.8 to 0.9 of the time; with less there is nothing to gain.
_AHEAD_BYTES = 4096
_FROM_BYTES = 32768
_FOR_READING, _FOR_WRITING = 0, 1
_SECOND_LEVEL, _FIRST_LEVEL = 2, 3


@intrinsic
def copy_bytes(typing_context: Any, destination: Any, source: Any, nbytes: Any) -> Any:
    """Copy ``nbytes`` (may be 0) between addresses that do not overlap."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        memcpy = builder.module.declare_intrinsic(
            "llvm.memcpy", [_BYTE_POINTER, _BYTE_POINTER, _I64]
        )
        destination = builder.inttoptr(args[0], _BYTE_POINTER)
        source = builder.inttoptr(args[1], _BYTE_POINTER)
        builder.call(memcpy, [destination, source, args[2], ir.IntType(1)(0)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), code


def _prefetch(builder: Any, address: Any, purpose: int, level: int) -> None:
    name = "llvm.prefetch.p0i8"
    kind = ir.FunctionType(ir.VoidType(), [_BYTE_POINTER, _I32, _I32, _I32])
    prefetch = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    place = builder.inttoptr(address, _BYTE_POINTER)
    builder.call(prefetch, [place, _I32(purpose), _I32(level), _I32(1)])


@intrinsic
def prefetch_for_writing(typing_context: Any, address: Any) -> Any:
    """Ask for the line at ``address``, as a store to it would, and wait for nothing."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _prefetch(builder, args[0], _FOR_WRITING, _FIRST_LEVEL)
        return context.get_dummy_value()

    return types.void(types.int64), code


def _copy_turns(builder: Any, args: Any, streams: bool) -> None:
    """Code of a loop of four lines a turn: past the caches, or asking for lines ahead."""
    destination, source, turns = args
    hint = builder.module.add_metadata([_I32(1)])
    with cgutils.for_range(builder, turns) as loop:
        offset = builder.mul(loop.index, _I64(_TURN_BYTES))
        lines = []
        for i in range(_LINES_PER_TURN):
            place = builder.add(builder.add(source, offset), _I64(i * _LINE_BYTES))
            if not streams:
                ahead = builder.add(place, _I64(_AHEAD_BYTES))
                _prefetch(builder, ahead, _FOR_READING, _SECOND_LEVEL)
            lines.append(builder.load(builder.inttoptr(place, _LINE.as_pointer()), align=1))
        for i, line in enumerate(lines):
            place = builder.add(builder.add(destination, offset), _I64(i * _LINE_BYTES))
            pointer = builder.inttoptr(place, _LINE.as_pointer())
            store = builder.store(line, pointer, align=_LINE_BYTES if streams else 1)
            if streams:
                store.set_metadata("nontemporal", hint)


@intrinsic
def _store_lines(typing_context: Any, destination: Any, source: Any, turns: Any) -> Any:
    """Copy ``turns`` times four lines to a line-aligned address, past the caches."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _copy_turns(builder, args, True)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), code


@intrinsic
def _fetch_lines(typing_context: Any, destination: Any, source: Any, turns: Any) -> Any:
    """Copy ``turns`` times four lines, and ask for what lies ``_AHEAD_BYTES`` behind each."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _copy_turns(builder, args, False)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), code


@inlined
def copy_streaming(destination: int, source: int, nbytes: int) -> None:
    """Copy past the caches, for what is larger than they are.

    Non-temporal stores spare the reading of each destination line. They are weakly ordered: call
    :func:`streaming_fence` before a publication that covers them.
    """
    head = min(nbytes, -destination & (_LINE_BYTES - 1))
    copy_bytes(destination, source, head)
    turns = (nbytes - head) // _TURN_BYTES
    _store_lines(destination + head, source + head, turns)
    done = head + turns * _TURN_BYTES
    copy_bytes(destination + done, source + done, nbytes - done)


@inlined
def move_bytes(destination: int, source: int, nbytes: int, streams: bool) -> None:
    """Copy ``nbytes``, if that is more than 0, past the caches or not."""
    if nbytes > 0:
        if streams:
            copy_streaming(destination, source, nbytes)
        else:
            copy_bytes(destination, source, nbytes)


@inlined
def copy_fetching(destination: int, source: int, nbytes: int) -> None:
    """Copy what is in the cache of another core.

    Lines are asked for ahead, into the second-level cache, which can wait for more of them at once
    than the first.
    """
    done = 0
    if nbytes >= _FROM_BYTES:
        # Nothing behind the end is asked for: the peer may be about to store there.
        turns = (nbytes - _AHEAD_BYTES) // _TURN_BYTES
        _fetch_lines(destination, source, turns)
        done = turns * _TURN_BYTES
    copy_bytes(destination + done, source + done, nbytes - done)


@intrinsic
def streaming_fence(typing_context: Any) -> Any:
    """Order all earlier non-temporal stores before all later stores."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [])
        name = "llvm.x86.sse.sfence"
        instruction = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
        builder.call(instruction, [])
        return context.get_dummy_value()

    return types.void(), code


@intrinsic
def call_reduction(
    typing_context: Any, function: Any, destination: Any, a: Any, b: Any, count: Any
) -> Any:
    """Call the reduction kernel at address ``function``: destination = a op b.

    The destination may be ``a``; any other overlap is undefined.
    """

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(
            ir.VoidType(), [_BYTE_POINTER, _BYTE_POINTER, _BYTE_POINTER, _I64, _I64]
        )
        function = builder.inttoptr(args[0], kind.as_pointer())
        in_place = builder.zext(builder.icmp_unsigned("==", args[1], args[2]), _I64)
        pointers = [builder.inttoptr(arg, _BYTE_POINTER) for arg in args[1:4]]
        builder.call(function, [*pointers, args[4], in_place])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), code
