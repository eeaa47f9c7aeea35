"""The list of checks, and what running each of them costs the group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from cobre_shm.communicator import Communicator

__all__ = ["CHECKS", "Check", "CheckFunction", "conformance_check"]

CheckFunction: TypeAlias = Callable[[Communicator], None]


@dataclass(frozen=True)
class Check:
    """One check of the suite.

    Attributes:
        name: Name of the function.
        topic: The module it stands in, one per operation or theme.
        function: Called with its communicator by every rank of a group, at the same time.
        min_size: The smallest group in which the check says anything.
        fatal: The communicator is closed or failed afterwards: give each such check its own group.
        huge: Needs gigabytes of memory on every rank.
        outlives_peers: The group's other ranks go on after one has ended: only for a backend
            that detects the loss of a peer.
    """

    name: str
    topic: str
    function: CheckFunction
    min_size: int = 1
    fatal: bool = False
    huge: bool = False
    outlives_peers: bool = False


CHECKS: dict[str, Check] = {}
"""Every check by name, in the order of definition."""


def conformance_check(
    *,
    min_size: int = 1,
    fatal: bool = False,
    huge: bool = False,
    outlives_peers: bool = False,
) -> Callable[[CheckFunction], CheckFunction]:
    """Enter the decorated function into :data:`CHECKS`."""

    def enter(function: CheckFunction) -> CheckFunction:
        name = function.__name__
        if name in CHECKS:
            raise ValueError(f"there are two checks named {name}")
        topic = function.__module__.rpartition(".")[2]
        CHECKS[name] = Check(name, topic, function, min_size, fatal, huge, outlives_peers)
        return function

    return enter
