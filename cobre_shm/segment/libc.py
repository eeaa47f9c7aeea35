"""The dozen functions of the C library that Python does not offer, by ctypes.

Linux x86-64 with glibc: sizes and constants are those of that platform.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading

__all__ = [
    "RobustMutex",
    "allow_reading_by",
    "futex_wake_all",
    "is_futex_refused",
    "is_futex_waitv_refused",
    "is_robust_list_known",
    "map_private_over",
    "map_shared",
    "reserve",
    "unmap",
]

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
for _name in ("init", "trylock", "unlock", "consistent"):
    getattr(_LIBC, f"pthread_mutex_{_name}").argtypes = [ctypes.c_void_p] + (
        [ctypes.c_void_p] if _name == "init" else []
    )

_PROT_NONE, _PROT_READ, _PROT_WRITE = 0, 1, 2
_MAP_SHARED, _MAP_PRIVATE, _MAP_FIXED, _MAP_ANONYMOUS, _MAP_NORESERVE = 1, 2, 0x10, 0x20, 0x4000
_MAP_FAILED = ctypes.c_void_p(-1).value
_SYS_FUTEX, _SYS_FUTEX_WAITV = 202, 449
_SYS_GET_ROBUST_LIST = 274
_FUTEX_WAIT, _FUTEX_WAKE = 0, 1
_REFUSALS = (errno.ENOSYS, errno.EPERM, errno.EACCES)
_MUTEX_ATTRIBUTE_BYTES = 64  # sizeof(pthread_mutexattr_t) is 4
_PR_SET_PTRACER = 0x59616D61
_PTHREAD_PROCESS_SHARED = 1
_PTHREAD_MUTEX_ROBUST = 1


def allow_reading_by(ancestor: int) -> None:
    """Let a process and its descendants read this one's memory where Yama restricts that.

    Its mode 1 (the kernel's admin-guide/LSM/Yama) allows it to ancestors only. Elsewhere this does
    nothing.
    """
    _LIBC.prctl(_PR_SET_PTRACER, ctypes.c_ulong(ancestor), 0, 0, 0)


def map_shared(
    fd: int, nbytes: int, *, writable: bool = True, offset: int = 0, at: int | None = None
) -> int:
    """Map ``nbytes`` of ``fd``, shared with everybody who maps them; return the address.

    Unlike an ``mmap`` object the mapping never goes by itself. A robust mutex that this process
    holds in it must stay mapped until the kernel has seen the process die.

    Args:
        fd: Descriptor of the memory.
        nbytes: How much of it.
        writable: Whether it may be written through this mapping.
        offset: Where in the memory, a multiple of the page.
        at: Address to map it at, inside what :func:`reserve` gave; None: any.
    """
    protection = _PROT_READ | _PROT_WRITE if writable else _PROT_READ
    flags = _MAP_SHARED | (0 if at is None else _MAP_FIXED)
    return _mmap(at, nbytes, protection, flags, fd, offset)


def reserve(nbytes: int, *, at: int | None = None) -> int:
    """Reserve addresses without memory; return the first. Touching them is a SIGSEGV.

    Args:
        nbytes: How many.
        at: Reserve these, in place of what is mapped there; None: any.
    """
    flags = _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_NORESERVE | (0 if at is None else _MAP_FIXED)
    return _mmap(at, nbytes, _PROT_NONE, flags, -1, 0)


def _mmap(at: int | None, nbytes: int, protection: int, flags: int, fd: int, offset: int) -> int:
    address = _LIBC.mmap(at, nbytes, protection, flags, fd, offset)
    if address in (None, _MAP_FAILED):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return int(address)


def map_private_over(address: int, nbytes: int) -> None:
    """Put zeros that nobody else sees in the place of a mapping."""
    flags = _MAP_PRIVATE | _MAP_FIXED | _MAP_ANONYMOUS
    _mmap(address, nbytes, _PROT_READ | _PROT_WRITE, flags, -1, 0)


def unmap(address: int, nbytes: int) -> None:
    """Undo :func:`map_shared` and :func:`reserve`."""
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


def is_futex_refused() -> bool:
    """Whether the system refuses to let this process sleep on shared memory, or wake others."""
    return any(_is_refused(operation) for operation in (_FUTEX_WAIT, _FUTEX_WAKE))


def _is_refused(operation: int) -> bool:
    word = ctypes.c_uint32(0)
    # The word is not 1, so a wait that is allowed ends at once, with EAGAIN; a wake finds nobody.
    code = _LIBC.syscall(
        ctypes.c_long(_SYS_FUTEX),
        ctypes.byref(word),
        ctypes.c_int(operation),
        ctypes.c_int(1),
        None,
        None,
        ctypes.c_int(0),
    )
    return code < 0 and ctypes.get_errno() in _REFUSALS


def is_futex_waitv_refused() -> bool:
    """Whether the system refuses to let this process sleep on several such words at a time."""
    # A kernel that knows the call answers EINVAL to an empty list.
    code = _LIBC.syscall(
        ctypes.c_long(_SYS_FUTEX_WAITV),
        None,
        ctypes.c_int(0),
        ctypes.c_int(0),
        None,
        ctypes.c_int(0),
    )
    return bool(code) and ctypes.get_errno() in _REFUSALS


def is_robust_list_known() -> bool:
    """Whether the kernel knows the robust mutexes of this thread, and so marks them at its end.

    True as well where it does not tell.
    """
    head, length = ctypes.c_void_p(1), ctypes.c_size_t(0)
    code = _LIBC.syscall(
        ctypes.c_long(_SYS_GET_ROBUST_LIST),
        ctypes.c_int(0),
        ctypes.byref(head),
        ctypes.byref(length),
    )
    return bool(code) or head.value is not None


class RobustMutex:
    """A process-shared robust mutex at an address in shared memory (pthread_mutex_t).

    The kernel keeps a list per thread of the robust mutexes it holds. When the thread ends in any
    way, it sets OWNER_DIED in the futex word of each (Documentation/locking/robust-futexes of
    Linux).

    The list runs through the mutexes themselves, and glibc follows its links without a look. In a
    segment that somebody has scribbled over, that would be a write to anywhere. So which mutexes
    this process holds is kept in private memory, and one whose links do not lead to its
    neighbours there is never touched again: it stays held, and must stay mapped.
    """

    def __init__(self, address: int) -> None:
        self._address = address

    @staticmethod
    def is_any_held(address: int, nbytes: int) -> bool:
        """Whether this process holds one in that memory, which then must not be unmapped."""
        return any(address <= node < address + nbytes for node in list(_held))

    def initialise(self) -> None:
        """Make a free mutex; once, before anybody else can see the memory."""
        attribute = ctypes.create_string_buffer(_MUTEX_ATTRIBUTE_BYTES)
        _LIBC.pthread_mutexattr_init(attribute)
        _LIBC.pthread_mutexattr_setpshared(attribute, _PTHREAD_PROCESS_SHARED)
        _LIBC.pthread_mutexattr_setrobust(attribute, _PTHREAD_MUTEX_ROBUST)
        self._check(_LIBC.pthread_mutex_init(self._address, attribute))
        _LIBC.pthread_mutexattr_destroy(attribute)

    def try_lock(self) -> bool:
        """Lock if it is free; what a dead owner left behind counts as free, damage does not."""
        kind = _kind_of(self._address)
        if kind not in _KINDS:
            return False
        node, entry = self._address + _NODE, (threading.get_native_id(), kind)
        # Before it is held: the collector may end another communicator in here, which then finds
        # this node in the list.
        _held.setdefault(node, entry)
        code = _LIBC.pthread_mutex_trylock(self._address)
        if code not in (0, errno.EOWNERDEAD):
            if _held.get(node) is entry:
                del _held[node]
            return False
        _held[node] = entry
        if code == errno.EOWNERDEAD:
            _LIBC.pthread_mutex_consistent(self._address)
        return True

    def unlock(self) -> bool:
        """Unlock; False when the calling thread is not the owner, or the mutex is damaged."""
        node = self._address + _NODE
        owner, kind = _held.get(node, (0, 0))
        if owner != threading.get_native_id() or _kind_of(self._address) != kind:
            return False
        if kind == _ROBUST_KIND and not _is_in_place(node, owner):
            return False
        if _LIBC.pthread_mutex_unlock(self._address):
            return False
        del _held[node]
        return True

    @staticmethod
    def _check(code: int) -> None:
        if code:
            raise OSError(code, os.strerror(code))


# Of pthread_mutex_t, which is part of the binary interface: where its kind stands, the two kinds
# that the above makes (shared between processes, and robust if the C library agreed), and where
# its node of the list of held mutexes. A node is the pointer to the next one; the pointer to the
# previous one stands before it.
_KIND = 16
_SHARED_KIND, _ROBUST_KIND = 128, 128 | 16
_KINDS = (_SHARED_KIND, _ROBUST_KIND)
_NODE = 32

# Mutexes that this process holds: address of the node, thread, kind.
_held: dict[int, tuple[int, int]] = {}
_threads = threading.local()


def _kind_of(address: int) -> int:
    return ctypes.c_int32.from_address(address + _KIND).value


def _pointer_at(address: int) -> int:
    return ctypes.c_uint64.from_address(address).value


def _is_in_place(node: int, thread: int) -> bool:
    """Whether a held mutex's links lead to its neighbours in this thread's list, and back."""
    held = list(_held.items())
    nodes = {other for other, (owner, _) in held if owner == thread and other != node}
    nodes.add(_head_of_list())
    following, previous = _pointer_at(node), _pointer_at(node - 8)
    if not {following, previous} <= nodes:
        return False
    return _pointer_at(previous) == node == _pointer_at(following - 8)


def _head_of_list() -> int:
    """Where this thread's list begins: what comes before the newest, here a private one."""
    if not hasattr(_threads, "head"):
        memory = ctypes.create_string_buffer(64)
        mutex = RobustMutex(ctypes.addressof(memory))
        mutex.initialise()
        _LIBC.pthread_mutex_trylock(mutex._address)
        _threads.head = _pointer_at(mutex._address + _NODE - 8)
        _LIBC.pthread_mutex_unlock(mutex._address)
    return int(_threads.head)
