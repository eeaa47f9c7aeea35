"""The dozen functions of the C library that Python does not offer, by ctypes.

Linux x86-64 with glibc: sizes and constants are those of that platform.
"""

from __future__ import annotations

import ctypes
import errno
import os

__all__ = ["RobustMutex", "futex_wake_all", "map_shared", "unmap"]

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
_LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_LIBC.syscall.restype = ctypes.c_long
for _name in ("init", "lock", "trylock", "unlock", "consistent"):
    getattr(_LIBC, f"pthread_mutex_{_name}").argtypes = [ctypes.c_void_p] + (
        [ctypes.c_void_p] if _name == "init" else []
    )

_PROT_READ, _PROT_WRITE = 1, 2
_MAP_SHARED = 1
_MAP_FAILED = ctypes.c_void_p(-1).value
_SYS_FUTEX = 202
_FUTEX_WAKE = 1
_MUTEX_ATTRIBUTE_BYTES = 64  # sizeof(pthread_mutexattr_t) is 4
_PTHREAD_PROCESS_SHARED = 1
_PTHREAD_MUTEX_ROBUST = 1


def map_shared(fd: int, nbytes: int, *, writable: bool = True) -> int:
    """Map ``nbytes`` of ``fd``, shared with everybody who maps them; return the address.

    Unlike an ``mmap`` object the mapping never goes by itself. A robust mutex that this process
    holds in it must stay mapped until the kernel has seen the process die.
    """
    protection = _PROT_READ | _PROT_WRITE if writable else _PROT_READ
    address = _LIBC.mmap(None, nbytes, protection, _MAP_SHARED, fd, 0)
    if address in (None, _MAP_FAILED):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return int(address)


def unmap(address: int, nbytes: int) -> None:
    """Undo :func:`map_shared`."""
    _LIBC.munmap(address, nbytes)


def futex_wake_all(address: int) -> None:
    """Wake everybody who sleeps on the 32-bit word at ``address``."""
    _LIBC.syscall(
        ctypes.c_long(_SYS_FUTEX),
        ctypes.c_void_p(address),
        ctypes.c_int(_FUTEX_WAKE),
        ctypes.c_int(2**31 - 1),
        None,
        None,
        ctypes.c_int(0),
    )


class RobustMutex:
    """A process-shared robust mutex at an address in shared memory (pthread_mutex_t).

    The kernel keeps a list per thread of the robust mutexes it holds. When the thread ends in any
    way, it sets OWNER_DIED in the futex word of each (Documentation/locking/robust-futexes of
    Linux).
    """

    def __init__(self, address: int) -> None:
        self._address = address

    def initialise(self) -> None:
        """Make a free mutex; once, before anybody else can see the memory."""
        attribute = ctypes.create_string_buffer(_MUTEX_ATTRIBUTE_BYTES)
        _LIBC.pthread_mutexattr_init(attribute)
        _LIBC.pthread_mutexattr_setpshared(attribute, _PTHREAD_PROCESS_SHARED)
        _LIBC.pthread_mutexattr_setrobust(attribute, _PTHREAD_MUTEX_ROBUST)
        self._check(_LIBC.pthread_mutex_init(self._address, attribute))
        _LIBC.pthread_mutexattr_destroy(attribute)

    def try_lock(self) -> bool:
        """Lock if it is free; what a dead owner left behind counts as free."""
        code = _LIBC.pthread_mutex_trylock(self._address)
        if code == errno.EBUSY:
            return False
        if code == errno.EOWNERDEAD:
            code = _LIBC.pthread_mutex_consistent(self._address)
        self._check(code)
        return True

    def unlock(self) -> bool:
        """Unlock; False when the calling thread is not the owner."""
        return int(_LIBC.pthread_mutex_unlock(self._address)) == 0

    @staticmethod
    def _check(code: int) -> None:
        if code:
            raise OSError(code, os.strerror(code))
