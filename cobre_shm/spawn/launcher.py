"""From a job to its exit code."""

from __future__ import annotations

import contextlib
import os
import signal

from cobre_shm.spawn.forking import start_zygote
from cobre_shm.spawn.job import Job

__all__ = ["launch"]


def launch(job: Job) -> int:
    """Run a job to its end and return the exit code. Nothing of it is left afterwards.

    Raises:
        BackendNotAvailable: What shared memory needs is not installed.
        InitializationFailed: The segment cannot be created, or the coordinator's address not had.
        AllocationFailed: There is not enough shared memory.
        ProgramNotRunnable: The system refuses to start a rank.
        InvalidArguments: Output cannot be written where it shall go.
    """
    _open_standard_descriptors()
    if signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN:
        # As some daemons start what they run: children would end without a trace.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with contextlib.ExitStack() as stack:
        # First of all: it takes the longest, and we import what we need ourselves meanwhile.
        zygote = start_zygote(job)
        if zygote is not None:
            stack.callback(zygote.kill)
        from cobre_shm.spawn.attempts import run

        return run(job, zygote)


def _open_standard_descriptors() -> None:
    """Give missing standard descriptors to the null device, or a pipe of ours would become one."""
    for standard in (0, 1, 2):
        try:
            os.fstat(standard)
        except OSError:
            # It is the lowest number that is free.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
