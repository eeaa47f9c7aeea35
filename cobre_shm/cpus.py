"""How many CPUs this process may use."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

__all__ = ["cgroup_quota", "count_cpus"]


def count_cpus() -> int:
    """Return the smaller of the CPU affinity and the cgroup's CPU quota, at least 1."""
    allowed = len(os.sched_getaffinity(0))
    quota = cgroup_quota(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    # Rounded up: with a quota of 1.5 CPUs, one rank alone would leave a third of it unused.
    return allowed if quota is None else max(1, min(allowed, -int(-quota // 1)))


def cgroup_quota(membership: Path, mount: Path) -> float | None:
    """Return the tightest CPU quota in CPUs, or None when there is no limit.

    Every ancestor may set a limit of its own. Inside a container the path in ``membership`` may
    be the host's and not exist below ``mount``; then the mount's root is the container's group.

    Args:
        membership: A file like ``/proc/self/cgroup``.
        mount: Where the cgroup file systems are mounted.
    """
    quotas: list[float] = []
    with contextlib.suppress(OSError):
        for line in membership.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                root, read = mount, _quota_unified
            elif "cpu" in controllers.split(","):
                named = mount / controllers
                root, read = named if named.is_dir() else mount / "cpu", _quota_legacy
            else:
                continue
            group = root / path.lstrip("/")
            for folder in (group, *group.parents):
                quota = read(folder)
                if quota is not None:
                    quotas.append(quota)
                if folder == root:
                    break
    return min(quotas, default=None)


def _quota_unified(folder: Path) -> float | None:
    with contextlib.suppress(OSError, ValueError):
        quota, period = (folder / "cpu.max").read_text().split()
        if quota != "max":
            return int(quota) / int(period)
    return None


def _quota_legacy(folder: Path) -> float | None:
    with contextlib.suppress(OSError, ValueError):
        quota = int((folder / "cpu.cfs_quota_us").read_text())
        if quota > 0:
            return quota / int((folder / "cpu.cfs_period_us").read_text())
    return None
