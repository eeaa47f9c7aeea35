"""The exchange round on real cores: every element of every turn is checked.

A stale slot, a lost wake-up or an early release shows as a wrong sum or as a time limit. Ranks
sleep, compute and yield at random, so that each is late at times, also with many ranks to a core.
"""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.support.ranks import results_of, run_ranks


def sums_of_turns(comm, turns, seed):
    """allreduce of values that depend on turn, rank and position; return the turns done."""
    lengths = random.Random(seed)
    delays = random.Random(seed + comm.rank)
    longest = np.arange(20_000, dtype=np.int64)
    ranks_sum = comm.size * (comm.size + 1) // 2
    recv = np.empty(20_000, dtype=np.int64)
    for turn in range(1, turns + 1):
        # Mostly the one-round path, now and then the two rounds of longer payloads.
        length = lengths.choice([1, 1, 1, 2, 7, 512, 513, 20_000])
        delay = delays.random()
        if delay < 0.02:
            time.sleep(delays.random() * 0.003)
        elif delay < 0.1:
            time.sleep(0)
        send = longest[:length] + turn * (comm.rank + 1)
        comm.allreduce(send, recv[:length])
        expected = longest[:length] * comm.size + turn * ranks_sum
        assert np.array_equal(recv[:length], expected), f"turn {turn}"
    return turn


def same_turns(comm, turns, seed):
    """Barriers between payloads of changing roots: nobody may see an older broadcast."""
    agreed = random.Random(seed)
    value = np.zeros(3, dtype=np.int64)
    for turn in range(turns):
        root = agreed.randrange(comm.size)
        value[:] = -1 if comm.rank != root else turn
        comm.broadcast(value, root)
        assert (value == turn).all(), (turn, root, value)
        if agreed.random() < 0.3:
            comm.barrier()
        blocks = comm.allgatherv(np.array([turn * comm.rank]))
        assert (blocks == turn * np.arange(comm.size)).all(), (turn, blocks)
    return turns


@pytest.mark.parametrize(("size", "turns"), [(2, 12_000), (3, 4_000), (8, 1_000), (16, 400)])
def test_changing_payloads_arrive_whole_and_in_turn(size, turns):
    seed = random.randrange(2**32)
    print("seed", seed)
    for function in (sums_of_turns, same_turns):
        assert results_of(run_ranks(function, size, "shm", turns, seed)) == [turns] * size


@pytest.mark.parametrize(
    ("size", "turns"),
    [(16, 50), pytest.param(16, 3_000, marks=[pytest.mark.slow, pytest.mark.timeout(1000)])],
)
def test_changing_payloads_arrive_whole_from_ranks_that_yield_anywhere(size, turns):
    seed = random.randrange(2**32)
    print("seed", seed)
    done = subprocess.run(
        [sys.executable, "-m", "tests.stress.yielding_run", *map(str, (size, turns, seed))],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "COBRE_FAIL": "on"},
        capture_output=True,
        text=True,
        timeout=950,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    yields = [int(word) for word in done.stdout.split()]
    # Of each rank, in every fourth place on the way of some hundred collectives.
    assert len(yields) == size
    assert min(yields) > turns / 2


@pytest.mark.slow
@pytest.mark.parametrize(("size", "turns"), [(2, 500_000), (8, 20_000), (16, 5_000)])
def test_changing_payloads_arrive_whole_for_minutes(size, turns):
    seed = random.randrange(2**32)
    print("seed", seed)
    for function in (sums_of_turns, same_turns):
        outcomes = run_ranks(function, size, "shm", turns, seed, timeout=900.0)
        assert results_of(outcomes) == [turns] * size
