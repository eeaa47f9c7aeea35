"""Events for tools: one JSON object a line.

    start     size, ranks of this launcher, program, start_method (ranks that cannot be forked from
              the zygote after all are said on standard error), attempt, launcher's pid
    ready     all ranks have joined
    progress  for each rank the number of its current or last collective, once in a while
    stall     the others have waited for these ranks for long
    exit      of a rank: exit_code or signal; with rank null, of the run: code

Ready, progress and stall come from shared memory, and not from ranks that meet over tcp.

Every object has ``event``, ``time`` (ISO 8601, UTC) and ``elapsed_secs`` since the launch. The
group's memory is looked at once a second, and only if somebody wants events.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from cobre_shm.errors import InitializationFailed
from cobre_shm.selection.env import read_settings
from cobre_shm.selection.kinds import ShmConfig
from cobre_shm.selection.variables import variables_of
from cobre_shm.spawn.job import Job
from cobre_shm.spawn.output import encoded
from cobre_shm.spawn.rank import Rank
from cobre_shm.spawn.rank_output import cannot_write

if TYPE_CHECKING:
    from cobre_shm.spawn.group import Group

__all__ = ["Events"]

_LOOK_SECS = 1.0
_STALL = next(each for each in variables_of("shm") if each.field == "stall_warn_secs")


class Events:
    """Where the events of a job go; nowhere, if it wants none.

    Args:
        job: Names the file.

    Raises:
        InvalidArguments: The file cannot be written.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._began = time.monotonic()
        self._stall_secs = _stall_secs(job.environment)
        self._file: int | None = None
        if job.events is not None:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
            try:
                self._file = os.open(job.events, flags, 0o666)
                # It may be a pipe, and the launcher waits for no reader.
                os.set_blocking(self._file, False)
            except OSError as error:
                raise cannot_write(job.events, error) from error

    def close(self) -> None:
        """Close the file; idempotent."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def start(self, group: Group, attempt: int, method: str) -> None:
        """A run begins, whose ranks are to come into being by ``method``."""
        self._group = group
        self._has_joined = False
        self._progress: list[int] = []
        self._epochs: list[int] = []
        self._moved = time.monotonic()
        self._is_stalled = False
        self._tell(
            "start",
            size=self._job.group_size,
            ranks=list(self._job.ranks),
            program=self._job.program.words,
            start_method=method,
            attempt=attempt,
            launcher=os.getpid(),
        )

    def follow(self) -> None:
        """All ranks run: look at the group from time to time."""
        if self._file is not None or self._job.json_events:
            self._look()

    def exit_of_rank(self, rank: Rank) -> None:
        """A rank has ended."""
        ending = rank.ending
        self._tell(
            "exit",
            rank=rank.number,
            pid=rank.pid,
            exit_code=ending.exit_code if ending else None,
            signal=ending.signal if ending else None,
            was_stopped=rank.was_stopped,
        )

    def exit_of_run(self, code: int) -> None:
        """The run has ended."""
        self._tell("exit", rank=None, code=code)

    def _look(self) -> None:
        seen = self._group.meeting.progress()
        if seen is None:
            return
        if not self._has_joined and seen.has_joined:
            self._has_joined = True
            self._tell("ready", pids=[rank.pid for rank in self._group.ranks])
        progress = [entry.sequence if entry else 0 for entry in seen.last]
        if self._has_joined and progress != self._progress:
            self._progress = progress
            self._tell("progress", collectives=progress)
        self._look_for_stall(seen.epochs)
        self._group.loop.call_after(_LOOK_SECS, self._look)

    def _look_for_stall(self, epochs: list[int]) -> None:
        now = time.monotonic()
        if epochs != self._epochs:
            self._epochs, self._moved, self._is_stalled = epochs, now, False
        late = [rank for rank, epoch in enumerate(epochs) if epoch < max(epochs)]
        if late and not self._is_stalled and now - self._moved >= self._stall_secs:
            self._is_stalled = True
            self._tell("stall", late_ranks=late, secs=round(now - self._moved, 3))

    def _tell(self, event: str, **facts: Any) -> None:
        line = json.dumps(
            {
                "event": event,
                "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "elapsed_secs": round(time.monotonic() - self._began, 6),
                **facts,
            }
        ).encode()
        if self._job.json_events:
            self._group.output.say(line + b"\n")
        if self._file is not None:
            self._write(self._file, line + b"\n")

    def _write(self, file: int, line: bytes) -> None:
        """Write all of it, or no more from now on: the run is worth more than its events."""
        try:
            while line:
                line = line[os.write(file, line) :]
        except OSError as error:
            why = "nobody reads them" if error.errno == errno.EAGAIN else error.strerror
            where = repr(str(self._job.events))
            text = f"cobre_shm.spawn: No more events are written to {where}: {why}\n"
            self._group.output.say(encoded(text))
            self.close()


def _stall_secs(environment: Mapping[str, str]) -> float:
    """Return how long ranks wait before they name a late one by themselves."""
    settings: dict[str, float] = {}
    with suppress(InitializationFailed):
        # Of a malformed value the ranks tell.
        settings = read_settings("shm", [_STALL], environment)
    return settings.get(_STALL.field, ShmConfig.stall_warn_secs)
