"""When late ranks are named, and how many of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["Reminder", "named"]

# Who stays late is named again after so many times the first interval.
_REPEAT = 6
# Ranks that a message describes; the others are counted.
_NAMED = 8


class Reminder:
    """When a wait is worth a line: after a while, and then every six times as long.

    Attributes:
        count: How many it has been worth so far.
    """

    def __init__(self, seconds: float) -> None:
        self.count: int = 0
        self._seconds = self._next = seconds

    def is_due(self, waited: float) -> bool:
        """Whether it is now, after so many seconds; True once for each line."""
        if waited <= self._next:
            return False
        self._next += _REPEAT * self._seconds
        self.count += 1
        return True


def named(ranks: Sequence[int], describe: Callable[[int], str]) -> str:
    """Return ``ranks`` in words, as ``describe`` has each; of many, the first."""
    more = f" and {len(ranks) - _NAMED} more" if len(ranks) > _NAMED else ""
    return ", ".join(map(describe, ranks[:_NAMED])) + more
