"""The conformance suite as pytest parameters."""

from __future__ import annotations

import pytest

from cobre_shm.communicator import Communicator
from cobre_shm.testing.conformance import CHECKS, Check
from tests.support.backends import BACKENDS
from tests.support.ranks import results_of, run_ranks

# Ends groups that hang; the checks that use gigabytes need the larger one.
_WATCHDOG_SECS = 360.0
_HUGE_WATCHDOG_SECS = 840.0
# Of the checks that need gigabytes on every rank: the smallest group with a peer.
_HUGE_SIZE = 2


def every_check(topic: str) -> pytest.MarkDecorator:
    """Parametrise a test over the checks of one topic, on every backend and number of ranks."""
    cases = [
        pytest.param(
            backend,
            size,
            check.name,
            id=f"{backend}-{size}-{check.name.removeprefix('check_')}",
            marks=[pytest.mark.slow] if check.huge else [],
        )
        for backend, kind in BACKENDS.items()
        for size in kind.sizes
        for check in CHECKS.values()
        if check.topic == topic and _applies(check, size)
    ]
    return pytest.mark.parametrize(("backend", "size", "name"), cases, indirect=["backend"])


def run_check(backend: str, size: int, name: str) -> None:
    """Run one check on a new group; fail with the report of every rank on which it failed."""
    timeout = _HUGE_WATCHDOG_SECS if CHECKS[name].huge else _WATCHDOG_SECS
    results_of(run_ranks(_call_check, size, backend, name, timeout=timeout))


def _applies(check: Check, size: int) -> bool:
    return size <= _HUGE_SIZE if check.huge else size >= check.min_size


def _call_check(comm: Communicator, name: str) -> None:
    CHECKS[name].function(comm)
