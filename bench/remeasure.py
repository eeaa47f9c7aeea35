"""What is beyond its limit is measured again before it counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

ATTEMPTS = 3

Found = TypeVar("Found")


def first_within(measure: Callable[[], Found], is_within: Callable[[Found], bool]) -> list[Found]:
    """Measure until what is found is within the limit, or all attempts are spent; return all."""
    found: list[Found] = []
    while len(found) < ATTEMPTS and not (found and is_within(found[-1])):
        found.append(measure())
    return found
