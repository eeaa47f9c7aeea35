"""The attempts of a job: what a group needs is made, the group runs, nothing is left."""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING

from cobre_shm.errors import AllocationFailed, BackendNotAvailable, CobreError, InitializationFailed
from cobre_shm.spawn.events import Events
from cobre_shm.spawn.forking import Zygote, start_zygote
from cobre_shm.spawn.group import Group, Outcome
from cobre_shm.spawn.guard import Guard
from cobre_shm.spawn.job import Job
from cobre_shm.spawn.meeting import Meeting, ShmMeeting
from cobre_shm.spawn.monitor import Monitor
from cobre_shm.spawn.rank_output import cannot_write
from cobre_shm.spawn.signals import signals_held
from cobre_shm.spawn.starting import FreshStart, Start, ZygoteStart

if TYPE_CHECKING:
    from cobre_shm.segment.watch import WatchedSegment

__all__ = ["run"]


def run(job: Job, zygote: Zygote | None) -> int:
    """Run a group, again if it fails and the job says so; return the exit code.

    Args:
        job: What to run.
        zygote: Of the first attempt, if it has one; killed here.
    """
    if job.output_dir is not None:
        try:
            job.output_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(job.output_dir, error) from error
    events = Events(job)
    # Of all attempts together.
    deadline = None if job.timeout is None else time.monotonic() + job.timeout
    with contextlib.closing(events):
        for attempt in range(job.max_restarts + 1):
            if attempt > 0:
                _note(f"Starting again, attempt {attempt + 1} of {job.max_restarts + 1}")
                zygote = start_zygote(job)
            outcome = _run(job, events, attempt, deadline, zygote)
            if not outcome.has_failed:
                break
    return outcome.code


def _run(
    job: Job, events: Events, attempt: int, deadline: float | None, zygote: Zygote | None
) -> Outcome:
    """Run a group in a session of its own: a new meeting, new processes."""
    with contextlib.ExitStack() as last, contextlib.ExitStack() as stack:
        start: Start = FreshStart()
        if zygote is not None:
            stack.callback(zygote.kill)
            start = ZygoteStart(zygote)
        # A segment that has a name and no guard yet would outlive us. Over tcp there is no name,
        # and an address may take long to be had.
        with signals_held() if job.backend == "shm" else contextlib.nullcontext():
            meeting = stack.enter_context(_meet(job))
            guard = stack.enter_context(Guard(meeting.unlink))
            # Nor may anything end us between the end of the guard and that of the name.
            stack.callback(lambda: last.enter_context(signals_held()))
        monitor = stack.enter_context(Monitor.started()) if job.monitor else None
        return Group(job, meeting, guard, events, attempt, deadline, monitor).run(start)


def _meet(job: Job) -> Meeting:
    if job.backend == "tcp":
        # Only now: it has more to import than the rest of the launcher.
        from cobre_shm.spawn.tcp import TcpMeeting

        return TcpMeeting(job.network, job.size, {**os.environ, **job.environment})
    return ShmMeeting(_open_segment(job.size))


def _open_segment(size: int) -> WatchedSegment:
    try:
        from cobre_shm.segment.leftovers import remove_leftovers
        from cobre_shm.segment.watch import WatchedSegment
    except ImportError as error:
        raise BackendNotAvailable(
            "shm", ["local"], install_hint='pip install "cobre-shm[shm]"'
        ) from error
    try:
        remove_leftovers()
        return _make_segment(WatchedSegment, size)
    except CobreError:
        raise
    except Exception as error:
        # What the system says comes as OSError or as one of posix_ipc's own classes.
        raise InitializationFailed(
            "shm",
            f"The shared memory segment cannot be created: {error}",
            operation="create",
            source=error,
        ) from error


def _make_segment(kind: type[WatchedSegment], size: int) -> WatchedSegment:
    """Make the segment, of memory without a name where that of POSIX objects is too small."""
    try:
        return kind.create(kind.random_name(), size, launched=True)
    except AllocationFailed as error:
        mount, free = error.context.get("mount"), error.context.get("free_bytes")
        if mount is None:
            raise
        why = error.message
        if free is not None:
            why = f"{mount} has {free} bytes free, {error.requested_bytes} are needed"
        line = f"{why}: using memory without a name (memfd) instead"
        try:
            segment = kind.create_unnamed(size, launched=True)
        except AllocationFailed as refused:
            # The first error says what helps.
            raise error from refused
        _note(line)
        return segment


def _note(line: str) -> None:
    # Nobody need read it.
    with contextlib.suppress(OSError):
        os.write(2, f"cobre_shm.spawn: {line}\n".encode())
