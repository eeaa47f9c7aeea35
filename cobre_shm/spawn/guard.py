"""The process that cleans up if the launcher itself is killed.

Actors: the launcher, and a guard forked from it before any rank, in a session of its own.

    launcher   holds the write end of a pipe; writes the pid of each rank that it starts;
               writes DONE when it has cleaned up itself
    guard      reads until DONE or the end of the pipe

The end without DONE can only mean that the launcher is gone: ranks never hold the write end,
since it is closed on exec. The ranks have then been killed by the kernel (parent-death signal);
the guard kills what they started in their process groups and removes the segment's name, which
would otherwise stay until the last rank has attached.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from types import TracebackType
from typing import Self

from cobre_shm.spawn.errors import ProgramNotRunnable
from cobre_shm.spawn.rank import KILLED_SECS, reap

__all__ = ["Guard"]

_DONE = 0
_PID_BYTES = 4
_END_SECS = 2.0


class Guard:
    """A forked child that outlives the launcher by a moment.

    Args:
        clean_up: Called in the guard when the launcher has died.
    """

    def __init__(self, clean_up: Callable[[], None]) -> None:
        self._clean_up = clean_up

    def __enter__(self) -> Self:
        reader, self._writer = os.pipe2(os.O_CLOEXEC)
        try:
            self._pid = os.fork()
        except OSError as error:
            os.close(reader)
            os.close(self._writer)
            raise ProgramNotRunnable(f"The system refuses another process: {error}") from error
        if self._pid == 0:
            status = 1
            try:
                os.close(self._writer)
                _guard(reader, self._clean_up)
                status = 0
            finally:
                os._exit(status)
        os.close(reader)
        return self

    def watch(self, pid: int) -> None:
        """Include a rank's process group in what is cleaned up."""
        self._write(pid)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._write(_DONE)
        os.close(self._writer)
        if not reap(self._pid, _END_SECS):
            # Someone has stopped it, and it has nothing left to do.
            os.kill(self._pid, signal.SIGKILL)
            reap(self._pid, KILLED_SECS)

    def _write(self, number: int) -> None:
        # Someone may have killed the guard; the run itself does not depend on it.
        with contextlib.suppress(BrokenPipeError):
            os.write(self._writer, number.to_bytes(_PID_BYTES, "little"))


def _guard(reader: int, clean_up: Callable[[], None]) -> None:
    os.setsid()
    # What is sent to the launcher's name or group is none of the guard's business.
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(ignored, signal.SIG_IGN)
    # Whoever reads our output must not wait for the guard.
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    groups: list[int] = []
    while words := os.read(reader, _PID_BYTES):
        number = int.from_bytes(words, "little")
        if number == _DONE:
            return
        groups.append(number)
    for group in groups:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)
    clean_up()
