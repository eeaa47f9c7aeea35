"""Facts about processes that tell a live one from a dead one and from a namesake."""

from __future__ import annotations

from pathlib import Path

__all__ = ["boot_id", "is_alive", "pid_namespace", "start_time"]


def boot_id() -> bytes:
    """16 bytes that name this boot of the machine."""
    text = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    return bytes.fromhex(text.strip().replace("-", ""))


def pid_namespace() -> int:
    """Number of the namespace in which this process's view of pids holds."""
    return Path("/proc/self/ns/pid").stat().st_ino


def start_time(pid: int) -> int:
    """Start of a process in clock ticks since boot; 0 when there is no such process.

    With the pid it names a process for the whole boot: pids are used again, pairs are not. A
    zombie has ended: 0.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return 0
    # The second field is the name in parentheses and may hold anything, parentheses included.
    fields = stat[stat.rindex(b")") + 2 :].split()
    return 0 if fields[0] in (b"Z", b"X") else int(fields[19])


def is_alive(pid: int, start: int) -> bool:
    """Whether the process with this pid and start time still runs."""
    return start != 0 and start_time(pid) == start
