"""Bytes from one address to another, and calls of reduction kernels by address."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from cobre_shm.kernels.jit import intrinsic

__all__ = ["call_reduction", "copy_bytes"]

_I64 = ir.IntType(64)
_BYTE_POINTER = ir.IntType(8).as_pointer()


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
def call_reduction(
    typing_context: Any, function: Any, accumulator: Any, values: Any, count: Any
) -> Any:
    """Call the reduction kernel at address ``function``: accumulator = accumulator op values."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [_BYTE_POINTER, _BYTE_POINTER, _I64])
        function = builder.inttoptr(args[0], kind.as_pointer())
        accumulator = builder.inttoptr(args[1], _BYTE_POINTER)
        values = builder.inttoptr(args[2], _BYTE_POINTER)
        builder.call(function, [accumulator, values, args[3]])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), code
