"""From kernels to an image: numba makes LLVM code of them, LLVM one object file.

Entry points are C functions around what numba makes, which has a calling convention of its own: a
function returns a status, and its result by reference. A status other than 0 is an exception. A
kernel raises none, as nobody could tell its caller: LLVM sees that the status is always 0 and
drops the call of ``abort`` that stands for the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import from_dtype, types
from numba.core.compiler import Flags, compile_extra
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import cpu_target

from cobre_shm.compiler.link import link
from cobre_shm.datatypes import ReduceOp
from cobre_shm.kernels import mpi_road
from cobre_shm.kernels.abandoning import call_back, raise_kept
from cobre_shm.kernels.allgatherv import allgatherv
from cobre_shm.kernels.allreduce import allreduce
from cobre_shm.kernels.barrier import barrier
from cobre_shm.kernels.broadcast import broadcast
from cobre_shm.kernels.common import allreduce_common
from cobre_shm.kernels.jit import OPTIONS
from cobre_shm.kernels.reduce import BOOLEAN_REDUCTIONS, REDUCTIONS
from cobre_shm.kernels.road import (
    allgatherv_call,
    allreduce_call,
    allreduce_shared_call,
    barrier_call,
    broadcast_call,
    plan_call,
)
from cobre_shm.kernels.rounds import claim
from cobre_shm.kernels.rows import reduce_rows
from cobre_shm.native.image import Image
from cobre_shm.native.table import CORE, FUNCTIONS, KERNELS, MPI_FUNCTIONS, MPI_ROAD

__all__ = ["build"]

_SOURCES = (
    *(barrier, broadcast, allreduce_common, allgatherv, allreduce, claim),
    *(barrier_call, broadcast_call, allreduce_call, allgatherv_call),
    *(allreduce_shared_call, plan_call),
    *(call_back, raise_kept, reduce_rows),
)
_INTEGER = types.int64


class _Entry(NamedTuple):
    """A function of an image: its name there, its source, and its types."""

    name: str
    source: Callable[..., Any]
    result: Any
    arguments: tuple[Any, ...]


@global_compiler_lock
def build(group: str) -> Image:
    """Compile a group of functions.

    Args:
        group: ``core``, ``mpi_road``, or ``OP-ELEMENT`` for a reduction, as ``sum-f8`` or
            ``min-bool``.
    """
    entries = list(_entries(group))
    target = cpu_target.target_context
    library = target.codegen().create_library(group)
    for entry in entries:
        _add(library, target, entry)
    library.finalize()
    names = {entry.name for entry in entries}
    module = _closed(library.get_llvm_str(), names, target.codegen())
    return link(_object_code(module, target.codegen()), names)


def _entries(group: str) -> Iterator[_Entry]:
    if group == CORE:
        return _core()
    return _mpi_road() if group == MPI_ROAD else _reduction(group)


def _core() -> Iterator[_Entry]:
    for function in _SOURCES:
        name = function.__name__
        if name in KERNELS:
            first: tuple[Any, ...] = (types.CPointer(_INTEGER), _INTEGER)
            yield _Entry(name, function, _INTEGER, first + (_INTEGER,) * KERNELS[name])
        else:
            yield _Entry(name, function, _INTEGER, (_INTEGER,) * FUNCTIONS[name])


def _mpi_road() -> Iterator[_Entry]:
    for name, arguments in MPI_FUNCTIONS.items():
        yield _Entry(name, getattr(mpi_road, name), _INTEGER, (_INTEGER,) * arguments)


def _reduction(group: str) -> Iterator[_Entry]:
    operation, element = group.split("-")
    op = ReduceOp.parse(operation)
    if element == "bool":
        source, pointer = BOOLEAN_REDUCTIONS[op], types.CPointer(types.uint8)
    else:
        source, pointer = REDUCTIONS[op], types.CPointer(from_dtype(np.dtype(element)))
    yield _Entry(group, source, types.void, (pointer, pointer, pointer, _INTEGER, _INTEGER))


def _add(library: Any, target: Any, entry: _Entry) -> None:
    """Compile a function into a library, with its C function beside it."""
    flags = Flags()
    cpu_target.options.parse_as_flags(flags, OPTIONS)
    flags.no_cpython_wrapper = flags.no_cfunc_wrapper = flags.no_compile = True
    source = getattr(entry.source, "py_func", entry.source)
    done = compile_extra(
        *(cpu_target.typing_context, target, source, entry.arguments, entry.result, flags, {}),
        library=library,
    )
    module = ir.Module(entry.name)
    convention = target.call_conv
    own = convention.get_function_type(entry.result, entry.arguments)
    compiled = ir.Function(module, own, done.fndesc.llvm_func_name)
    is_void = entry.result == types.void
    result = ir.VoidType() if is_void else target.get_value_type(entry.result)
    kind = ir.FunctionType(result, [target.get_value_type(each) for each in entry.arguments])
    function = ir.Function(module, kind, entry.name)
    builder = ir.IRBuilder(function.append_basic_block())
    status, value = convention.call_function(
        builder, compiled, entry.result, entry.arguments, function.args
    )
    with builder.if_then(status.is_error, likely=False):
        builder.call(ir.Function(module, ir.FunctionType(ir.VoidType(), []), "abort"), [])
    if is_void:
        builder.ret_void()
    else:
        builder.ret(value)
    library.add_ir_module(module)


def _closed(module: str, names: set[str], codegen: Any) -> str:
    """Optimise a module again, knowing now that nobody calls anything but functions of ``names``.

    Only so are the statuses of functions that were not inlined seen to be always 0.
    """
    parsed = llvm.parse_assembly(module)
    for function in parsed.functions:
        if not function.is_declaration and function.name not in names:
            function.linkage = "internal"
    library = codegen.create_library(parsed.name)
    library.add_llvm_module(parsed)
    library.finalize()
    text: str = library.get_llvm_str()
    return text


def _object_code(module: str, codegen: Any) -> bytes:
    """Return a module as position-independent machine code for the processor numba compiles for."""
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=codegen._get_host_cpu_name(),
        features=codegen._get_host_cpu_features(),
        opt=3,
        reloc="pic",
        codemodel="small",
    )
    code: bytes = machine.emit_object(llvm.parse_assembly(module))
    return code
