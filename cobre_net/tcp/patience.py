"""What a rank looks at while it waits: the time limit, and who is late."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Sequence

from cobre_net.tcp.failure import Failure, Lost
from cobre_shm.reminder import Reminder, named

__all__ = ["Patience"]

# Behind what nobody reads, the end of a connection shows only when something is sent to it.
_MAX_BEAT_SECS = 0.2


class Patience:
    """One wait of one rank. Time runs only while nothing moves.

    Args:
        rank: Who waits.
        timeout: Seconds that nothing may move.
        stall_warn: Seconds after which a late rank is named.
        describe: Returns a rank and its process in words.

    Attributes:
        beat: Seconds between two looks.
    """

    def __init__(
        self, rank: int, timeout: float, stall_warn: float, describe: Callable[[int], str]
    ) -> None:
        self._rank, self._timeout, self._stall_warn = rank, timeout, stall_warn
        self._describe = describe
        self.beat = min(_MAX_BEAT_SECS, timeout / 4, stall_warn / 4)
        self.moved()
        self._next_beat = self._since + self.beat

    def moved(self) -> None:
        """Say that something has moved."""
        self._since = time.monotonic()
        self._reminder = Reminder(self._stall_warn)

    def is_due(self) -> bool:
        """Whether a beat has passed since this was last so, whatever has moved."""
        now = time.monotonic()
        if now < self._next_beat:
            return False
        self._next_beat = now + self.beat
        return True

    def look(self, missing: Sequence[int], where: str, *, warns: bool = True) -> None:
        """Be a moment older.

        Raises:
            Lost: Nothing has moved for the whole time limit.
        """
        waited = time.monotonic() - self._since
        if waited > self._timeout:
            raise Lost(
                Failure(
                    "timeout",
                    self._rank,
                    text=f"{named(missing, self._describe)} in {where}",
                    missing=tuple(missing),
                    seconds=self._timeout,
                )
            )
        if self._reminder.is_due(waited) and warns:
            line = f"cobre_net: ranks have waited {waited:.0f} s in {where}, for "
            # A full disk or a closed pipe is no reason to lose the group.
            with contextlib.suppress(OSError, ValueError):
                print(line + named(missing, self._describe), file=sys.stderr, flush=True)
