"""Plans of the shm backend: persistent collectives, checked once and then only run.

The idea is MPI's persistent collectives (MPI 4.0, chapter 6.13): what is the same in every turn of
a loop is done before it.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from cobre_shm.fastcall import NOARGS, is_installed, method_definition
from cobre_shm.kernels import plans
from cobre_shm.native.entry import Kernel, function_address

__all__ = ["make_plan"]


def make_plan(
    cls: type,
    address: int,
    kernel: Kernel,
    args: tuple[int, ...],
    nbytes: int,
    result: Any,
    start: Callable[[], Any],
    finish: Callable[[], Any],
) -> Callable[[], Any]:
    """Return a callable that runs ``kernel`` with ``args`` and returns ``result``.

    Args:
        cls: Of the communicator.
        address: Of its context.
        kernel: The collective.
        args: Its arguments.
        nbytes: Of the payload.
        result: What a call returns.
        start: The same operation in Python, for a communicator that is busy or unusable. It
            keeps alive what the plan needs: the communicator and all buffers.
        finish: Goes on with one that has begun and come back unfinished.
    """
    if not is_installed(cls):
        return start
    words = np.zeros(plans.WORDS, dtype=np.int64)
    start_call, finish_call = (functools.partial(_ignoring_plan, f) for f in (start, finish))
    words[plans.KERNEL] = kernel.address
    words[plans.ARITY] = kernel.arity
    words[plans.CONTEXT] = address
    words[plans.RESULT] = id(result)
    words[plans.START] = id(start_call)
    words[plans.FINISH] = id(finish_call)
    words[plans.NBYTES] = nbytes
    words[plans.ARGUMENTS : plans.ARGUMENTS + len(args)] = args
    new_function = ctypes.pythonapi.PyCFunction_NewEx
    new_function.restype = ctypes.py_object
    new_function.argtypes = [ctypes.c_void_p, ctypes.py_object, ctypes.c_void_p]
    holder = (words, start_call, finish_call, result)
    return new_function(_definition(), holder, None)  # type: ignore[no-any-return]


def _ignoring_plan(function: Callable[[], Any], _plan: Any) -> Any:
    """Called with the plan's own tuple first, as every C function passes its ``self``."""
    return function()


@functools.cache
def _definition() -> int:
    doc = "plan($self, /)\n--\n\nRun the collective."
    return method_definition("plan", function_address("plan_call"), NOARGS, doc)
