"""Values of the launcher's flags: text in, meaning out, or what would have been right."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

from cobre_shm.cpus import count_cpus
from cobre_shm.layout import MAX_RANKS
from cobre_shm.spawn.binding import parse_numbers
from cobre_shm.spawn.errors import InvalidArguments

__all__ = [
    "backend",
    "modules",
    "nodes",
    "positive_seconds",
    "rank_count",
    "ranks",
    "restarts",
    "seconds",
    "threads",
]

_BACKENDS = ("auto", "shm", "tcp")
# What starts ranks of the others, which a user may well ask for here.
_STARTED_OTHERWISE = {
    "mpi": "ranks of MPI are started by its own launcher: mpiexec -n N python PROGRAM",
    "local": "a rank of its own needs no launcher: python PROGRAM",
}


def backend(text: str) -> str:
    """Return the name of a backend whose ranks we start, or ``auto``."""
    if text not in _BACKENDS:
        why = _STARTED_OTHERWISE.get(text, f"expected one of {', '.join(_BACKENDS)}")
        raise argparse.ArgumentTypeError(f"not {text!r}: {why}")
    return text


def modules(text: str) -> str:
    """Return names of modules with commas, or ``auto``; empty for ``none``."""
    if text == "none":
        return ""
    if not all(name.isidentifier() for name in text.replace(",", ".").split(".")):
        raise argparse.ArgumentTypeError(
            f"expected modules with commas, auto or none, not {text!r}"
        )
    return text


def rank_count(text: str) -> int:
    """Return a number of ranks; ``auto``: that of the CPUs that may be used here."""
    if text == "auto":
        return count_cpus()
    return _whole(text, 1, MAX_RANKS, f"the number of ranks is 1 to {MAX_RANKS}, or auto,")


def nodes(text: str) -> int:
    """Return a number of nodes."""
    return _whole(text, 1, MAX_RANKS, f"the number of nodes is 1 to {MAX_RANKS},")


def restarts(text: str) -> int:
    """Return a number of restarts."""
    return _whole(text, 0, 1 << 31, "expected a whole number, 0 or more,")


def threads(text: str) -> int | str:
    """Return a size of thread pools, ``auto`` or ``keep``."""
    if text in ("auto", "keep"):
        return text
    return _whole(text, 1, 1 << 16, "expected a number of threads, auto or keep,")


def ranks(text: str) -> frozenset[int]:
    """Return the ranks of a list such as ``0,3-5``."""
    try:
        return frozenset(parse_numbers(text))
    except InvalidArguments as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def seconds(text: str) -> float:
    """Return a time of 0 or more."""
    return _finite(text, "0 or more", lambda value: value >= 0)


def positive_seconds(text: str) -> float:
    """Return a time of more than 0."""
    return _finite(text, "more than 0", lambda value: value > 0)


def _whole(text: str, least: int, most: int, expected: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if not least <= number <= most:
        raise argparse.ArgumentTypeError(f"{expected} not {text!r}")
    return number


def _finite(text: str, expected: str, fits: Callable[[float], bool]) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or not fits(value):
        raise argparse.ArgumentTypeError(f"expected seconds, {expected}, not {text!r}")
    return value
