"""What the system leaves to this process: control groups, memory, shared memory.

Every fact is looked up when it is asked for, and None where the system does not tell.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = [
    "control_groups",
    "memory_bytes",
    "memory_limit_bytes",
    "shared_memory_bytes",
]

_SHARED_MEMORY = Path("/dev/shm")


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


def memory_bytes(meminfo: Path = Path("/proc/meminfo")) -> tuple[int, int] | None:
    """Return total and available memory."""
    with contextlib.suppress(OSError, ValueError, KeyError, IndexError):
        lines = (line.split(":") for line in meminfo.read_text().splitlines())
        kib = {name: int(value.split()[0]) for name, value in lines}
        return kib["MemTotal"] * 1024, kib["MemAvailable"] * 1024
    return None


def memory_limit_bytes(
    membership: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")
) -> int | None:
    """Return the tightest memory limit of this process's cgroups; None: no limit."""
    limits = []
    for folder, is_unified in control_groups("memory", membership, mount):
        file = "memory.max" if is_unified else "memory.limit_in_bytes"
        with contextlib.suppress(OSError, ValueError):
            limits.append(int((folder / file).read_text()))
    # The older interface writes "no limit" as the largest number of pages.
    return min((limit for limit in limits if limit < 1 << 62), default=None)


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
