"""What starting costs is a part of what it costs the MPIs, or ``import numba``.

``bench/start.py`` says what is measured, and prints it.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.remeasure import first_within
from bench.start import ROUNDS, System, environments, memories, ours, ratio, single, theirs, times

TIME_LIMIT = 0.5
# Of ``import numba``, which takes less than 0.25 s more than ``import numpy``.
FIRST_LIMIT = 1.0
MEMORY_LIMIT = 0.5

Seen = dict[str, float]


@pytest.fixture(scope="module")
def systems() -> list[System]:
    return [ours(), *theirs(environments())]


def check(benchmark: BenchmarkFixture, measure: partial[Seen], limit: float) -> None:
    """Fail if the first takes more than ``limit`` of the best of the others, each time."""
    seen: list[Seen] = []

    def run() -> None:
        seen.extend(first_within(measure, lambda found: ratio(found) <= limit))

    benchmark.pedantic(run, rounds=1)
    benchmark.extra_info.update({"seen": seen, "limit": limit})
    assert ratio(seen[-1]) <= limit, seen


def test_start_takes_at_most_half_of_the_fastest_mpi(
    benchmark: BenchmarkFixture, systems: list[System], tmp_path: Path
) -> None:
    check(benchmark, partial(times, systems, tmp_path, ROUNDS), TIME_LIMIT)


def test_ranks_need_at_most_half_the_memory_of_the_smallest_mpi(
    benchmark: BenchmarkFixture, systems: list[System], tmp_path: Path
) -> None:
    check(benchmark, partial(memories, systems, tmp_path), MEMORY_LIMIT)


def test_first_communicator_is_there_before_numba_would_be_imported(
    benchmark: BenchmarkFixture, tmp_path: Path
) -> None:
    first, _, numba = single()
    check(benchmark, partial(times, [first, numba], tmp_path, ROUNDS), FIRST_LIMIT)
