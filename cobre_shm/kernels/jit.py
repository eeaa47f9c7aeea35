"""The only place of the kernels that talks to numba's decorators.

Kernels become machine code in ``cobre_shm.compiler``. A kernel cannot raise: a division by zero
gives what numpy gives, and whatever could raise is refused when the image is made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numba.extending

__all__ = ["OPTIONS", "inlined", "intrinsic"]

F = TypeVar("F", bound=Callable[..., Any])

OPTIONS: dict[str, bool | str] = {"nogil": True, "error_model": "numpy"}


def inlined(function: F) -> F:
    """Compile as part of the entry points that call it; it cannot be called from Python."""
    return numba.njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, **OPTIONS)(function)


def intrinsic(function: Callable[..., Any]) -> Any:
    """Make a kernel function of a typing function that returns LLVM code."""
    return numba.extending.intrinsic(function)
