"""POSIX shared memory objects: create with real memory, open with distrust, remove only ours."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path

import posix_ipc

from cobre_shm.descriptors import above_standard
from cobre_shm.errors import AllocationFailed

__all__ = [
    "DIRECTORY",
    "UntrustedObject",
    "allocation_failed",
    "check_ours",
    "check_room",
    "create_object",
    "how_to_enlarge",
    "open_descriptor",
    "open_object",
    "remove_object",
    "remove_objects",
    "unlink_object",
]

DIRECTORY = Path("/dev/shm")

# What the system says of a name behind which there is no object of ours. What else it says, that
# descriptors ran out for instance, is of this process, and not of the object.
_NOT_OURS = (errno.EACCES, errno.EPERM, errno.ELOOP, errno.EINVAL, errno.EISDIR, errno.ENXIO)


class UntrustedObject(OSError):
    """The object of this name is not one that we could have made."""


def create_object(name: str, nbytes: int, *, allocate: bool = True) -> int:
    """Create ``name`` exclusively with ``nbytes`` of allocated, zeroed memory; return its fd.

    Args:
        name: POSIX name.
        nbytes: How much.
        allocate: Whether to allocate. If not, the caller has it done before anybody touches it:
            ``ftruncate`` alone succeeds on a full file system, and writing ends in SIGBUS.

    Raises:
        FileExistsError: The name is taken.
        AllocationFailed: The memory is not there; nothing is left.
    """
    try:
        memory = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=0o600)
    except (posix_ipc.Error, OSError) as error:
        if isinstance(error, posix_ipc.ExistentialError) and DIRECTORY.is_dir():
            raise FileExistsError(f"shared memory object {name} exists") from error
        raise AllocationFailed(
            nbytes,
            f"{name} cannot be created: {error}",
            context={"mount": str(DIRECTORY)},
            suggestion=(
                f"Check that {DIRECTORY} is mounted and writable for uid {os.geteuid()}, and that "
                "this process may open more files (ulimit -n)."
            ),
        ) from error
    fd = -1
    try:
        fd = above_standard(memory.fd)
        os.ftruncate(fd, nbytes)
        if allocate:
            os.posix_fallocate(fd, 0, nbytes)
    except BaseException as error:
        if fd >= 0:
            os.close(fd)
        remove_object(name)
        if isinstance(error, OSError | OverflowError):
            raise allocation_failed(nbytes, error) from error
        raise
    return fd


def open_object(name: str, minimum_bytes: int) -> tuple[int, int]:
    """Open ``name`` for reading and writing; return its fd and its size in bytes.

    Raises:
        FileNotFoundError: There is no such object.
        UntrustedObject: Not a regular file, another user's, or open to others.
        OSError: The system refused for another reason.
    """
    try:
        # shm_open: O_NOFOLLOW, O_CLOEXEC
        fd = above_standard(posix_ipc.SharedMemory(name).fd)
    except posix_ipc.ExistentialError as error:
        raise FileNotFoundError(f"there is no shared memory object {name}") from error
    except (posix_ipc.PermissionsError, OSError, ValueError) as error:
        # ValueError: the C library says EINVAL of a directory.
        if isinstance(error, OSError) and error.errno not in _NOT_OURS:
            raise
        raise UntrustedObject(f"shared memory object {name} cannot be opened: {error}") from error
    try:
        status = os.fstat(fd)
        check_ours(DIRECTORY / name.lstrip("/"), status, minimum_bytes)
    except BaseException:
        os.close(fd)
        raise
    return fd, status.st_size


def open_descriptor(path: Path, minimum_bytes: int, *, writable: bool = False) -> tuple[int, int]:
    """Open the object behind ``path``, a descriptor of some process; return its fd and size.

    Raises:
        FileNotFoundError: There is no such descriptor any more, or the object is too small.
        UntrustedObject: As for :func:`open_object`.
    """
    # Before opening: a pipe's writer would take us for its reader.
    check_ours(path, path.stat(), minimum_bytes)
    access = os.O_RDWR if writable else os.O_RDONLY
    fd = above_standard(os.open(path, access | os.O_NONBLOCK | os.O_CLOEXEC))
    try:
        status = os.fstat(fd)
        check_ours(path, status, minimum_bytes)
    except BaseException:
        os.close(fd)
        raise
    return fd, status.st_size


def unlink_object(name: str, fd: int) -> None:
    """Remove ``name`` if it still is the object behind ``fd``; otherwise do nothing."""
    try:
        status = (DIRECTORY / name.lstrip("/")).lstat()
    except FileNotFoundError:
        return
    if os.path.samestat(status, os.fstat(fd)):
        remove_object(name)


def remove_object(name: str) -> None:
    """Remove ``name``, which must be one that only this group can have. Idempotent.

    Raises:
        PermissionError: It stays.
        OSError: It stays, for another reason.
    """
    with suppress(posix_ipc.ExistentialError):
        try:
            posix_ipc.unlink_shared_memory(name)
        except posix_ipc.PermissionsError as error:
            raise PermissionError(f"{name} cannot be removed: {error}") from error


def remove_objects(prefix: str) -> None:
    """Remove all names with a prefix that only one group can have."""
    for path in DIRECTORY.glob(f"{prefix.lstrip('/')}*"):
        remove_object(f"/{path.name}")


def check_ours(path: Path, status: os.stat_result, minimum_bytes: int) -> None:
    """Check that an object is one that we could have made.

    Raises:
        FileNotFoundError: It is too small.
        UntrustedObject: Not a regular file, another user's, open to others, or with other names.
    """
    if not stat.S_ISREG(status.st_mode):
        raise UntrustedObject(f"{path} is not a regular file")
    if status.st_uid != os.geteuid():
        raise UntrustedObject(f"{path} belongs to uid {status.st_uid}, not to {os.geteuid()}")
    if status.st_mode & 0o077:
        raise UntrustedObject(f"{path} has mode {stat.S_IMODE(status.st_mode):o}, expected 600")
    if status.st_nlink > 1:
        raise UntrustedObject(f"{path} has {status.st_nlink} hard links, expected 1")
    if status.st_size < minimum_bytes:
        # A creator grows it only after the name exists: it may be right in a moment.
        raise FileNotFoundError(f"{path} has {status.st_size} bytes, at least {minimum_bytes} due")


def check_room(nbytes: int) -> None:
    """Check that POSIX objects may take ``nbytes`` more now; others may be faster.

    Raises:
        AllocationFailed: They may not.
    """
    usage = os.statvfs(DIRECTORY)
    # A mount without a limit says that it has no blocks at all.
    if usage.f_blocks and nbytes > usage.f_bavail * usage.f_frsize:
        raise allocation_failed(nbytes, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))


def allocation_failed(nbytes: int, error: BaseException) -> AllocationFailed:
    """Return the error for ``nbytes`` of POSIX memory that the system refused with ``error``."""
    usage = os.statvfs(DIRECTORY)
    free = usage.f_bavail * usage.f_frsize
    used = (usage.f_blocks - usage.f_bfree) * usage.f_frsize
    suggestion = f"Make room in {DIRECTORY} or enlarge it: {how_to_enlarge(used + nbytes)}"
    if isinstance(error, OSError) and error.errno == errno.EFBIG:
        suggestion = "Let this process make larger files: ulimit -f"
    return AllocationFailed(
        nbytes,
        f"{error} ({DIRECTORY} has {free} bytes free)",
        context={"free_bytes": free, "mount": str(DIRECTORY)},
        suggestion=suggestion,
    )


def how_to_enlarge(nbytes: int) -> str:
    """Return, to be pasted, what makes shared memory hold at least ``nbytes`` in all."""
    mebibytes = 1 << (-(-nbytes >> 20) - 1).bit_length()
    size = f"{mebibytes}m" if mebibytes < 1024 else f"{mebibytes // 1024}g"
    return f"mount -o remount,size={size} {DIRECTORY}, or for a container --shm-size={size}"
