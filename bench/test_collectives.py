"""What collectives over shared memory may cost: ``pytest bench --benchmark-only``.

Every limit is on a ratio of two things that are measured in turns within one launch, so it holds on
slow and on busy machines; beyond its limit a ratio is measured again, in another launch, before it
counts. What it is compared with is what the machine can do: a cache line that goes to another core
and back, a switch to another process, a copy by all ranks at once, a call of a function that does
nothing. Limits are goals, or what a prototype of the kernels without checks has reached.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.machine import switch_us
from bench.remeasure import first_within

ROOT = Path(__file__).resolve().parents[1]
CPUS = len(os.sched_getaffinity(0))
CROWD = 8
LAUNCH_SECS = 120
KIB, MIB = 1 << 10, 1 << 20
# A round trip shorter than this is one between two threads of one core.
LEAST_TRIP_US = 0.1
STARTS = 7
Found = dict[str, list[float]]

own_cores = pytest.mark.skipif(CPUS < 2, reason="needs a core for each of two ranks")


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def measured(ranks: int) -> Found:
    """Return every quantity, measured in one launch."""
    with tempfile.TemporaryDirectory(prefix="cobre-bench-") as folder:
        out = Path(folder) / "out.json"
        launcher = [sys.executable, "-m", "cobre_shm.spawn", "-n", str(ranks)]
        program = [str(ROOT / "bench/in_ranks.py"), str(out)]
        before = switch_us()
        subprocess.run([*launcher, *program], env=environment(), check=True, timeout=LAUNCH_SECS)
        found: Found = json.loads(out.read_text())
        return {**found, "switch": [before, switch_us()]}


class Launches:
    """The first launch with so many ranks serves all gates; a repetition has one of its own."""

    def __init__(self) -> None:
        self._kept: dict[int, Found] = {}

    def measure(self, ranks: int, ratio: Callable[[Found], float]) -> Callable[[], float]:
        """Return what measures a ratio."""
        is_first = True

        def again() -> float:
            nonlocal is_first
            if not is_first or ranks not in self._kept:
                self._kept[ranks] = measured(ranks)
            is_first = False
            return ratio(self._kept[ranks])

        return again


@pytest.fixture(scope="module")
def launches() -> Launches:
    return Launches()


def over(name: str, *parts: tuple[float, str]) -> Callable[[Found], float]:
    """Return what computes the median over rounds of one quantity over a sum of others."""

    def ratio(found: Found) -> float:
        floors = [sum(n * found[p][i] for n, p in parts) for i in range(len(found[name]))]
        ratios = [a / b for a, b in zip(found[name], floors, strict=True)]
        known = [ratio for ratio in ratios if not math.isnan(ratio)]
        # Where noise hid all of it, nothing was shown.
        return statistics.median(known) if known else math.inf

    return ratio


def check(benchmark: BenchmarkFixture, measure: Callable[[], float], limit: float) -> None:
    ratios: list[float] = []

    def run() -> None:
        ratios.extend(first_within(measure, lambda ratio: ratio <= limit))

    benchmark.pedantic(run, rounds=1)
    benchmark.extra_info.update({"ratios": ratios, "limit": limit})
    assert ratios[-1] <= limit, ratios


@pytest.mark.parametrize(
    ("name", "call"), [("barrier", "dispatched"), ("allreduce_8", "dispatched_arrays")]
)
def test_call_costs_no_more_than_that_of_a_jitted_function_that_does_nothing(
    benchmark: BenchmarkFixture, launches: Launches, name: str, call: str
) -> None:
    check(benchmark, launches.measure(1, over(name, (1.0, call))), 1.0)


@own_cores
@pytest.mark.parametrize(("name", "calls"), [("barrier", 2.0), ("allreduce_8", 4.0)])
def test_call_on_two_cores_costs_a_round_trip_and_some_calls_of_nothing(
    benchmark: BenchmarkFixture, launches: Launches, name: str, calls: float
) -> None:
    ratio = over(name, (1.0, "ping_pong"), (calls, "bare"))
    check(benchmark, launches.measure(2, ratio), 1.0)


@own_cores
@pytest.mark.parametrize(("name", "limit"), [("jit_barrier", 0.5), ("jit_allreduce_8", 0.6)])
def test_jitted_call_on_two_cores_costs_a_part_of_a_round_trip(
    benchmark: BenchmarkFixture, launches: Launches, name: str, limit: float
) -> None:
    def ratio(found: Found) -> float:
        # Where the two cores are one, there is hardly a trip to wait for.
        trips = [max(LEAST_TRIP_US, trip) for trip in found["ping_pong"]]
        return statistics.median(a / b for a, b in zip(found[name], trips, strict=True))

    check(benchmark, launches.measure(2, ratio), limit)


@own_cores
@pytest.mark.parametrize(("nbytes", "limit"), [(64 * KIB, 3.0), (MIB, 2.1), (16 * MIB, 1.43)])
def test_allreduce_on_two_cores_takes_as_long_as_a_few_copies(
    benchmark: BenchmarkFixture, launches: Launches, nbytes: int, limit: float
) -> None:
    ratio = over(f"allreduce_{nbytes}", (1.0, f"copy_{nbytes}"))
    check(benchmark, launches.measure(2, ratio), limit)


# 0.30 and 0.14 of the best peer, in copies: there private buffers took 2.1 and 2.0 copies, at 0.79
# and 0.52 of it.
@pytest.mark.parametrize(
    ("ranks", "limit"), [pytest.param(2, 0.80, marks=own_cores), (CROWD, 0.54)]
)
def test_shared_result_of_a_mebibyte_takes_less_than_a_copy(
    benchmark: BenchmarkFixture, launches: Launches, ranks: int, limit: float
) -> None:
    ratio = over(f"allreduce_shared_{MIB}", (1.0, f"copy_beside_shared_{MIB}"))
    check(benchmark, launches.measure(ranks, ratio), limit)


@pytest.mark.skipif(CPUS >= CROWD, reason=f"{CROWD} ranks have cores of their own here")
def test_barrier_on_shared_cores_costs_little_more_than_that_each_rank_runs(
    benchmark: BenchmarkFixture, launches: Launches
) -> None:
    def ratio(found: Found) -> float:
        floor = CROWD / CPUS * statistics.mean(found["switch"])
        return statistics.median(found["barrier"]) / floor

    check(benchmark, launches.measure(CROWD, ratio), 1.6)


@pytest.mark.skipif(CPUS >= CROWD, reason=f"{CROWD} ranks have cores of their own here")
def test_allreduce_of_a_mebibyte_on_shared_cores_takes_two_copies_of_all_ranks(
    benchmark: BenchmarkFixture, launches: Launches
) -> None:
    ratio = over(f"allreduce_{MIB}", (1.0, f"copy_{MIB}"))
    check(benchmark, launches.measure(CROWD, ratio), 2.1)


@pytest.mark.parametrize("ranks", [2, CROWD])
def test_waiting_rank_burns_half_a_percent_of_a_core(
    benchmark: BenchmarkFixture, launches: Launches, ranks: int
) -> None:
    measure = launches.measure(ranks, lambda found: statistics.median(found["waiting"]))
    check(benchmark, measure, 0.005)


def seconds_of(code: str) -> float:
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True)
    return time.perf_counter() - begun


def test_first_communicator_takes_less_than_twice_what_importing_numba_takes(
    benchmark: BenchmarkFixture,
) -> None:
    """Both beyond importing numpy; 0.25 s is the goal where importing numba takes 0.14."""
    first = (
        "import secrets, cobre_shm; from cobre_shm import ShmConfig, create_communicator\n"
        "name = '/cobre-bench-' + secrets.token_hex(8)\n"
        "create_communicator(ShmConfig(name, rank=0, size=1)).close()"
    )
    codes = ("import numpy", "import numpy, numba", first)

    def ratio() -> float:
        for code in codes:
            seconds_of(code)
        turns = [[seconds_of(code) for code in codes] for _ in range(STARTS)]
        numpy, numba, ours = (min(column) for column in zip(*turns, strict=True))
        benchmark.extra_info["seconds over import numpy"] = ours - numpy
        return (ours - numpy) / (numba - numpy)

    check(benchmark, ratio, 0.25 / 0.14)
