"""Shared memory without a name (memfd), for where the file system of POSIX objects is too small.

A memfd is memory of the same kind, but no mount bounds it: only the machine's memory and the
cgroup's limit do. Nothing of it can be left behind, as it goes with its last descriptor and
mapping. Without a name, others come to it in one of two ways:

* by inheritance: a launcher hands the descriptor to the ranks that it starts, which know it as
  ``fd:N``;
* through ``/proc/PID/fd/N`` of a process that has it and says so (PID and N travel in a collective
  of a group that exists already). Linux lets only the same user follow these links, and the inode
  tells whether the number still means what was told.

Whoever comes in either way checks the owner, the mode (the maker gives it 0600, as a memfd comes
with 0777) and the seals against shrinking and growing. With these nobody, not even the maker, can
take mapped memory away, and all of it is allocated before anybody touches it: no SIGBUS.
"""

from __future__ import annotations

import errno
import fcntl
import os
from dataclasses import dataclass
from pathlib import Path

from cobre_shm.descriptors import above_standard
from cobre_shm.errors import AllocationFailed
from cobre_shm.limits import available_bytes
from cobre_shm.segment.posix import UntrustedObject, check_ours, open_descriptor

__all__ = [
    "Whereabouts",
    "check_available",
    "create_unnamed",
    "descriptor_of",
    "open_inherited",
    "open_unnamed",
]

_PREFIX = "fd:"
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
# Linux 6.3; Python has no name for it. Some systems refuse a memfd that could be executed.
_MFD_NOEXEC_SEAL = 8


@dataclass(frozen=True)
class Whereabouts:
    """Where a process keeps memory without a name.

    Attributes:
        pid: Of the process.
        descriptor: Its number there.
        inode: Of the memory.
    """

    pid: int
    descriptor: int
    inode: int

    @classmethod
    def of(cls, fd: int) -> Whereabouts:
        """Say where this process keeps ``fd``."""
        return cls(os.getpid(), fd, os.fstat(fd).st_ino)


def create_unnamed(label: str, nbytes: int, *, allocate: bool = True) -> int:
    """Make ``nbytes`` of allocated, zeroed memory that keeps its size; return its fd.

    Args:
        label: What ``/proc/PID/fd`` shows.
        nbytes: How much.
        allocate: Whether to allocate; if not, the caller has it done before anybody touches it.

    Raises:
        AllocationFailed: The memory is not there; nothing is left.
    """
    check_available(nbytes)
    try:
        fd = _memfd(label.lstrip("/"))
        try:
            os.fchmod(fd, 0o600)
            os.ftruncate(fd, nbytes)
            if allocate:
                os.posix_fallocate(fd, 0, nbytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS | fcntl.F_SEAL_SEAL)
        except BaseException:
            os.close(fd)
            raise
    except (OSError, OverflowError) as error:
        raise AllocationFailed(nbytes, f"{error} (memfd)") from error
    return fd


def _memfd(label: str) -> int:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return above_standard(os.memfd_create(label, flags | _MFD_NOEXEC_SEAL))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return above_standard(os.memfd_create(label, flags))


def check_available(nbytes: int) -> None:
    """Check that the machine has ``nbytes`` to give.

    Where no file system refuses, the kernel would end processes if it were asked for more.

    Raises:
        AllocationFailed: It has not.
    """
    free = available_bytes()
    if free is not None and nbytes > free:
        raise AllocationFailed(
            nbytes,
            f"{free} bytes of memory are available",
            context={"free_bytes": free},
            suggestion="Use fewer or smaller shared arrays, or a larger machine or container.",
        )


def descriptor_of(name: str) -> int | None:
    """Return N of a segment's name ``fd:N``, or None for a POSIX name, which has a slash."""
    return int(name.removeprefix(_PREFIX)) if name.startswith(_PREFIX) else None


def open_inherited(fd: int, minimum_bytes: int) -> tuple[int, int]:
    """Return a descriptor of our own for an inherited one, and the size of its memory.

    ``fd`` itself stays open and is not passed on to programs that this process starts from now on.

    Raises:
        UntrustedObject: It is not open, or not memory that :func:`create_unnamed` made for this
            user. It is left as it was.
        OSError: The system refused for another reason.
    """
    path = Path(f"/proc/self/fd/{fd}")
    try:
        status = os.fstat(fd)
        check_ours(path, status, minimum_bytes)
        _check_seals(path, fd)
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDWR:
            raise UntrustedObject(f"{path} is not open for reading and writing")
        os.set_inheritable(fd, False)
        own = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    except FileNotFoundError as error:
        raise UntrustedObject(f"descriptor {fd}: {error}") from error
    except OSError as error:
        if error.errno != errno.EBADF:
            raise
        raise UntrustedObject(f"descriptor {fd}: {error}") from error
    return own, status.st_size


def open_unnamed(where: Whereabouts, minimum_bytes: int) -> int:
    """Open the memory that another process keeps, for reading and writing; return its fd.

    Raises:
        FileNotFoundError: There is no such descriptor any more, or it is too small.
        UntrustedObject: It is not the memory that was meant.
        OSError: The system does not let us.
    """
    path = Path(f"/proc/{where.pid}/fd/{where.descriptor}")
    fd, _ = open_descriptor(path, minimum_bytes, writable=True)
    try:
        if os.fstat(fd).st_ino != where.inode:
            raise UntrustedObject(f"{path} is other memory than was announced")
        _check_seals(path, fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _check_seals(path: Path, fd: int) -> None:
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        raise UntrustedObject(f"{path} is no memfd: {error}") from error
    if seals & _SEALS != _SEALS:
        raise UntrustedObject(f"{path} can be truncated: expected a memfd sealed against that")
