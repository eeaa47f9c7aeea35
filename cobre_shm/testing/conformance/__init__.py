"""Checks of the communicator contract, for every backend and without any test framework.

A check is a function of one communicator. Every rank of a group calls it at the same time; it
returns, or raises ``AssertionError`` on at least one rank. The others may then wait for a rank
that no longer comes, so give the group a time limit, and a new group to the next check.

:data:`CHECKS` lists them by name. A check that is ``fatal`` leaves its communicator closed or
failed; all others leave it as it was, and may share one. With a backend of your own::

    from cobre_shm.testing.conformance import run_all

    run_all(make_communicator)      # on every rank

The checks use nothing but ``Communicator`` and, if the communicator has it, ``slot_bytes``: the
number of bytes that the backend moves at once, around which sizes are then chosen.
"""

from __future__ import annotations

from collections.abc import Callable

from cobre_shm.communicator import Communicator
from cobre_shm.testing.conformance import (
    allgatherv,
    allreduce,
    arguments,
    barrier,
    broadcast,
    lifecycle,
    mismatch,
    regions,
    sequences,
    shared_arrays,
)
from cobre_shm.testing.conformance.registry import CHECKS, Check

__all__ = [
    "CHECKS",
    "Check",
    "allgatherv",
    "allreduce",
    "arguments",
    "barrier",
    "broadcast",
    "lifecycle",
    "mismatch",
    "regions",
    "run_all",
    "sequences",
    "shared_arrays",
]


def run_all(make_communicator: Callable[[], Communicator], *, huge: bool = False) -> list[str]:
    """Run every check that applies to the group. Every rank calls this.

    Args:
        make_communicator: Called by all ranks together, once for the checks that can share a
            group and once for each that cannot; returns this rank's new communicator.
        huge: Whether to include the checks that need gigabytes of memory on every rank.

    Returns:
        The names of the checks that were run.

    Raises:
        AssertionError: A check failed on this rank.
    """
    names = []
    with make_communicator() as shared:
        size = shared.size
        for check in CHECKS.values():
            if not check.fatal and size >= check.min_size and check.huge <= huge:
                check.function(shared)
                names.append(check.name)
    for check in CHECKS.values():
        if check.fatal and size >= check.min_size:
            with make_communicator() as lost:
                check.function(lost)
            names.append(check.name)
    return names
