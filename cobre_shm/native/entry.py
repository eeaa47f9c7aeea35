"""The compiled kernels as C functions: their addresses, and callables for Python.

Each kernel exists once, as a C function of 64-bit integers. Python calls it through ctypes, which
gives up the GIL; the fast road (``fastcall.py``), plans and jitted programs call it by address.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import NamedTuple

from cobre_shm.native.cache import addresses
from cobre_shm.native.table import CORE, FUNCTIONS, KERNELS

__all__ = [
    "ALLGATHERV",
    "ALLREDUCE",
    "ALLREDUCE_COMMON",
    "BARRIER",
    "BROADCAST",
    "CLAIM",
    "Kernel",
    "function",
    "function_address",
]

_addresses = addresses(CORE)


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


def function_address(name: str) -> int:
    """Return the address of one of ``FUNCTIONS``."""
    return _addresses[name]


def function(name: str) -> Callable[..., int]:
    """Return one of ``FUNCTIONS`` as one of Python."""
    return _callable(name, FUNCTIONS[name])


def _kernel(name: str) -> Kernel:
    arity = KERNELS[name]
    return Kernel(arity, _addresses[name], _callable(name, arity + 2))


def _callable(name: str, arguments: int) -> Callable[..., int]:
    prototype = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * arguments)
    return prototype(_addresses[name])


BARRIER = _kernel("barrier")
BROADCAST = _kernel("broadcast")
ALLREDUCE_COMMON = _kernel("allreduce_common")
ALLGATHERV = _kernel("allgatherv")
ALLREDUCE = _kernel("allreduce")
CLAIM = _kernel("claim")
