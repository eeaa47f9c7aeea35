"""Facts about processes that tell a live one from a dead one and from a namesake."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

__all__ = [
    "boot_id",
    "catches",
    "is_alive",
    "is_dying",
    "pid_namespace",
    "process_state",
    "start_text",
    "start_time",
    "state_of",
]


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

    Raises:
        OSError: It cannot be read, for want of descriptors for instance.
    """
    try:
        fields = _read_stat(pid)
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 0 if fields[0] in _ENDED else int(fields[19])


def start_text(start: int) -> str:
    """The time of day (UTC) of a start in clock ticks since boot."""
    ago = time.clock_gettime(time.CLOCK_BOOTTIME) - start / os.sysconf("SC_CLK_TCK")
    began = datetime.now(UTC) - timedelta(seconds=ago)
    return began.isoformat(sep=" ", timespec="seconds")


def state_of(pid: int) -> str:
    """What a process is doing, in a word: running, sleeping, stopped, ended, ..."""
    state = _stat(pid)[0]
    return "ended" if state in _ENDED else _STATES.get(state, state)


def process_state(pid: int, start: int) -> str:
    """The same of the process with this start time; ``zombie`` or ``gone`` when it has ended."""
    fields = _stat(pid)
    if len(fields) < 20 or int(fields[19]) != start:
        return "gone"
    return "zombie" if fields[0] in _ENDED else state_of(pid)


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third, the state, on."""
    try:
        return _read_stat(pid)
    except OSError:
        return ["X"]


def _read_stat(pid: int) -> list[str]:
    stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    # The second field is the name in parentheses and may hold anything, parentheses included.
    return stat[stat.rindex(")") + 2 :].split()


_ENDED = ("Z", "X", "x")
_STATES = {"R": "running", "S": "sleeping", "D": "in the kernel", "T": "stopped", "t": "traced"}


def is_alive(pid: int, start: int) -> bool:
    """Whether the process with this pid and start time still runs.

    Where that cannot be read any process with this pid counts: to call a living one dead would
    fail its group.
    """
    if start == 0:
        return False
    try:
        return start_time(pid) == start
    except OSError:
        return _exists(pid)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def is_dying(pid: int) -> bool:
    """Whether a process has begun to end: it has no memory of its own any more.

    It counts as alive until that memory is free, which takes seconds where it was much.
    """
    try:
        pages = Path(f"/proc/{pid}/statm").read_text(encoding="ascii")
    except OSError:
        return False
    return set(pages.split()) == {"0"}


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal now; False where that cannot be seen."""
    with suppress(OSError, ValueError, IndexError):
        status = Path(f"/proc/{pid}/status").read_text(errors="replace")
        caught = int(status.partition("\nSigCgt:")[2].split()[0], 16)
        return bool(caught >> (number - 1) & 1)
    return False
