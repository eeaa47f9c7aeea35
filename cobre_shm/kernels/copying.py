"""Bytes from one address to another, and calls of reduction kernels by address."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from cobre_shm.kernels.jit import inlined, intrinsic

__all__ = ["call_reduction", "copy_bytes", "copy_streaming", "move_bytes", "streaming_fence"]

_I64 = ir.IntType(64)
_BYTE_POINTER = ir.IntType(8).as_pointer()
# One line: eight lanes of eight bytes.
_LINE = ir.VectorType(_I64, 8)
_LINE_BYTES = 64
_LINES_PER_TURN = 4


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


@intrinsic
def _store_lines(typing_context: Any, destination: Any, source: Any, turns: Any) -> Any:
    """Copy ``turns`` times four lines to a line-aligned address, past the caches."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        destination, source, turns = args
        hint = builder.module.add_metadata([ir.IntType(32)(1)])
        step = _LINE_BYTES * _LINES_PER_TURN
        with cgutils.for_range(builder, turns) as loop:
            offset = builder.mul(loop.index, _I64(step))
            lines = []
            for i in range(_LINES_PER_TURN):
                place = builder.add(builder.add(source, offset), _I64(i * _LINE_BYTES))
                lines.append(builder.load(builder.inttoptr(place, _LINE.as_pointer()), align=1))
            for i, line in enumerate(lines):
                place = builder.add(builder.add(destination, offset), _I64(i * _LINE_BYTES))
                store = builder.store(
                    line, builder.inttoptr(place, _LINE.as_pointer()), align=_LINE_BYTES
                )
                store.set_metadata("nontemporal", hint)
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
    turns = (nbytes - head) // (_LINE_BYTES * _LINES_PER_TURN)
    _store_lines(destination + head, source + head, turns)
    done = head + turns * (_LINE_BYTES * _LINES_PER_TURN)
    copy_bytes(destination + done, source + done, nbytes - done)


@inlined
def move_bytes(destination: int, source: int, nbytes: int, streams: bool) -> None:
    """Copy ``nbytes``, if that is more than 0, past the caches or not."""
    if nbytes > 0:
        if streams:
            copy_streaming(destination, source, nbytes)
        else:
            copy_bytes(destination, source, nbytes)


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
