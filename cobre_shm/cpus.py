"""How many CPUs this process may use."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from cobre_shm.limits import control_groups

__all__ = ["cgroup_quota", "count_cpus"]


def count_cpus() -> int:
    """Return the smaller of the CPU affinity and the cgroup's CPU quota, at least 1."""
    allowed = len(os.sched_getaffinity(0))
    quota = cgroup_quota(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    # Rounded up: with a quota of 1.5 CPUs, one rank alone would leave a third of it unused.
    return allowed if quota is None else max(1, min(allowed, -int(-quota // 1)))


def cgroup_quota(membership: Path, mount: Path) -> float | None:
    """Return the tightest CPU quota in CPUs, or None when there is no limit.

    Args:
        membership: A file like ``/proc/self/cgroup``.
        mount: Where the cgroup file systems are mounted.
    """
    quotas = (
        _quota_unified(folder) if is_unified else _quota_legacy(folder)
        for folder, is_unified in control_groups("cpu", membership, mount)
    )
    return min((quota for quota in quotas if quota is not None), default=None)


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
