"""Putting the fast road (``kernels/road.py``) in the place of a communicator's Python methods.

It reads the memory of Python objects, so it first compares what it believes of them with living
ones. Where anything differs (another Python, a free-threaded build, another numpy) the Python
methods stay, which do the same and take longer to begin.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from cobre_shm.datatypes import ReduceOp
from cobre_shm.kernels import context, known, objects
from cobre_shm.native.entry import (
    ALLGATHERV,
    ALLREDUCE,
    BARRIER,
    BROADCAST,
    function_address,
)

__all__ = [
    "NOARGS",
    "ContextFirst",
    "Known",
    "install",
    "is_installed",
    "method_definition",
    "objects_are_as_expected",
    "remove",
    "serve",
]

NOARGS, _FASTCALL_KEYWORDS = 0x4, 0x80 | 0x2
# Text after the signature that CPython takes out of a documentation string.
_SIGNATURES = {
    "barrier": "($self, /)",
    "broadcast": "($self, buf, root=0)",
    "allreduce": "($self, send, recv=None, op=0)",
    "allreduce_shared": "($self, send, op=0)",
    "allgatherv": "($self, send, recv=None, counts=None, displs=None)",
}
# By operation: the address of the road, and of the kernel that it calls. That of a shared result is
# the road of an allreduce.
_ROADS = {
    "barrier": function_address("barrier_call"),
    "broadcast": function_address("broadcast_call"),
    "allreduce": function_address("allreduce_call"),
    "allreduce_shared": function_address("allreduce_shared_call"),
    "allgatherv": function_address("allgatherv_call"),
}
_KERNELS = {
    "barrier": BARRIER.address,
    "broadcast": BROADCAST.address,
    "allreduce": ALLREDUCE.address,
    "allgatherv": ALLGATHERV.address,
}


class _MethodDef(ctypes.Structure):
    _fields_ = (
        ("ml_name", ctypes.c_char_p),
        ("ml_meth", ctypes.c_void_p),
        ("ml_flags", ctypes.c_int),
        ("ml_doc", ctypes.c_char_p),
    )


# CPython keeps pointers to the definitions.
_KEPT: list[_MethodDef] = []


class ContextFirst:
    """The first base of a communicator: it gives ``_context`` the place behind the object's head.

    The road reads it there.
    """

    __slots__ = ("_context",)
    _context: Any


class Known:
    """The table of dtypes and reductions that a communicator has met.

    Attributes:
        table: Its entries, see ``kernels/known.py``.
    """

    def __init__(self, state: Any) -> None:
        self.table: Any = np.zeros((known.ENTRIES, known.BYTES // 8), dtype=np.int64)
        self._state = state
        # By what the table knows them; kept, so that an address is that of no other.
        self._kept: dict[tuple[int, int], tuple[Any, Any]] = {}
        self._added = 0
        state[context.KNOWN] = self.table.ctypes.data

    def add(
        self, dtype: np.dtype[Any], op: ReduceOp | None, what: int, tag: int, reduction: int
    ) -> None:
        """Remember a dtype with a reduction; None: for what only copies."""
        # Of a name the string that Python makes of every "max" in a program.
        spellings = (None,) if op is None else (op, sys.intern(op.name.lower()))
        for spelling in spellings:
            key = (id(dtype), 0 if spelling is None else id(spelling))
            if key in self._kept:
                continue
            place = self._added % known.ENTRIES
            self._added += 1
            if len(self._kept) == known.ENTRIES:
                # The oldest, which stands there. If it is still in use it comes back. Jitted code
                # without the interpreter's lock may be reading it, and looks twice.
                self.table[place] = 0
                del self._kept[next(iter(self._kept))]
            self._kept[key] = dtype, spelling
            self.table[place] = (*key, what, tag, dtype.itemsize, reduction)
            self._state[context.KNOWN_COUNT] = len(self._kept)


def _word(obj: object, offset: int) -> int:
    return ctypes.c_int64.from_address(id(obj) + offset).value


def objects_are_as_expected(instance: Any, state: Any) -> bool:
    """Whether the offsets of ``kernels/objects.py`` are those of this Python, numpy and class.

    Args:
        instance: An object whose ``_context`` is ``state``.
        state: An array.
    """
    if sys.implementation.name != "cpython" or "t" in sys.abiflags:
        return False
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        return False
    pair = ("op", "root")
    sample = np.zeros((3, 5), dtype=np.int32)
    sample.flags.writeable = False
    flags = _word(sample, objects.ARRAY_FLAGS) & 0xFFFFFFFF
    dims = _word(sample, objects.ARRAY_DIMS)
    return (
        _word(instance, objects.STATE) == id(state)
        and _word(pair, objects.TYPE) == id(tuple)
        and _word(pair, objects.TUPLE_SIZE) == 2
        and _word(pair, objects.TUPLE_ITEMS) == id(pair[0])
        and _word(sample, objects.TYPE) == id(np.ndarray)
        and _word(sample, objects.ARRAY_DATA) == sample.ctypes.data
        and _word(sample, objects.ARRAY_NDIM) & 0xFFFFFFFF == 2
        and [ctypes.c_int64.from_address(dims + 8 * i).value for i in (0, 1)] == [3, 5]
        and _word(sample, objects.ARRAY_DESCR) == id(sample.dtype)
        and flags & 0x401 == 0x001
    )


def method_definition(name: str, address: int, flags: int, doc: str) -> int:
    """Return the address of a PyMethodDef that lives as long as the process."""
    definition = _MethodDef(name.encode(), address, flags, doc.encode())
    _KEPT.append(definition)
    return ctypes.addressof(definition)


def is_installed(cls: type) -> bool:
    """Whether ``cls`` has the fast road."""
    return getattr(cls, "_slow_barrier", cls.barrier) is not cls.barrier  # type: ignore[attr-defined]


def install(cls: type, roads: Mapping[str, int] = _ROADS) -> None:
    """Replace the methods of ``cls`` by the fast road; ``remove`` undoes it.

    Args:
        cls: Has methods of these names, and ``_finish_...`` for each that has a kernel.
        roads: The addresses of the C functions by operation; by default those of shared memory.
    """
    new_method = ctypes.pythonapi.PyDescr_NewMethod
    new_method.restype, new_method.argtypes = ctypes.py_object, [ctypes.py_object, ctypes.c_void_p]
    for name, address in roads.items():
        method = getattr(cls, name)
        doc = f"{name}{_SIGNATURES[name]}\n--\n\n{method.__doc__}"
        flags = NOARGS if name == "barrier" else _FASTCALL_KEYWORDS
        definition = method_definition(name, address, flags, doc)
        setattr(cls, f"_slow_{name}", method)
        setattr(cls, name, new_method(cls, definition))


def remove(cls: type) -> None:
    """Put the Python methods back."""
    for name in _ROADS:
        setattr(cls, name, getattr(cls, f"_slow_{name}"))


def serve(
    cls: type,
    state: Any,
    displs: Any,
    arguments: Any,
    kernels: Mapping[str, int] = _KERNELS,
) -> None:
    """Write into a communicator's state what the fast road needs.

    Args:
        cls: On which ``install`` was called.
        state: The communicator's context.
        displs: Room for one 64-bit integer per rank.
        arguments: Room for three.
        kernels: By operation the address that its road calls.
    """
    for name, address in kernels.items():
        state[getattr(context, f"{name.upper()}_KERNEL")] = address
    if not is_installed(cls):
        return
    for name in _ROADS:
        upper = name.upper()
        if hasattr(cls, f"_slow_{name}"):
            state[getattr(context, f"{upper}_METHOD")] = id(getattr(cls, f"_slow_{name}"))
        if name in kernels:
            state[getattr(context, f"{upper}_FINISH")] = id(getattr(cls, f"_finish_{name}"))
    state[context.NONE] = id(None)
    state[context.ARRAY_TYPE] = id(np.ndarray)
    state[context.INT_TYPE] = id(int)
    state[context.INT64] = id(np.dtype(np.int64))
    state[context.SUM] = id(ReduceOp.SUM)
    state[context.NAME_OP] = id(_interned("op"))
    state[context.NAME_ROOT] = id(_interned("root"))
    state[context.EMPTY_LIKE] = id(np.empty_like)
    state[context.DISPLS] = displs.ctypes.data
    state[context.ARGUMENTS] = arguments.ctypes.data


def _interned(text: str) -> str:
    # Kept by the signatures of the Python methods, as long as there are any.
    return sys.intern(text)
