"""How the workers of one group find each other, as the process that starts them arranges it.

ShmMeeting    a segment without a name, which the workers inherit: nothing of it can be left
              behind, and the process that made it says in it how a worker ended
TcpMeeting    a coordinator's address; the connections tell of a worker's end
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from typing import Protocol

from cobre_shm.spawn.environment import rank_environment
from cobre_shm.spawn.rank import Ending

__all__ = ["Meeting", "ShmMeeting", "TcpMeeting"]


class Meeting(Protocol):
    """What a group needs of it.

    Attributes:
        backend: Name of the communication backend.
        descriptors: What workers inherit, under the same numbers.
    """

    backend: str
    descriptors: Sequence[int]

    def environment(self, rank: int) -> dict[str, str]:
        """Return all of a worker's environment."""

    def report_exit(self, rank: int, ending: Ending) -> None:
        """Let the others know that a worker has ended."""

    def culprit(self) -> int | None:
        """The rank that failed first, where that is known."""

    def stop(self) -> None:
        """Have the workers that wait for each other give up."""

    def close(self) -> None:
        """Give everything back."""


class ShmMeeting:
    """A segment in shared memory.

    Args:
        size: Number of workers.

    Raises:
        AllocationFailed: There is not enough memory.
    """

    backend = "shm"

    def __init__(self, size: int) -> None:
        # Only now: a process that starts no workers needs nothing of this backend.
        from cobre_shm.segment.watch import WatchedSegment

        self._size = size
        self._segment = WatchedSegment.create_unnamed(size, launched=True)
        self.descriptors: Sequence[int] = [self._segment.descriptor]

    def environment(self, rank: int) -> dict[str, str]:
        """See :meth:`Meeting.environment`."""
        return rank_environment(os.environ, self._segment.name, rank, self._size)

    def report_exit(self, rank: int, ending: Ending) -> None:
        """See :meth:`Meeting.report_exit`."""
        self._segment.report_exit(rank, exit_code=ending.exit_code, signal=ending.signal)

    def culprit(self) -> int | None:
        """See :meth:`Meeting.culprit`."""
        return self._segment.first_failed()

    def stop(self) -> None:
        """See :meth:`Meeting.stop`."""
        self._segment.stop(signal.SIGTERM)

    def close(self) -> None:
        """See :meth:`Meeting.close`. Also removes what killed workers left of regions."""
        self._segment.unlink()
        self._segment.close()


class TcpMeeting:
    """A coordinator's address, which worker 0 listens at.

    Args:
        size: Number of workers.
        settings: ``COBRE_TCP_*`` variables that all workers get.
    """

    backend = "tcp"
    descriptors: Sequence[int] = ()

    def __init__(self, size: int, settings: Mapping[str, str]) -> None:
        self._size = size
        self._settings = dict(settings)

    def environment(self, rank: int) -> dict[str, str]:
        """See :meth:`Meeting.environment`."""
        base = rank_environment(os.environ, "", rank, self._size)
        kept = {key: value for key, value in base.items() if not key.startswith("COBRE_SHM_")}
        return {
            **kept,
            **self._settings,
            "COBRE_COMM_BACKEND": "tcp",
            "COBRE_TCP_RANK": str(rank),
            "COBRE_TCP_SIZE": str(self._size),
        }

    def report_exit(self, rank: int, ending: Ending) -> None:
        """See :meth:`Meeting.report_exit`. Peers see it by the connection."""

    def culprit(self) -> int | None:
        """See :meth:`Meeting.culprit`. Only the workers know."""
        return None

    def stop(self) -> None:
        """See :meth:`Meeting.stop`. A worker that ends stops those that wait for it."""

    def close(self) -> None:
        """See :meth:`Meeting.close`."""
