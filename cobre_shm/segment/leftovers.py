"""What lies in shared memory: whose it is, and removing what dead runs left.

A group removes its names itself, and so does the launcher's guard. Only where all of its processes
are killed at one moment, the launcher and the guard too, a name can stay: of the segment while the
ranks join, of a region while they map it. The next launcher removes it.

A segment says itself which processes it belongs to, once it is made, which takes milliseconds: one
that is still not after a minute, and that no process of its user has open, is dead. A region is
nothing but the program's data. But whoever makes one has it open until its name is gone, and the
name tells in which pid namespace that was. So a region of this namespace that no process of its
user has open is dead.
"""

from __future__ import annotations

import os
import pwd
import re
import stat
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cobre_shm import layout
from cobre_shm.errors import InitializationFailed
from cobre_shm.segment.attach import own_processes
from cobre_shm.segment.posix import DIRECTORY, UntrustedObject, open_object, unlink_object
from cobre_shm.segment.process import pid_namespace
from cobre_shm.segment.segment import Segment

__all__ = ["FoundSegment", "find_segments", "remove_if_dead", "remove_leftovers", "remove_unready"]

# What Segment.random_name() gives: all that can be told of a file that may not be read.
_RANDOM_NAME = re.compile(r"cobre-[0-9a-f]{24}")
# What Segment.region_prefix and a number give.
_REGION_NAME = re.compile(r"cobre-[0-9a-f]{32}-(\d+)-\d+")
_MAKING = timedelta(minutes=1)


@dataclass(frozen=True)
class FoundSegment:
    """A segment, or a region, that still has its name.

    Attributes:
        name: POSIX name, with its slash.
        nbytes: Bytes of the segment.
        user: Name of the user who owns it.
        creator: Pid of the process that made it; 0 when it cannot be told, as of a region.
        living: Pid of a process of its run that runs; 0 when all are dead.
        problem: Why nothing can be said of it; empty when something can.
    """

    name: str
    nbytes: int
    user: str
    creator: int
    living: int
    problem: str = ""

    @property
    def is_dead(self) -> bool:
        """Whether it is proven that no process of its run lives."""
        return not self.problem and self.living == 0


def find_segments() -> list[FoundSegment]:
    """Return the segments and regions that lie there, by name; other files are passed over.

    Those of other users are told by a name as the launcher gives, and not looked into.
    """
    found = []
    for path in sorted(DIRECTORY.iterdir()):
        with suppress(OSError):
            status = path.lstat()
            if not stat.S_ISREG(status.st_mode):
                continue
            name, user = f"/{path.name}", _user_name(status.st_uid)
            if status.st_uid != os.geteuid():
                if _RANDOM_NAME.fullmatch(path.name):
                    problem = f"belongs to user {user} and is not looked into"
                    found.append(FoundSegment(name, status.st_size, user, 0, 0, problem))
            elif _is_region_of_ours(path.name) and not _begins_with_magic(path):
                found.append(FoundSegment(name, status.st_size, user, 0, _who_has_open(status)))
            elif _begins_with_magic(path):
                segment = _look_at(name, status.st_size, user)
                if segment is not None:
                    found.append(segment)
    return found


def remove_if_dead(name: str) -> bool:
    """Remove the name if no process of its run lives; return whether it did."""
    file_name = name.lstrip("/")
    may_be_region = _is_region_of_ours(file_name)
    try:
        if may_be_region and not _begins_with_magic(DIRECTORY / file_name):
            return _remove_region_if_dead(name)
        segment = Segment.open(name)
    except (InitializationFailed, OSError):
        # Perhaps one of another version.
        return may_be_region and _remove_region_if_dead(name)
    if segment is None:
        return False
    try:
        if segment.living_process():
            return False
        segment.unlink()
    finally:
        segment.close()
    return True


def remove_leftovers() -> None:
    """Remove what dead runs of this user left under names that nobody chose."""
    for path in DIRECTORY.glob("cobre-*"):
        if _RANDOM_NAME.fullmatch(path.name) or _REGION_NAME.fullmatch(path.name):
            with suppress(OSError):
                if not remove_if_dead(f"/{path.name}") and _is_abandoned(path):
                    remove_unready(f"/{path.name}")


def remove_unready(name: str) -> bool:
    """Remove a segment of this user that was never made ready; return whether there was one."""
    try:
        fd, _ = open_object(name, 0)
    except (FileNotFoundError, UntrustedObject):
        return False
    try:
        is_unready = os.pread(fd, 8, 0).rstrip(b"\0") == b""
        if is_unready:
            unlink_object(name, fd)
        return is_unready
    finally:
        os.close(fd)


def _is_abandoned(path: Path) -> bool:
    status = path.lstat()
    age = datetime.now(UTC) - datetime.fromtimestamp(status.st_mtime, UTC)
    return age > _MAKING and _who_has_open(status) == 0


def _is_region_of_ours(file_name: str) -> bool:
    """Whether it has the name of one; so has a segment that ``split_local`` makes."""
    match = _REGION_NAME.fullmatch(file_name)
    return match is not None and int(match[1]) == pid_namespace()


def _remove_region_if_dead(name: str) -> bool:
    try:
        fd, _ = open_object(name, 0)
    except OSError:
        return False
    try:
        if _who_has_open(os.fstat(fd), besides=fd):
            return False
        unlink_object(name, fd)
    finally:
        os.close(fd)
    return True


def _who_has_open(status: os.stat_result, besides: int = -1) -> int:
    """Pid of a process of this user that has the file open; 0 when there is none.

    Args:
        status: Of the file.
        besides: A descriptor of this process that does not count.
    """
    own = Path(f"/proc/{os.getpid()}/fd/{besides}")
    for pid in own_processes():
        # Who has more rights than we have cannot be looked into, and is no rank of our runs.
        with suppress(OSError):
            for path in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(OSError):
                    if path != own and os.path.samestat(path.stat(), status):
                        return pid
    return 0


def _begins_with_magic(path: Path) -> bool:
    # A pipe of somebody else has no writer to wait for, and a link leads elsewhere.
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return os.pread(fd, 8, 0) == layout.MAGIC.to_bytes(8, "little")
    finally:
        os.close(fd)


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _look_at(name: str, nbytes: int, user: str) -> FoundSegment | None:
    try:
        segment = Segment.open(name)
    except InitializationFailed as error:
        return FoundSegment(name, nbytes, user, 0, 0, error.message)
    if segment is None:
        return None
    try:
        return FoundSegment(name, nbytes, user, segment.creator[0], segment.living_process())
    finally:
        segment.close()
