"""What the system leaves to this process: control groups, memory, shared memory.

Every fact is looked up when it is asked for, and None where the system does not tell.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

__all__ = [
    "available_bytes",
    "control_groups",
    "memory_bytes",
    "memory_limit_bytes",
    "shared_memory_bytes",
]

_MEMINFO, _SHARED_MEMORY = Path("/proc/meminfo"), Path("/dev/shm")
_MEMBERSHIP, _MOUNT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
# The older interface writes "no limit" as the largest number of pages.
_NO_LIMIT = 1 << 62


def control_groups(controller: str, membership: Path, mount: Path) -> Iterator[tuple[Path, bool]]:
    """Find the groups of this process, each before its parent.

    Every ancestor may set a limit of its own. Inside a container the path in ``membership`` may
    be the host's and not exist below ``mount``; then the mount's root is the container's group.

    Args:
        controller: ``cpu``, ``memory``, ...
        membership: A file like ``/proc/self/cgroup``.
        mount: Where the cgroup file systems are mounted.

    Yields:
        The folder of a group, which need not exist, and whether it is of the unified kind.
    """
    with contextlib.suppress(OSError, ValueError):
        for line in membership.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                root = mount
            elif controller in controllers.split(","):
                named = mount / controllers
                root = named if named.is_dir() else mount / controller
            else:
                continue
            group = root / path.lstrip("/")
            for folder in (group, *group.parents):
                yield folder, not controllers
                if folder == root:
                    break


def memory_bytes(meminfo: Path = _MEMINFO) -> tuple[int, int] | None:
    """Return total and available memory."""
    with contextlib.suppress(OSError, ValueError, KeyError, IndexError):
        lines = (line.split(":") for line in meminfo.read_text().splitlines())
        kib = {name: int(value.split()[0]) for name, value in lines}
        return kib["MemTotal"] * 1024, kib["MemAvailable"] * 1024
    return None


def memory_limit_bytes(membership: Path = _MEMBERSHIP, mount: Path = _MOUNT) -> int | None:
    """Return the tightest memory limit of this process's cgroups; None: no limit."""
    return min((limit for _, _, limit in _memory_limits(membership, mount)), default=None)


def available_bytes(
    meminfo: Path = _MEMINFO, membership: Path = _MEMBERSHIP, mount: Path = _MOUNT
) -> int | None:
    """Return how much memory this process can still take: of the machine's, and of its cgroups'."""
    machine = memory_bytes(meminfo)
    left = [machine[1]] if machine is not None else []
    for folder, is_unified, limit in _memory_limits(membership, mount):
        usage = "memory.current" if is_unified else "memory.usage_in_bytes"
        total = "" if is_unified else "total_"
        # Contents of files go before anything is refused.
        cached = [f"{total}inactive_file", f"{total}active_file"]
        used = _number(folder / usage, 0) - _statistics(folder / "memory.stat", cached)
        left.append(max(0, limit - max(0, used)))
    return min(left, default=None)


def _memory_limits(membership: Path, mount: Path) -> Iterator[tuple[Path, bool, int]]:
    """Find the groups of this process that have a limit: folder, whether unified, limit."""
    for folder, is_unified in control_groups("memory", membership, mount):
        file = "memory.max" if is_unified else "memory.limit_in_bytes"
        limit = _number(folder / file, _NO_LIMIT)
        if limit < _NO_LIMIT:
            yield folder, is_unified, limit


def _number(file: Path, otherwise: int) -> int:
    with contextlib.suppress(OSError, ValueError):
        return int(file.read_text())
    return otherwise


def _statistics(file: Path, names: Sequence[str]) -> int:
    with contextlib.suppress(OSError, ValueError):
        lines = (line.split() for line in file.read_text().splitlines())
        return sum(int(value) for key, value in lines if key in names)
    return 0


def shared_memory_bytes(path: Path = _SHARED_MEMORY) -> tuple[int, int] | None:
    """Return size and free bytes of the file system of POSIX shared memory.

    They are those of the machine's memory where it is mounted without a limit of its own.
    """
    with contextlib.suppress(OSError):
        usage = os.statvfs(path)
        # Such a mount says that it has no blocks at all.
        if not usage.f_blocks:
            return memory_bytes()
        return usage.f_blocks * usage.f_frsize, usage.f_bavail * usage.f_frsize
    return None
