"""How the ranks of one group find each other, as the process that starts them arranges it.

The launcher and ``run`` know a group through this alone, whatever its ranks meet in. Over shared
memory that is a segment, in which the process that made it also says how a rank ended. Over tcp it
is a listening socket; see ``tcp``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from cobre_shm.spawn.environment import rank_variables

if TYPE_CHECKING:
    from cobre_shm.segment.recorder import Entry
    from cobre_shm.segment.watch import WatchedSegment

__all__ = ["Meeting", "Progress", "ShmMeeting"]


@dataclass(frozen=True)
class Progress:
    """What can be seen of the ranks from outside, in the order of their numbers.

    Attributes:
        has_joined: Whether all of them have found each other.
        last: Each rank's current or last collective, or None.
        epochs: How often each rank has arrived somewhere; who is behind the others is late.
    """

    has_joined: bool
    last: list[Entry | None]
    epochs: list[int]


class Meeting(Protocol):
    """What a group needs of it. Leaving its ``with`` block gives everything back."""

    backend: str

    def variables(self, rank: int) -> dict[str, str]:
        """Return what a rank finds in its environment beside what all have in common.

        The number N of a descriptor stands there as ``fd:N``, and as a whole value.
        """

    def descriptors(self, rank: int) -> Sequence[int]:
        """Return what a rank inherits."""

    def report_exit(self, rank: int, *, exit_code: int | None, signal: int | None) -> None:
        """Let the others know that a rank has ended."""

    def first_failed(self) -> int | None:
        """The rank that failed first, where that is known and it was started here."""

    def abort_code(self) -> int | None:
        """What that rank passed to ``abort``, if this was the failure."""

    def progress(self) -> Progress | None:
        """Look at the ranks; None where they cannot be seen from outside."""

    def interrupt(self, signal: int) -> None:
        """Have ranks give up that cannot hear the signal which they were sent."""

    def stop(self, signal: int) -> None:
        """Have the ranks that wait for each other give up."""

    def unlink(self) -> None:
        """Remove what would outlive all processes; idempotent."""

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
        segment: Of the group; it is ours from now on.
    """

    backend = "shm"

    def __init__(self, segment: WatchedSegment) -> None:
        self._segment = segment

    @classmethod
    def unnamed(cls, size: int) -> Self:
        """Meet in memory without a name, of which nothing can be left behind.

        Raises:
            AllocationFailed: There is not enough memory.
        """
        # Only now: a process that starts no ranks needs nothing of this backend.
        from cobre_shm.segment.watch import WatchedSegment

        return cls(WatchedSegment.create_unnamed(size, launched=True))

    def variables(self, rank: int) -> dict[str, str]:
        """See :meth:`Meeting.variables`."""
        return {
            "COBRE_SHM_NAME": self._segment.name,
            **rank_variables(self.backend, rank, self._segment.size),
        }

    def descriptors(self, rank: int) -> Sequence[int]:  # noqa: ARG002 - all inherit the same
        """See :meth:`Meeting.descriptors`."""
        return [self._segment.descriptor] if self._segment.is_unnamed else []

    def report_exit(self, rank: int, *, exit_code: int | None, signal: int | None) -> None:
        """See :meth:`Meeting.report_exit`."""
        self._segment.report_exit(rank, exit_code=exit_code, signal=signal)

    def first_failed(self) -> int | None:
        """See :meth:`Meeting.first_failed`."""
        return self._segment.first_failed()

    def abort_code(self) -> int | None:
        """See :meth:`Meeting.abort_code`."""
        return self._segment.abort_code()

    def progress(self) -> Progress:
        """See :meth:`Meeting.progress`."""
        from cobre_shm import layout
        from cobre_shm.segment.recorder import last_entry

        segment, ranks = self._segment, range(self._segment.size)
        return Progress(
            has_joined=segment.words.load(layout.HEADER_JOINED) == 1,  # <SYNC joined>
            last=[last_entry(segment, rank) for rank in ranks],
            epochs=[segment.arrived(rank) for rank in ranks],
        )

    def interrupt(self, signal: int) -> None:
        """See :meth:`Meeting.interrupt`."""
        if self._segment.has_compiled_calls():
            self._segment.stop(signal)

    def stop(self, signal: int) -> None:
        """See :meth:`Meeting.stop`."""
        self._segment.stop(signal)

    def unlink(self) -> None:
        """See :meth:`Meeting.unlink`; also what killed ranks left of regions."""
        self._segment.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.unlink()
        self._segment.close()
