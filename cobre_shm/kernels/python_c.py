"""Calls from kernels to the C API of Python."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from cobre_shm.kernels.jit import intrinsic
from cobre_shm.kernels.objects import TUPLE_SIZE

__all__ = [
    "as_words",
    "call_back_with",
    "call_function",
    "call_kernel_3",
    "call_kernel_6",
    "call_kernel_7",
    "call_kernel_8",
    "call_none",
    "call_one",
    "call_with_self",
    "clear_exception",
    "decref",
    "ensure_gil",
    "fetch_exception",
    "incref",
    "integer_of",
    "leave_gil",
    "load_i32",
    "new_integer",
    "print_exception",
    "release_gil",
    "restore_exception",
    "store_i32",
    "take_gil",
]

_I64 = ir.IntType(64)
_I32 = ir.IntType(32)


def _external(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    module = builder.module
    return module.globals.get(name) or ir.Function(module, ir.FunctionType(result, arguments), name)


@intrinsic
def as_words(typing_context: Any, address: Any) -> Any:
    """Take an address as that of 64-bit integers."""
    pointer = types.CPointer(types.int64)

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(pointer))

    return pointer(types.int64), code


@intrinsic
def load_i32(typing_context: Any, address: Any) -> Any:
    """Load the 32-bit integer at ``address``."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.sext(builder.load(builder.inttoptr(args[0], _I32.as_pointer())), _I64)

    return types.int64(types.int64), code


@intrinsic
def store_i32(typing_context: Any, address: Any, value: Any) -> Any:
    """Store the lower half of ``value`` at ``address``."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = builder.inttoptr(args[0], _I32.as_pointer())
        builder.store(builder.trunc(args[1], _I32), place)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), code


@intrinsic
def incref(typing_context: Any, target: Any) -> Any:
    """Take a reference to an object."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.call(_external(builder, "Py_IncRef", ir.VoidType(), _I64), args)
        return context.get_dummy_value()

    return types.void(types.int64), code


@intrinsic
def decref(typing_context: Any, target: Any) -> Any:
    """Give a reference back."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.call(_external(builder, "Py_DecRef", ir.VoidType(), _I64), args)
        return context.get_dummy_value()

    return types.void(types.int64), code


@intrinsic
def release_gil(typing_context: Any) -> Any:
    """Give the GIL up; the result is for :func:`take_gil`."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.call(_external(builder, "PyEval_SaveThread", _I64), [])

    return types.int64(), code


@intrinsic
def take_gil(typing_context: Any, thread: Any) -> Any:
    """Take the GIL again."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.call(_external(builder, "PyEval_RestoreThread", ir.VoidType(), _I64), args)
        return context.get_dummy_value()

    return types.void(types.int64), code


@intrinsic
def ensure_gil(typing_context: Any) -> Any:
    """Have the GIL, whoever has it; the result is for :func:`leave_gil`."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.zext(builder.call(_external(builder, "PyGILState_Ensure", _I32), []), _I64)

    return types.int64(), code


@intrinsic
def leave_gil(typing_context: Any, state: Any) -> Any:
    """Undo :func:`ensure_gil`: give the GIL up, unless this thread had it before."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        function = _external(builder, "PyGILState_Release", ir.VoidType(), _I32)
        builder.call(function, [builder.trunc(args[0], _I32)])
        return context.get_dummy_value()

    return types.void(types.int64), code


@intrinsic
def fetch_exception(typing_context: Any) -> Any:
    """Take the exception that is set: three references for :func:`restore_exception`."""
    triple = types.UniTuple(types.int64, 3)

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        with builder.goto_entry_block():
            places = [builder.alloca(_I64) for _ in range(3)]
        function = _external(builder, "PyErr_Fetch", ir.VoidType(), _I64, _I64, _I64)
        builder.call(function, [builder.ptrtoint(place, _I64) for place in places])
        return context.make_tuple(builder, triple, [builder.load(place) for place in places])

    return triple(), code


@intrinsic
def restore_exception(typing_context: Any, kind: Any, value: Any, trace: Any) -> Any:
    """Set an exception that was fetched; the references are gone then."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        function = _external(builder, "PyErr_Restore", ir.VoidType(), _I64, _I64, _I64)
        builder.call(function, args)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), code


@intrinsic
def print_exception(typing_context: Any) -> Any:
    """Print the exception that is set as one that nobody can be told of, and drop it."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        function = _external(builder, "PyErr_WriteUnraisable", ir.VoidType(), _I64)
        builder.call(function, [_I64(0)])
        return context.get_dummy_value()

    return types.void(), code


@intrinsic
def clear_exception(typing_context: Any) -> Any:
    """Drop the exception that is set."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.call(_external(builder, "PyErr_Clear", ir.VoidType()), [])
        return context.get_dummy_value()

    return types.void(), code


@intrinsic
def new_integer(typing_context: Any, value: Any) -> Any:
    """Return a new Python int; 0: there is no memory, and an exception is set."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.call(_external(builder, "PyLong_FromLongLong", _I64, _I64), args)

    return types.int64(types.int64), code


@intrinsic
def integer_of(typing_context: Any, number: Any) -> Any:
    """Return the value of a Python int; -1 for one that does not fit."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        with builder.goto_entry_block():
            overflow = builder.alloca(_I32)
        function = _external(builder, "PyLong_AsLongAndOverflow", _I64, _I64, _I64)
        return builder.call(function, [args[0], builder.ptrtoint(overflow, _I64)])

    return types.int64(types.int64), code


