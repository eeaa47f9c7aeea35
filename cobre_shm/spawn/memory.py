"""Whether the kernel killed a rank because memory ran out.

The control group that we and the ranks are in counts the processes that were killed in it for want
of memory. A rank that SIGKILL ended, though not ours, while the count rose, was one of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cobre_shm.limits import control_groups, memory_limit_bytes
from cobre_shm.units import bytes_text

__all__ = ["MemoryGroup"]


@dataclass(frozen=True)
class _Files:
    """Names of one kind of control groups: the unified one, and the older of its own."""

    kills: str
    peak: str


_UNIFIED = _Files("memory.events", "memory.peak")
_LEGACY = _Files("memory.oom_control", "memory.max_usage_in_bytes")


class MemoryGroup:
    """The control group of this process, watched from now on.

    Args:
        membership: A file like ``/proc/self/cgroup``.
        mount: Where the cgroup file systems are mounted.
    """

    def __init__(
        self,
        membership: Path = Path("/proc/self/cgroup"),
        mount: Path = Path("/sys/fs/cgroup"),
    ) -> None:
        self._where = membership, mount
        self._folders = list(_folders(membership, mount))
        self._kills = self._count_kills()

    def has_killed(self) -> bool:
        """Whether a process of the group was killed for want of memory since we look."""
        return self._count_kills() > self._kills

    def describe(self) -> str:
        """Return peak use and limit in words."""
        peaks = [n for folder, files in self._folders if (n := _read(folder / files.peak))]
        peak = peaks[0] if peaks else None
        limit = memory_limit_bytes(*self._where)
        used = f"a peak of {bytes_text(peak)}" if peak is not None else "a peak that is not known"
        of = f"a limit of {bytes_text(limit)}" if limit is not None else "the machine's memory"
        return f"out of memory: the control group had {used} and {of}"

    def _count_kills(self) -> int:
        # The nearest group that tells counts those of groups below it as well.
        for folder, files in self._folders:
            with contextlib.suppress(OSError, ValueError):
                for line in (folder / files.kills).read_text().splitlines():
                    name, _, value = line.partition(" ")
                    if name == "oom_kill":
                        return int(value)
        return 0


def _folders(membership: Path, mount: Path) -> Iterator[tuple[Path, _Files]]:
    for folder, is_unified in control_groups("memory", membership, mount):
        yield folder, _UNIFIED if is_unified else _LEGACY


def _read(file: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        return int(file.read_text())
    return None
