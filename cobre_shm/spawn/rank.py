"""One rank: a process, in a process group of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "KILLED_SECS",
    "Ending",
    "Pipes",
    "Rank",
    "group_members",
    "look_at",
    "reap",
    "wait_for_killed",
]

# SIGKILL ends a process at once, unless a call that cannot be interrupted holds it in the kernel
# (a dead file server), a debugger does not let it go, or it has become another user's.
KILLED_SECS = 5.0
_LOOK_SECS = 0.0005


@dataclass(frozen=True)
class Ending:
    """How a process ended: at most one of the two is set; none: nobody knows."""

    exit_code: int | None = None
    signal: int | None = None

    @property
    def is_unknown(self) -> bool:
        """Whether it was reaped before we looked: its pid may be somebody else's by now."""
        return self.exit_code is None and self.signal is None

    @property
    def code(self) -> int:
        """The exit code as a shell shows it; 128 where nobody knows."""
        if self.exit_code is not None:
            return self.exit_code
        return 128 + (self.signal or 0)

    @property
    def returncode(self) -> int | None:
        """The exit code as ``subprocess`` shows it: minus the signal; None: nobody knows."""
        return -self.signal if self.signal is not None else self.exit_code

    @property
    def short(self) -> str:
        """Code or signal in a table."""
        if self.is_unknown:
            return "ended unseen"
        if self.signal is None:
            return f"exit code {self.exit_code}"
        return self._signal_name or f"signal {self.signal}"

    @property
    def _signal_name(self) -> str:
        try:
            return signal.Signals(self.signal or 0).name
        except ValueError:
            return ""

    def __str__(self) -> str:
        if self.is_unknown:
            return "ended unseen: SIGCHLD is ignored, or something else has reaped it"
        if self.signal is None:
            return f"ended with exit code {self.exit_code}"
        name = f" ({self._signal_name})" if self._signal_name else ""
        return f"was killed by signal {self.signal}{name}"


def look_at(pid: int) -> Ending | None:
    """Return how a child has ended, or None while it runs. It stays to be reaped."""
    try:
        result = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        # SIGCHLD is ignored, or somebody else has reaped it.
        return Ending()
    if result is None:
        return None
    if result.si_code == os.CLD_EXITED:
        return Ending(exit_code=result.si_status)
    return Ending(signal=result.si_status)


def reap(pid: int, secs: float) -> bool:
    """Take a child out of the process table; return whether it has ended within ``secs``."""

    def is_reaped() -> bool:
        try:
            return os.waitpid(pid, os.WNOHANG)[0] == pid
        except ChildProcessError:
            return True

    return _is_soon(is_reaped, secs)


def wait_for_killed(process: subprocess.Popen[bytes]) -> None:
    """Reap a process that was sent SIGKILL; leave one that does not end to the system."""
    _is_soon(lambda: process.poll() is not None, KILLED_SECS)


def _is_soon(condition: Callable[[], bool], secs: float) -> bool:
    deadline = time.monotonic() + secs
    while not (is_true := condition()) and time.monotonic() < deadline:
        time.sleep(_LOOK_SECS)
    return is_true


class Rank:
    """A process of the group, a child of ours.

    It is not reaped before ``reap``: as long as its entry stays in the process table, neither
    its pid nor its process group can come to mean anyone else's.

    Args:
        number: The rank.
        pid: Its process id, and its process group's.

    Attributes:
        ending: How it ended, once ``look`` has seen it.
        was_stopped: Whether it was still running when it was told to terminate.
        cause: What is known about why it ended, beside ``ending``.
        dump_signal: The signal on which it shows its Python stacks; 0: it does not.
    """

    def __init__(self, number: int, pid: int) -> None:
        self.number = number
        self.pid = pid
        self.cause = ""
        self.dump_signal = 0
        self.ending: Ending | None = None
        self.was_stopped: bool = False

    def look(self) -> Ending | None:
        """Return how the process has ended, or None while it runs."""
        if self.ending is None:
            self.ending = look_at(self.pid)
        return self.ending

    def send(self, number: int) -> None:
        """Signal the whole process group, which may have members left after the rank's end."""
        if self.ending is not None and self.ending.is_unknown:
            return
        if self.ending is None and number in (signal.SIGTERM, signal.SIGKILL):
            self.was_stopped = True
        # A rank that runs a program of another user cannot be signalled.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    def send_to_process(self, number: int) -> None:
        """Signal the rank alone, without what it has started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(self.pid, number)

    def reap(self, deadline: float) -> None:
        """Take the process, which was killed, out of the process table if it ends in time."""
        self.look()
        reap(self.pid, deadline - time.monotonic())


@dataclass(frozen=True)
class Pipes:
    """The two outputs of a process: the ends that we read, and those that it writes to.

    Attributes:
        read_ends: Of standard output and standard error; whoever reads them closes them.
        write_ends: To be closed here with ``close`` as soon as the process has them.
    """

    read_ends: tuple[int, int]
    write_ends: tuple[int, int]

    @classmethod
    def make(cls) -> Pipes:
        """Make both pipes, or none."""
        out = os.pipe()
        try:
            err = os.pipe()
        except OSError:
            os.close(out[0])
            os.close(out[1])
            raise
        return cls((out[0], err[0]), (out[1], err[1]))

    def close_write_ends(self) -> None:
        """Leave them to the process alone, so that its end is the end of the output."""
        for descriptor in self.write_ends:
            os.close(descriptor)

    def close_read_ends(self) -> None:
        """Close what nobody is going to read."""
        for descriptor in self.read_ends:
            os.close(descriptor)


def group_members(groups: Iterable[int]) -> dict[int, int]:
    """Return the pid and process group of every living process in these groups."""
    wanted = set(groups)
    found: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            # The command's name stands in parentheses and may hold anything, spaces included.
            state, _, group, *_ = (folder / "stat").read_bytes().rpartition(b")")[2].split()
            if int(group) in wanted and state not in (b"Z", b"X"):
                found[int(folder.name)] = int(group)
    return found
