"""Reaching a running group's segment from outside, to read it.

A segment has no name once its ranks have joined, or never had one (a memfd), but the launcher and
every rank keep it open: ``/proc/PID/fd`` leads to it. Linux lets only the same user (and root)
follow these links, and the file itself is checked as when a rank joins. It is opened and mapped
for reading, so there is no way from here to disturb a rank.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Self

from cobre_shm import layout
from cobre_shm.errors import InitializationFailed
from cobre_shm.segment.posix import DIRECTORY, UntrustedObject, open_descriptor
from cobre_shm.segment.segment import Segment

__all__ = ["ObservedSegment", "own_processes", "segments_open_in"]

_DELETED = " (deleted)"
# Segments and regions without a name; other programs have memfds too.
_MEMFD = "/memfd:cobre-"


class ObservedSegment(Segment):
    """A segment that this process can read only."""

    _is_writable = False

    @classmethod
    def open_path(cls, name: str, path: Path) -> Self | None:
        """Map the segment behind a descriptor of one of its processes; None if it is not one.

        Raises:
            InitializationFailed: It is of another version, layout or pid namespace.
        """
        try:
            fd, nbytes = open_descriptor(path, layout.CONTROL)
        except (UntrustedObject, OSError):
            return None
        try:
            segment = cls(name, fd, nbytes)
        except OSError:
            return None
        # The monitor shall not be found as one of the group's processes.
        segment.close_descriptor()
        try:
            if segment.words.load(0) != layout.MAGIC:  # <SYNC ready>
                segment.close()
                return None
            segment._check_header()
        except InitializationFailed:
            segment.close()
            raise
        return segment


def own_processes() -> Iterator[int]:
    """Pids of this user's processes."""
    for folder in Path("/proc").iterdir():
        with suppress(OSError):
            if folder.name.isdigit() and folder.stat().st_uid == os.geteuid():
                yield int(folder.name)


def segments_open_in(pids: Iterable[int], name: str | None = None) -> list[ObservedSegment]:
    """Map the segments that these processes keep open, each one once.

    Args:
        pids: Where to look.
        name: Of the only segment wanted, with its slash; default: all.

    Raises:
        InitializationFailed: The one of this name cannot be read by this version.
    """
    found: dict[tuple[int, int], ObservedSegment] = {}
    try:
        for pid in pids:
            for path, named in _shared_descriptors(pid):
                if name not in (None, named):
                    continue
                with suppress(OSError):
                    status = path.stat()
                    key = status.st_dev, status.st_ino
                    if key not in found:
                        segment = _open(named, path, is_wanted=name is not None)
                        if segment is not None:
                            found[key] = segment
    except BaseException:
        for segment in found.values():
            segment.close()
        raise
    return list(found.values())


def _open(name: str, path: Path, *, is_wanted: bool) -> ObservedSegment | None:
    try:
        return ObservedSegment.open_path(name, path)
    except InitializationFailed:
        if is_wanted:
            raise
        return None


def _shared_descriptors(pid: int) -> Iterator[tuple[Path, str]]:
    """The descriptors of a process that are open on shared memory, and the names they had.

    Memory that never had a name is shown by its label, with a slash as if it were one.
    """
    with suppress(OSError):
        for path in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                target = str(path.readlink()).removesuffix(_DELETED)
                if target.startswith(f"{DIRECTORY}/"):
                    yield path, target.removeprefix(str(DIRECTORY))
                elif target.startswith(_MEMFD):
                    yield path, target.replace("memfd:", "", 1)
