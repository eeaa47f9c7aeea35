"""The support for groups of real processes: it must notice everything and leave nothing."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from cobre_shm.errors import CollectiveFailed, RankFailed
from tests.support.backends import BACKENDS, COLLECTIVE_TIMEOUT_SECS
from tests.support.ranks import (
    RankDied,
    RankGroup,
    RanksTimedOut,
    results_of,
    run_ranks,
    server_residue,
)
from tests.support.residue import snapshot

pytestmark = pytest.mark.usefixtures("backend")


def describe(comm, *words):
    return comm.rank, comm.size, os.getpid(), words


def raise_on_last(comm):
    if comm.rank == comm.size - 1:
        print("about to fail", flush=True)
        raise LookupError("the reason")
    comm.barrier()


def end_by_signal(comm, number):
    if comm.rank == 0:
        os.kill(os.getpid(), number)
    comm.barrier()


def exit_on_first(comm, code):
    if comm.rank == 0:
        sys.exit(code)
    comm.barrier()


def sleep_on_first(comm):
    if comm.rank == 0:
        print("asleep", flush=True)
        time.sleep(3600)


def return_lock(comm):
    return threading.Lock() if comm.rank == 0 else comm.rank


def return_array(comm):
    return np.full(1_000_000, comm.rank)


def test_run_ranks_results_in_rank_order():
    outcomes = run_ranks(describe, 3, "shm", "a", 7)
    results = results_of(outcomes)
    assert [result[:2] for result in results] == [(0, 3), (1, 3), (2, 3)]
    assert [result[2] for result in results] == [outcome.pid for outcome in outcomes]
    assert len({result[2] for result in results} | {os.getpid()}) == 4
    assert all(result[3] == ("a", 7) for result in results)
    assert [outcome.exit_code for outcome in outcomes] == [0, 0, 0]


def test_run_ranks_local_group_runs_in_this_process():
    (outcome,) = run_ranks(describe, 1, "local")
    assert outcome.result[2] == os.getpid()


def test_run_ranks_results_larger_than_a_pipe_arrive():
    results = results_of(run_ranks(return_array, 2))
    assert [int(result[-1]) for result in results] == [0, 1]


def test_run_ranks_exception_carries_remote_traceback_and_output():
    outcomes = run_ranks(raise_on_last, 3)
    culprit = outcomes[2]
    assert isinstance(culprit.error, LookupError)
    assert "in raise_on_last" in culprit.traceback
    assert "about to fail" in culprit.output
    assert culprit.exit_code == 1
    assert all(isinstance(outcome.error, RankFailed) for outcome in outcomes[:2])
    with pytest.raises(AssertionError, match="the reason"):
        results_of(outcomes)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_run_ranks_signal_reported(number):
    outcomes = run_ranks(end_by_signal, 2, "shm", number)
    assert isinstance(outcomes[0].error, RankDied)
    assert outcomes[0].signal == number
    assert outcomes[0].exit_code is None
    assert isinstance(outcomes[1].error, CollectiveFailed)


@pytest.mark.parametrize("code", [0, 3])
def test_run_ranks_exit_code_reported(code):
    outcomes = run_ranks(exit_on_first, 2, "shm", code)
    assert isinstance(outcomes[0].error, SystemExit)
    assert outcomes[0].exit_code == code
    assert isinstance(outcomes[1].error, CollectiveFailed)


def test_run_ranks_result_that_cannot_be_pickled_is_an_error():
    outcomes = run_ranks(return_lock, 2)
    assert isinstance(outcomes[0].error, TypeError)
    assert outcomes[1].result == 1


def test_run_ranks_deadline_kills_and_shows_stacks():
    with RankGroup(BACKENDS["shm"].make_group(2, COLLECTIVE_TIMEOUT_SECS), sleep_on_first) as group:
        deadline = time.monotonic() + 60
        while not group.output(0) or Path(f"/proc/{group.pids[1]}").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        outcomes = group.outcomes(0.5)
    assert isinstance(outcomes[0].error, RanksTimedOut)
    assert outcomes[0].signal == signal.SIGKILL
    assert "in sleep_on_first" in outcomes[0].output
    assert outcomes[1].error is None


@pytest.mark.parametrize("function", [describe, raise_on_last])
def test_run_ranks_group_leaves_nothing(function):
    run_ranks(describe, 1)
    before = snapshot()
    outcomes = run_ranks(function, 3)
    left = snapshot() - before
    assert not left.processes
    assert not left.descriptors
    assert not left.threads
    assert server_residue().processes <= before.processes
    for outcome in outcomes:
        with pytest.raises(ProcessLookupError):
            os.kill(outcome.pid, 0)
