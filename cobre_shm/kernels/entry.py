"""The compiled kernels as C functions: their addresses, and callables for Python.

Each kernel exists once, as a C function of 64-bit integers. Python calls it through ctypes, which
gives up the GIL; the fast road (``fastcall.py``), plans and jitted programs call it by address.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, NamedTuple

from cobre_shm.kernels.allgatherv import allgatherv
from cobre_shm.kernels.allreduce import allreduce
from cobre_shm.kernels.barrier import barrier
from cobre_shm.kernels.broadcast import broadcast
from cobre_shm.kernels.common import allreduce_common
from cobre_shm.kernels.jit import kernel_function
from cobre_shm.kernels.rounds import claim

__all__ = ["ALLGATHERV", "ALLREDUCE", "ALLREDUCE_COMMON", "BARRIER", "BROADCAST", "CLAIM", "Kernel"]


class Kernel(NamedTuple):
    """A compiled collective.

    Attributes:
        arity: Number of the kernel's own arguments.
        address: Of the C function ``int64 (int64 *context, int64 resume, int64...)``.
        call: The same from Python; the GIL is released meanwhile.
    """

    arity: int
    address: int
    call: Callable[..., int]


def _compiled(function: Callable[..., Any], arguments: int) -> Kernel:
    """Compile a kernel that takes ``arguments`` integers after ``context`` and ``resume``."""
    address = kernel_function(function, arguments + 1)
    words = [ctypes.c_int64] * (arguments + 1)
    prototype = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p, *words)
    return Kernel(arguments, address, prototype(address))


# In the order of the three call words: what, tag, count; then the operation's own.
BARRIER = _compiled(barrier, 3)
BROADCAST = _compiled(broadcast, 6)
ALLREDUCE_COMMON = _compiled(allreduce_common, 7)
ALLGATHERV = _compiled(allgatherv, 8)
ALLREDUCE = _compiled(allreduce, 7)
CLAIM = _compiled(claim, 0)
