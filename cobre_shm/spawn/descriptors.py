"""Descriptors of the launcher: it needs some for each rank, and many systems allow 1,024.

That is the soft limit, which any process may raise to the hard one, usually half a million. It is
raised for the time that the launcher watches the ranks; they have the limit that we were given.
"""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator

__all__ = ["descriptors_of", "more_descriptors"]

# Two pipes and a pidfd, and two files for --output-dir.
_OF_A_RANK = 5
# Standard ones, segment, selector, signals, guard, zygote, events, and what comes and goes.
_OWN = 32


def descriptors_of(size: int) -> int:
    """Return how many descriptors the launcher of so many ranks may need."""
    return _OWN + _OF_A_RANK * size


@contextlib.contextmanager
def more_descriptors(size: int) -> Iterator[tuple[int, int]]:
    """Allow the launcher what it needs, as far as the hard limit goes.

    Yields:
        The limits as they were.
    """
    soft, hard = original = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = descriptors_of(size)
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    is_enough = soft == resource.RLIM_INFINITY or soft >= wanted
    if not is_enough:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    try:
        yield original
    finally:
        if not is_enough:
            resource.setrlimit(resource.RLIMIT_NOFILE, original)
