"""Options and watchdogs of the whole suite."""

from __future__ import annotations

import gc
import signal
import time
from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.support.backends import BACKENDS, why_missing
from tests.support.memory import limited_group as limited_group
from tests.support.ranks import server_residue
from tests.support.residue import Residue, mark_this_run, of_this_run, snapshot

# A thread or process that was told to end takes a moment.
_SETTLE_SECS = 2.0

# How long an example takes says nothing on a busy machine.
settings.register_profile("suite", deadline=None)
# For now and then: --hypothesis-profile=long
settings.register_profile("long", deadline=None, max_examples=5000)
settings.load_profile("suite")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-backend",
        metavar="NAMES",
        default="local,shm,tcp",
        help="comma-separated backends whose absence is a failure, not a skip",
    )


def pytest_configure(config: pytest.Config) -> None:
    mark_this_run()
    # nohup has SIGHUP ignored, and a script's & the other two; what the tests start would inherit
    # that, and rightly keep it.
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(
                number,
                signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL,
            )
    unknown = _required(config) - set(BACKENDS)
    if unknown:
        raise pytest.UsageError(
            f"--require-backend: no backend {', '.join(sorted(unknown))}; "
            f"the suite knows {', '.join(BACKENDS)}"
        )


def _required(config: pytest.Config) -> set[str]:
    names = config.getoption("--require-backend").split(",")
    return {name.strip() for name in names if name.strip()}


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> str:
    """Name of an installed backend; the parameter, or shm.

    Not installed: skipped, unless required. Installed but not working: the test's own failure.
    """
    name: str = getattr(request, "param", "shm")
    reason = why_missing(name)
    if reason is not None:
        if name in _required(request.config):
            pytest.fail(f"required by --require-backend: {reason}")
        pytest.skip(reason)
    return name


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Fail a test that leaves segments, processes, descriptors or threads."""
    before = snapshot() - server_residue()
    yield
    left = _left_since(before)
    deadline = time.monotonic() + _SETTLE_SECS
    if left:
        # What only a reference cycle holds is no leak.
        gc.collect()
        left = _left_since(before)
    while left and time.monotonic() < deadline:
        time.sleep(0.02)
        left = _left_since(before)
    assert not left, f"left behind: {left}"


def _left_since(before: Residue) -> Residue:
    # The server may have been started by this very test, and stays for the next.
    return of_this_run(snapshot() - server_residue() - before)
