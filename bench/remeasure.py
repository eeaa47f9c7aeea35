"""A ratio that is beyond its limit is measured again before it counts."""

from collections.abc import Callable

ATTEMPTS = 3


def first_within(measure: Callable[[], float], is_within: Callable[[float], bool]) -> list[float]:
    """Measure until a ratio is within the limit, or all attempts are spent."""
    ratios: list[float] = []
    while len(ratios) < ATTEMPTS and not (ratios and is_within(ratios[-1])):
        ratios.append(measure())
    return ratios
