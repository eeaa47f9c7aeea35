"""What the machine offers: features of the kernel, an MPI library, a place for images of kernels.

Every fact is looked up when it is asked for, and None where the system does not tell.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import ModuleType

__all__ = [
    "has_futex",
    "has_futex_waitv",
    "has_memfd",
    "has_pidfd",
    "has_robust_mutex",
    "kernel_cache",
    "mpi_library",
]

# A thread that Python has joined may still be on its way out of the kernel.
_THREAD_EXIT_SECS = 1.0


def has_futex() -> bool:
    """Whether the kernel lets this process sleep on a word of shared memory."""
    libc = _libc()
    return libc is not None and not libc.is_futex_refused()


def has_futex_waitv() -> bool:
    """Whether it lets this process sleep on several words of shared memory at a time."""
    libc = _libc()
    return libc is not None and not libc.is_futex_waitv_refused()


def has_robust_mutex() -> bool:
    """Whether a mutex tells that its owner has ended: a thread takes one along and it is seen."""
    libc = _libc()
    if libc is None:
        return False
    memory = mmap.mmap(-1, mmap.PAGESIZE)
    held = ctypes.c_char.from_buffer(memory)
    try:
        mutex = libc.RobustMutex(ctypes.addressof(held))
        mutex.initialise()
        owner = threading.Thread(target=mutex.try_lock)
        owner.start()
        owner.join()
        deadline = time.monotonic() + _THREAD_EXIT_SECS
        while not mutex.try_lock():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.001)
        mutex.unlock()
    except OSError:
        return False
    finally:
        del held
        memory.close()
    return True


def has_memfd() -> bool:
    """Whether the kernel makes anonymous files in memory."""
    try:
        os.close(os.memfd_create("cobre-probe"))
    except (AttributeError, OSError):
        return False
    return True


def has_pidfd() -> bool:
    """Whether the kernel gives a descriptor that tells of a process's end."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError:
        return False
    return True


def mpi_library() -> str | None:
    """Return the MPI library of the environment or the system; it is not loaded."""
    for path in sorted(Path(sys.prefix, "lib").glob("libmpi.so*")):
        return str(path)
    # Slow to import, and nothing that a backend needs.
    from ctypes.util import find_library

    return find_library("mpi")


def kernel_cache() -> tuple[Path, int] | None:
    """Return where images of the kernels are, or will be, and how many there are.

    None: there is none and none can be written, so every process compiles for itself.
    """
    # Nobody else here needs what a backend imports.
    from cobre_shm.native.cache import SUFFIX, folders

    for folder in folders():
        if images := len(list(folder.glob(f"*{SUFFIX}"))):
            return folder, images
    return next(((folder, 0) for folder in folders() if _can_write(folder)), None)


def _libc() -> ModuleType | None:
    """Return what ranks use of the C library; None where that lacks some of it."""
    try:
        from cobre_shm.segment import libc
    except (AttributeError, OSError):
        return None
    return libc


def _can_write(folder: Path) -> bool:
    # What does not exist is made where its parent lets it.
    with suppress(OSError):
        there = next(path for path in (folder, *folder.parents) if path.exists())
        return there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    return False
