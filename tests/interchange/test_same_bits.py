"""One training program, any backend, any number of ranks: the same bits."""

import subprocess
import sys

import pytest

from cobre_shm.sddp import series_digest, shipped_case_path, train
from tests.sddp.results import digest_alone, values
from tests.support.ranks import results_of, run_ranks

SIZES = (1, 2, 3, 4, 8)
BACKENDS = ("shm", "tcp")


def digest_of_training(comm, path, iterations):
    return series_digest(train(path, comm, iterations=iterations)), comm.backend


def assert_same_bits(backend, path, iterations, size):
    outcomes = run_ranks(digest_of_training, size, backend, path, iterations, timeout=720.0)
    assert set(results_of(outcomes)) == {(digest_alone(path, iterations), backend)}


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["1dtoy", "4ree"])
def test_reference_case_has_the_bits_of_one_process(reference_cases, name, size, backend):
    assert_same_bits(backend, reference_cases / name, 8, size)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("size", SIZES)
def test_shipped_case_has_the_bits_of_one_process(size, backend):
    assert_same_bits(backend, shipped_case_path(), 3, size)


def test_digest_differs_between_trainings_that_differ():
    assert digest_alone(shipped_case_path(), 3) != digest_alone(shipped_case_path(), 2)


def run_trainer(folder, *launcher):
    command = [sys.executable, "-m", *launcher, "cobre_shm.sddp", "--iterations", "2"]
    done = subprocess.run(
        [*command, "--output-dir", str(folder)],
        capture_output=True,
        text=True,
        timeout=720,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("backend", BACKENDS)
def test_files_of_four_ranks_under_the_launcher_are_those_of_one_process(tmp_path, backend):
    alone, ranks = tmp_path / "alone", tmp_path / "ranks"
    run_trainer(alone)
    shown = run_trainer(ranks, "cobre_shm.spawn", "--backend", backend, "-n", "4", "-m")
    assert "4 rank" in shown
    assert len(values(alone)) > 10
    assert values(ranks) == values(alone)
    assert (ranks / "training/convergence.csv").is_file()
    assert (ranks / "training/metadata.json").is_file()
