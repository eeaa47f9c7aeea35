"""The only place that talks to numba's decorators: compiling, caching, and doing it once.

Entry points have explicit signatures, so that importing a kernel module loads (or compiles) all
of it. Compilation is done under an exclusive lock on the directory of this file: when many ranks
start with a cold cache, one compiles and the others load what it wrote. Without the lock two
processes may also give one numbered cache file to two signatures.

numba looks only at the file of the cached function itself to see whether the cache is fresh; the
kernels inline functions of other files. So the stamp is replaced by a hash of all their sources.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import numba
import numba.core.caching
import numba.core.ccallback
import numba.core.sigutils
import numba.extending

from cobre_shm import failpoints

__all__ = [
    "compiling",
    "function_address",
    "inlined",
    "integer_function",
    "intrinsic",
    "kernel_function",
]

F = TypeVar("F", bound=Callable[..., Any])

_HERE = Path(__file__).parent
# Modules outside this folder whose constants the kernels take in.
_ELSEWHERE = ("layout.py", "failpoints.py", "tuning.py")


def _source_stamp() -> str:
    digest = hashlib.blake2b(digest_size=16)
    for path in [*sorted(_HERE.glob("*.py")), *(_HERE.parent / name for name in _ELSEWHERE)]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


_STAMP = _source_stamp()


@contextmanager
def compiling() -> Iterator[None]:
    """Hold the machine-wide compilation lock; it goes with the process.

    The lock is on a directory opened for reading, so a read-only installation has it too.
    """
    fd = os.open(_HERE, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with suppress(OSError):  # a file system without locks: only the saving is lost
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def inlined(function: F) -> F:
    """Compile as part of the entry points that call it."""
    return numba.njit(nogil=True)(function)


def intrinsic(function: Callable[..., Any]) -> Any:
    """Make a kernel function of a typing function that returns LLVM code."""
    return numba.extending.intrinsic(function)


def function_address(function: Callable[..., Any], signature: Any) -> int:
    """Compile (or load) ``function`` for ``signature`` and return its C address.

    The code lives as long as the process. What is ``inlined`` is taken as its plain function.
    """
    function = getattr(function, "py_func", function)
    compiled = numba.core.ccallback.CFunc(
        function, numba.core.sigutils.normalize_signature(signature), {}, {"nogil": True}
    )
    _enable_cache(compiled)
    with compiling():
        compiled.compile()
    _KEEP.append(compiled)
    return int(compiled.address)


def integer_function(function: Callable[..., Any], arguments: int) -> int:
    """Return the C address of a function of 64-bit integers that returns one."""
    integer = numba.types.int64
    return function_address(function, integer(*[integer] * arguments))


def kernel_function(function: Callable[..., Any], arguments: int) -> int:
    """Return the C address of a kernel of a context and 64-bit integers."""
    integer = numba.types.int64
    context = numba.types.CPointer(integer)
    return function_address(function, integer(context, *[integer] * arguments))


_KEEP: list[Any] = []


def _enable_cache(target: Any) -> None:
    try:
        if hasattr(target, "enable_caching"):
            target.enable_caching()
        file = target._cache._cache_file
        file._source_stamp = _STAMP
        if failpoints.ENABLED:
            # Other code from the same source: it must not displace what everybody uses.
            file._index_path += ".failpoints"
            file._data_name_pattern = f"failpoints.{file._data_name_pattern}"
    except (RuntimeError, AttributeError):
        # No place to write a cache, or a numba whose cache looks different: compile each time.
        target._cache = numba.core.caching.NullCache()
