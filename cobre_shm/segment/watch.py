"""The launcher's side of a segment: it makes it, reports the ends of ranks, and ends the group."""

from __future__ import annotations

from cobre_shm import layout
from cobre_shm.segment.poison import poison, read_poison
from cobre_shm.segment.posix import remove_objects
from cobre_shm.segment.segment import Segment

__all__ = ["WatchedSegment"]

# Kinds of poison that name the rank to blame.
_RANK_FAILURES = (layout.DIED, *layout.DEEDS)


class WatchedSegment(Segment):
    """A segment seen by the launcher that made it."""

    def report_exit(self, rank: int, *, exit_code: int | None, signal: int | None) -> None:
        """Say how a rank ended, as soon as it has been reaped.

        One of ``exit_code`` and ``signal`` is given, or none where nobody knows. The group fails
        unless the rank had closed its communicator and ended with code 0, as far as anybody knows:
        whoever waits for it must know.
        """
        block = self.control(rank)
        code = -signal if signal is not None else exit_code
        self.words.store(block + layout.EXIT_CODE, code or 0)
        told = layout.TOLD if code is not None else layout.UNSEEN
        self.words.store(block + layout.EXITED, told)  # <SYNC exited>: the code is there
        if code or self.words.load(block + layout.STATE) != layout.CLOSED:
            poison(self, layout.DIED, rank)

    def unlink(self) -> None:
        """Remove the group's name, and those that killed ranks left of regions."""
        super().unlink()
        if self.words.address:
            remove_objects(self.region_prefix)

    def first_failed(self) -> int | None:
        """The rank that the group's first failure names, or None."""
        first = read_poison(self)
        return first.rank if first is not None and first.kind in _RANK_FAILURES else None

    def abort_code(self) -> int | None:
        """The code of a rank's ``abort(code)``, when that was the group's first failure."""
        first = read_poison(self)
        return first.value if first is not None and first.kind == layout.ABORTED else None

    def has_compiled_calls(self) -> bool:
        """Whether jitted code, in which no signal is heard, may call collectives of a rank."""
        blocks = map(self.control, range(self.size))
        return any(self.words.load(block + layout.COMPILED) for block in blocks)  # <SYNC compiled>

    def stop(self, signal: int) -> None:
        """End the group for a signal that the launcher received: waiting ranks raise at once."""
        poison(self, layout.STOPPED, 0, signal)
