"""Segments that lie in shared memory: whose they are, and removing those of dead runs."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cobre_shm import layout
from cobre_shm.errors import InitializationFailed
from cobre_shm.segment.posix import DIRECTORY
from cobre_shm.segment.segment import Segment

__all__ = ["FoundSegment", "find_segments", "remove_if_dead"]


@dataclass(frozen=True)
class FoundSegment:
    """A segment of this user that still has its name.

    Attributes:
        name: POSIX name, with its slash.
        nbytes: Bytes of the segment.
        creator: Pid of the process that made it; 0 when it cannot be told.
        living: Pid of the creator or of a rank that runs; 0 when all are dead.
        problem: Why nothing can be said of it; empty when something can.
    """

    name: str
    nbytes: int
    creator: int
    living: int
    problem: str = ""

    @property
    def is_dead(self) -> bool:
        """Whether it is proven that no process of its run lives."""
        return not self.problem and self.living == 0


def find_segments(directory: Path = DIRECTORY) -> list[FoundSegment]:
    """Return this user's segments, by name. Other files and other users' are passed over."""
    found = []
    for path in sorted(directory.iterdir()):
        with suppress(OSError):
            status = path.lstat()
            ours = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()
            if ours and _begins_with_magic(path):
                segment = _look_at(f"/{path.name}", status.st_size)
                if segment is not None:
                    found.append(segment)
    return found


def remove_if_dead(name: str) -> bool:
    """Remove the name of a segment if no process of its run lives; return whether it did."""
    try:
        segment = Segment.open(name)
    except InitializationFailed:
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


def _look_at(name: str, nbytes: int) -> FoundSegment | None:
    try:
        segment = Segment.open(name)
    except InitializationFailed as error:
        return FoundSegment(name, nbytes, 0, 0, error.message)
    if segment is None:
        return None
    try:
        return FoundSegment(name, nbytes, segment.creator[0], segment.living_process())
    finally:
        segment.close()
