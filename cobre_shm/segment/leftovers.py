"""Segments that lie in shared memory: whose they are, and removing those of dead runs."""

from __future__ import annotations

import os
import pwd
import re
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cobre_shm import layout
from cobre_shm.errors import InitializationFailed
from cobre_shm.segment.posix import DIRECTORY
from cobre_shm.segment.segment import Segment

__all__ = ["FoundSegment", "find_segments", "remove_if_dead"]

# What Segment.random_name() gives: all that can be told of a file that may not be read.
_RANDOM_NAME = re.compile(r"cobre-[0-9a-f]{24}")


@dataclass(frozen=True)
class FoundSegment:
    """A segment that still has its name.

    Attributes:
        name: POSIX name, with its slash.
        nbytes: Bytes of the segment.
        user: Name of the user who owns it.
        creator: Pid of the process that made it; 0 when it cannot be told.
        living: Pid of the creator or of a rank that runs; 0 when all are dead.
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


def find_segments(directory: Path = DIRECTORY) -> list[FoundSegment]:
    """Return the segments that lie there, by name; other files are passed over.

    Those of other users are told by a name as the launcher gives, and not looked into.
    """
    found = []
    for path in sorted(directory.iterdir()):
        with suppress(OSError):
            status = path.lstat()
            if not stat.S_ISREG(status.st_mode):
                continue
            name, user = f"/{path.name}", _user_name(status.st_uid)
            if status.st_uid != os.geteuid():
                if _RANDOM_NAME.fullmatch(path.name):
                    problem = f"belongs to user {user} and is not looked into"
                    found.append(FoundSegment(name, status.st_size, user, 0, 0, problem))
            elif _begins_with_magic(path):
                segment = _look_at(name, status.st_size, user)
                if segment is not None:
                    found.append(segment)
    return found


def remove_if_dead(name: str) -> bool:
    """Remove the name of a segment if no process of its run lives; return whether it did."""
    try:
        segment = Segment.open(name)
    except (InitializationFailed, OSError):
        return False
    if segment is None:
        return False
    try:
        if segment.living_process():
            return False
        segment.unlink()
    finally:
        segment.close()
    return True


def _begins_with_magic(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(8) == layout.MAGIC.to_bytes(8, "little")


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
