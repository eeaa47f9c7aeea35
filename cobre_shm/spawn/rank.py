"""One rank: a process, in a process group of its own."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Ending", "Rank", "die_with_parent", "group_members", "look_at"]

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Ending:
    """How a process ended: exactly one of the two is set."""

    exit_code: int | None = None
    signal: int | None = None

    @property
    def code(self) -> int:
        """The exit code as a shell shows it."""
        if self.exit_code is not None:
            return self.exit_code
        return 128 + (self.signal or 0)

    @property
    def returncode(self) -> int:
        """The exit code as ``subprocess`` shows it: minus the signal."""
        return -self.signal if self.signal is not None else self.exit_code or 0

    def __str__(self) -> str:
        if self.signal is None:
            return f"ended with exit code {self.exit_code}"
        try:
            name = f" ({signal.Signals(self.signal).name})"
        except ValueError:
            name = ""
        return f"was killed by signal {self.signal}{name}"


def look_at(pid: int) -> Ending | None:
    """Return how a child has ended, or None while it runs. It stays to be reaped."""
    result = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if result is None:
        return None
    if result.si_code == os.CLD_EXITED:
        return Ending(exit_code=result.si_status)
    return Ending(signal=result.si_status)


class Rank:
    """A started process.

    It is not reaped before ``reap``: as long as its entry stays in the process table, neither
    its pid nor its process group can come to mean anyone else's.

    Args:
        number: The rank.
        command: What it runs.
        environment: All of its environment.
        stdin: A descriptor to read from, None to inherit ours, or ``subprocess.DEVNULL``.
        descriptors: What else it inherits, under the same numbers.
        before_exec: Called in the forked child.

    Attributes:
        pid: Its process id.
        stdout: Read end of its standard output; the reader closes it.
        stderr: The same of its standard error.
        ending: How it ended, once ``look`` has seen it.
        was_stopped: Whether it was still running when it was told to terminate.
    """

    def __init__(
        self,
        number: int,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        stdin: int | None,
        descriptors: Sequence[int],
        before_exec: Callable[[], None],
    ) -> None:
        self.number = number
        self.ending: Ending | None = None
        self.was_stopped: bool = False
        self.stdout: int
        self.stderr: int
        with contextlib.ExitStack() as reading, contextlib.ExitStack() as writing:
            self.stdout, stdout_end = _pipe(reading, writing)
            self.stderr, stderr_end = _pipe(reading, writing)
            self._process = subprocess.Popen(
                command,
                stdin=stdin,
                stdout=stdout_end,
                stderr=stderr_end,
                env=environment,
                pass_fds=descriptors,
                process_group=0,
                preexec_fn=before_exec,
            )
            reading.pop_all()
        self.pid: int = self._process.pid

    def look(self) -> Ending | None:
        """Return how the process has ended, or None while it runs."""
        if self.ending is None:
            self.ending = look_at(self.pid)
        return self.ending

    def send(self, number: int) -> None:
        """Signal the whole process group, which may have members left after the rank's end."""
        if self.ending is None and number in (signal.SIGTERM, signal.SIGKILL):
            self.was_stopped = True
        # A rank that runs a program of another user cannot be signalled.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    def reap(self) -> None:
        """Wait for the process and take it out of the process table."""
        self._process.wait()


def _pipe(reading: contextlib.ExitStack, writing: contextlib.ExitStack) -> tuple[int, int]:
    reader, writer = os.pipe()
    reading.callback(os.close, reader)
    writing.callback(os.close, writer)
    return reader, writer


def die_with_parent() -> Callable[[], None]:
    """Return what a forked child calls so that it is killed when this process ends.

    Everything is looked up here: between fork and exec, no library may be loaded.
    """
    prctl = ctypes.CDLL(None).prctl
    launcher = os.getpid()

    def request() -> None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
        # The launcher may have ended before the request was made.
        if os.getppid() != launcher:
            os.kill(os.getpid(), signal.SIGKILL)

    return request


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
