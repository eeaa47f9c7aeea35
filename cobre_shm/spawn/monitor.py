"""The live table of ``--monitor``: ``python -m cobre_shm.top`` on our own group.

A process of its own, so that nothing that it does can hold up or end the run. It belongs to our
process group, as the program of a terminal that ^C and ^Z mean too.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator

from cobre_shm.spawn.loop import Loop
from cobre_shm.spawn.parent import die_with
from cobre_shm.spawn.program import interpreter
from cobre_shm.spawn.rank import wait_for_killed

__all__ = ["Monitor"]

# It looks for the group's end five times a second, shows the last table, and ends. Only one that
# is stopped, or writes to what nobody reads, takes this long, however busy the machine is.
_LAST_TABLE_SECS = 5.0


class Monitor:
    """Shows the group whose segment this process holds."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    @classmethod
    @contextlib.contextmanager
    def started(cls) -> Iterator[Monitor]:
        """Show it until the block is left at the latest.

        Raises:
            OSError: The system refuses another process.
        """
        process = subprocess.Popen(
            [*interpreter(), "-m", "cobre_shm.top", str(os.getpid())],
            stdin=subprocess.DEVNULL,
            # It can only complain of a run that is over before it was up.
            stderr=subprocess.DEVNULL,
            preexec_fn=die_with(os.getpid()),
        )
        try:
            yield cls(process)
        finally:
            process.kill()
            wait_for_killed(process)

    def wait_for_last_table(self, loop: Loop) -> None:
        """All ranks have ended: have that shown before anything else is said."""
        is_over = False

        def go_on() -> None:
            nonlocal is_over
            is_over = True

        timer = loop.call_after(_LAST_TABLE_SECS, go_on)
        if self._process.poll() is None:
            loop.call_at_end_of(self._process.pid, go_on)
            loop.turn_until(lambda: is_over)
        timer.cancel()