def _vectorcall(builder: Any, function: Any, args: Any, nargs: Any, kwnames: Any) -> Any:
    callee = _external(builder, "PyObject_Vectorcall", _I64, _I64, _I64, _I64, _I64)
    return builder.call(callee, [function, args, nargs, kwnames])


@intrinsic
def call_none(typing_context: Any, function: Any) -> Any:
    """Call a Python callable without arguments; 0: it raised."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _vectorcall(builder, args[0], _I64(0), _I64(0), _I64(0))

    return types.int64(types.int64), code


@intrinsic
def call_one(typing_context: Any, function: Any, argument: Any) -> Any:
    """Call a Python callable with one argument; 0: it raised."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        with builder.goto_entry_block():
            place = builder.alloca(_I64)
        builder.store(args[1], place)
        return _vectorcall(builder, args[0], builder.ptrtoint(place, _I64), _I64(1), _I64(0))

    return types.int64(types.int64, types.int64), code


@intrinsic
def call_with_self(
    typing_context: Any, function: Any, instance: Any, args: Any, nargs: Any, kwnames: Any
) -> Any:
    """Call a Python function with ``instance`` before the vector of arguments; 0: it raised."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        function, instance, args, nargs, kwnames = values
        is_named = builder.icmp_unsigned("!=", kwnames, _I64(0))
        place = builder.inttoptr(
            builder.select(is_named, builder.add(kwnames, _I64(TUPLE_SIZE)), instance),
            _I64.as_pointer(),
        )
        # Without keywords any word that can be read will do: it is dropped.
        counted = builder.select(is_named, builder.load(place), _I64(0))
        total = builder.add(nargs, counted)
        vector = builder.alloca(_I64, builder.add(total, _I64(1)))
        builder.store(instance, vector)
        memcpy = builder.module.declare_intrinsic(
            "llvm.memcpy", [ir.IntType(8).as_pointer(), ir.IntType(8).as_pointer(), _I64]
        )
        rest = builder.bitcast(builder.gep(vector, [_I64(1)]), ir.IntType(8).as_pointer())
        source = builder.inttoptr(args, ir.IntType(8).as_pointer())
        builder.call(memcpy, [rest, source, builder.mul(total, _I64(8)), ir.IntType(1)(0)])
        return _vectorcall(
            builder, function, builder.ptrtoint(vector, _I64), builder.add(nargs, _I64(1)), kwnames
        )

    return types.int64(*[types.int64] * 5), code


def _kernel_code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    kind = ir.FunctionType(_I64, [_I64] * (len(args) - 1))
    return builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])


@intrinsic
def call_function(
    typing: Any,
    f: Any,
    a1: Any,
    a2: Any,
    a3: Any,
    a4: Any,
    a5: Any,
    a6: Any,
    a7: Any,
    a8: Any,
    a9: Any,
    a10: Any,
) -> Any:
    """Call a C function of ten integers by its address."""
    return types.int64(*[types.int64] * 11), _kernel_code


@intrinsic
def call_back_with(
    typing: Any,
    function: Any,
    own: Any,
    method: Any,
    finishes: Any,
    a1: Any,
    a2: Any,
    a3: Any,
    a4: Any,
    a5: Any,
    a6: Any,
    a7: Any,
    a8: Any,
    a9: Any,
    a10: Any,
) -> Any:
    """Call ``abandoning.call_back`` by its address, with a vector of ten integers on the stack."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        with builder.goto_entry_block():
            vector = builder.alloca(_I64, 10)
        for i, value in enumerate(args[4:]):
            builder.store(value, builder.gep(vector, [_I64(i)]))
        kind = ir.FunctionType(_I64, [_I64] * 4)
        callee = builder.inttoptr(args[0], kind.as_pointer())
        return builder.call(callee, [*args[1:4], builder.ptrtoint(vector, _I64)])

    return types.int64(*[types.int64] * 14), code


def _kernel_type(arguments: int) -> Any:
    """Of a call by address: kernel, context, resume and the kernel's own arguments."""
    return types.int64(*[types.int64] * (arguments + 3))


@intrinsic
def call_kernel_3(typing: Any, f: Any, c: Any, r: Any, a1: Any, a2: Any, a3: Any) -> Any:
    """Call a kernel of 3 arguments by its address."""
    return _kernel_type(3), _kernel_code


@intrinsic
def call_kernel_6(
    typing: Any, f: Any, c: Any, r: Any, a1: Any, a2: Any, a3: Any, a4: Any, a5: Any, a6: Any
) -> Any:
    """Call a kernel of 6 arguments by its address."""
    return _kernel_type(6), _kernel_code


@intrinsic
def call_kernel_7(
    typing: Any,
    f: Any,
    c: Any,
    r: Any,
    a1: Any,
    a2: Any,
    a3: Any,
    a4: Any,
    a5: Any,
    a6: Any,
    a7: Any,
) -> Any:
    """Call a kernel of 7 arguments by its address."""
    return _kernel_type(7), _kernel_code


@intrinsic
def call_kernel_8(
    typing: Any,
    f: Any,
    c: Any,
    r: Any,
    a1: Any,
    a2: Any,
    a3: Any,
    a4: Any,
    a5: Any,
    a6: Any,
    a7: Any,
    a8: Any,
) -> Any:
    """Call a kernel of 8 arguments by its address."""
    return _kernel_type(8), _kernel_code
