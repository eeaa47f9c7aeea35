"""What choosing a backend costs: ``pytest bench --benchmark-only``.

Every limit is on a ratio of two measurements that alternate within one run, so it holds on slow
and on busy machines. A ratio beyond its limit is measured again before it counts.
"""

from __future__ import annotations

import secrets
import statistics
import subprocess
import sys
import time

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.remeasure import first_within
from cobre_shm import (
    Communicator,
    LocalConfig,
    ShmConfig,
    available_backends,
    create_communicator,
)

ROUNDS = 41
CALLS = 2000
STARTS = 9
# There is no wrapper, so whatever it takes longer is noise.
CALL_NOISE = 0.03
START_LIMIT = 1.3


def shm_config() -> ShmConfig:
    return ShmConfig(f"/cobre-bench-{secrets.token_hex(8)}", rank=0, size=1)


def make_local() -> tuple[Communicator, Communicator]:
    from cobre_shm import LocalCommunicator

    return create_communicator(LocalConfig()), LocalCommunicator()


def make_shm() -> tuple[Communicator, Communicator]:
    from cobre_shm import ShmCommunicator

    return create_communicator(shm_config()), ShmCommunicator(shm_config())


MAKERS = {"local": make_local, "shm": make_shm}


def seconds_of_calls(comm: Communicator) -> float:
    """The cheapest call of all, for it would show the smallest addition."""
    begin = time.perf_counter()
    for _ in range(CALLS):
        comm.barrier()
    return time.perf_counter() - begin


def ratio_of_calls(chosen: Communicator, constructed: Communicator) -> float:
    """Median over rounds of the ratio of neighbouring measurements; who is first alternates."""
    ratios = []
    for turn in range(ROUNDS):
        if turn % 2:
            first = seconds_of_calls(chosen)
            ratios.append(first / seconds_of_calls(constructed))
        else:
            first = seconds_of_calls(constructed)
            ratios.append(seconds_of_calls(chosen) / first)
    return statistics.median(ratios)


def start(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)


def seconds_of_start(*arguments: str) -> float:
    begin = time.perf_counter()
    start(*arguments)
    return time.perf_counter() - begin


def ratio_of_starts(*arguments: str) -> float:
    """Fastest of several interpreters over the fastest that imports numpy, taken in turns."""
    own, numpys = [], []
    for _ in range(STARTS):
        numpys.append(seconds_of_start("-c", "import numpy"))
        own.append(seconds_of_start(*arguments))
    return min(own) / min(numpys)


@pytest.mark.parametrize("name", MAKERS)
def test_call_through_the_chosen_object_costs_no_more_than_directly(
    benchmark: BenchmarkFixture, name: str
) -> None:
    if name not in available_backends():
        pytest.skip(f"backend {name} is not installed")
    ratios: list[float] = []

    def measure() -> float:
        # Another pair each time: two objects of one class differ by where their memory lies.
        chosen, constructed = MAKERS[name]()
        with chosen, constructed:
            assert type(chosen) is type(constructed)
            return ratio_of_calls(chosen, constructed)

    def run() -> None:
        ratios.extend(first_within(measure, lambda ratio: ratio <= 1 + CALL_NOISE))

    benchmark.pedantic(run, rounds=1)
    benchmark.extra_info["chosen / constructed"] = ratios[-1]
    assert ratios[-1] <= 1 + CALL_NOISE, ratios


@pytest.mark.parametrize(
    "arguments",
    [("-c", "import cobre_shm"), ("-m", "cobre_shm.spawn", "--help")],
    ids=["import", "spawn_help"],
)
def test_start_takes_little_more_than_importing_numpy(
    benchmark: BenchmarkFixture, arguments: tuple[str, ...]
) -> None:
    ratios = first_within(lambda: ratio_of_starts(*arguments), lambda ratio: ratio <= START_LIMIT)
    benchmark.extra_info["over import numpy"] = ratios[-1]
    benchmark.pedantic(start, arguments, rounds=STARTS)
    assert ratios[-1] <= START_LIMIT, ratios
