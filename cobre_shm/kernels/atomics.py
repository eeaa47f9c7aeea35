"""Loads, stores and read-modify-writes of shared words, by address; nobody else has them.

Every word of shared memory that one process writes while another may read it is accessed through
these functions. A plain load may be hoisted out of a loop by LLVM, and a plain store moved; the
order is in the name. On x86-64 acquire loads and release stores are plain moves.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from cobre_shm.kernels.jit import intrinsic

__all__ = [
    "exchange_seq_cst",
    "fetch_add_seq_cst_u32",
    "fetch_or_seq_cst_u32",
    "load_acquire",
    "load_plain",
    "load_seq_cst",
    "load_seq_cst_u32",
    "pause",
    "store_plain",
    "store_release",
]

_I64 = ir.IntType(64)
_I32 = ir.IntType(32)


def _pointer(builder: Any, address: Any, kind: Any) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


@intrinsic
def load_acquire(typing_context: Any, address: Any) -> Any:
    """Load the 64-bit word at ``address``; what its writer published before is visible after."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(_pointer(builder, args[0], _I64), "acquire", 8)

    return types.int64(types.int64), code


@intrinsic
def store_release(typing_context: Any, address: Any, value: Any) -> Any:
    """Store a 64-bit word; everything written before it is visible to who acquires it."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store_atomic(args[1], _pointer(builder, args[0], _I64), "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), code


@intrinsic
def exchange_seq_cst(typing_context: Any, address: Any, value: Any) -> Any:
    """Store a 64-bit word and return the old one; a full fence."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("xchg", _pointer(builder, args[0], _I64), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), code


def _fetch_u32(operation: str) -> Any:
    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        operand = builder.trunc(args[1], _I32)
        old = builder.atomic_rmw(operation, _pointer(builder, args[0], _I32), operand, "seq_cst")
        return builder.zext(old, _I64)

    return code


@intrinsic
def fetch_add_seq_cst_u32(typing_context: Any, address: Any, value: Any) -> Any:
    """Add to a 32-bit word and return the old value; a full fence."""
    return types.int64(types.int64, types.int64), _fetch_u32("add")


@intrinsic
def fetch_or_seq_cst_u32(typing_context: Any, address: Any, bits: Any) -> Any:
    """Set bits of a 32-bit word and return the old value; a full fence."""
    return types.int64(types.int64, types.int64), _fetch_u32("or")


@intrinsic
def load_seq_cst(typing_context: Any, address: Any) -> Any:
    """Load a 64-bit word in the one order of all sequentially consistent accesses."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(_pointer(builder, args[0], _I64), "seq_cst", 8)

    return types.int64(types.int64), code


@intrinsic
def load_seq_cst_u32(typing_context: Any, address: Any) -> Any:
    """Load a 32-bit word in the one order of all sequentially consistent accesses."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = builder.load_atomic(_pointer(builder, args[0], _I32), "seq_cst", 4)
        return builder.zext(word, _I64)

    return types.int64(types.int64), code


@intrinsic
def load_plain(typing_context: Any, address: Any) -> Any:
    """Load a 64-bit word that an earlier acquire has made visible and nobody is writing."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(_pointer(builder, args[0], _I64))

    return types.int64(types.int64), code


@intrinsic
def store_plain(typing_context: Any, address: Any, value: Any) -> Any:
    """Store a 64-bit word that a later release will publish."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[1], _pointer(builder, args[0], _I64))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), code


@intrinsic
def pause(typing_context: Any) -> Any:
    """Tell the core that this is a spin loop."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [])
        name = "llvm.x86.sse2.pause"
        instruction = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
        builder.call(instruction, [])
        return context.get_dummy_value()

    return types.void(), code
