"""How the workers of one group find each other, as the process that starts them arranges it.

Over shared memory: a segment without a name, which the workers inherit. Nothing of it can be left
behind, and the process that made it says in it how a worker ended.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import TracebackType
from typing import Protocol, Self

from cobre_shm.spawn.environment import rank_environment

__all__ = ["Meeting", "ShmMeeting"]


class Meeting(Protocol):
    """What a group of workers needs of it. Leaving its ``with`` block gives everything back."""

    def environment(self, number: int) -> dict[str, str]:
        """Return all of a worker's environment."""

    def descriptors(self, number: int) -> Sequence[int]:
        """Return what a worker inherits, under the same numbers."""

    def report_exit(self, rank: int, *, exit_code: int | None, signal: int | None) -> None:
        """Let the others know that a worker has ended."""

    def first_failed(self) -> int | None:
        """The rank that failed first, where that is known."""

    def stop(self, signal: int) -> None:
        """Have the workers that wait for each other give up."""

    def __enter__(self) -> Self:
        """Return itself."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give everything back."""


class ShmMeeting:
    """A segment in shared memory.

    Args:
        size: Number of workers.

    Raises:
        AllocationFailed: There is not enough memory.
    """

    def __init__(self, size: int) -> None:
        # Only now: a process that starts no workers needs nothing of this backend.
        from cobre_shm.segment.watch import WatchedSegment

        self._size = size
        self._segment = WatchedSegment.create_unnamed(size, launched=True)

    def environment(self, number: int) -> dict[str, str]:
        """See :meth:`Meeting.environment`."""
        return rank_environment(os.environ, self._segment.name, number, self._size)

    def descriptors(self, number: int) -> Sequence[int]:  # noqa: ARG002 - all inherit the same
        """See :meth:`Meeting.descriptors`."""
        return [self._segment.descriptor]

    def report_exit(self, rank: int, *, exit_code: int | None, signal: int | None) -> None:
        """See :meth:`Meeting.report_exit`."""
        self._segment.report_exit(rank, exit_code=exit_code, signal=signal)

    def first_failed(self) -> int | None:
        """See :meth:`Meeting.first_failed`."""
        return self._segment.first_failed()

    def stop(self, signal: int) -> None:
        """See :meth:`Meeting.stop`."""
        self._segment.stop(signal)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Also what killed workers left of regions.
        self._segment.unlink()
        self._segment.close()
