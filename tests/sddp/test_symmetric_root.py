"""The root of a correlation matrix: as good as LAPACK's, and the same bits everywhere."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cobre_shm.sddp import load_case
from cobre_shm.sddp.symmetric_root import symmetric_root
from tests.sddp.editing import edit, hydro_plant, small_case, write_json, write_table

ROOT = Path(__file__).resolve().parents[2]


def correlation(size, rank, seed=0):
    """Return a random correlation matrix."""
    factors = np.random.default_rng(seed).standard_normal((size, rank))
    factors /= np.sqrt(np.square(factors).sum(axis=1, keepdims=True))
    matrix = factors @ factors.T
    np.fill_diagonal(matrix, 1.0)
    return (matrix + matrix.T) / 2


def root_by_lapack(matrix):
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 8, 40, 91])
def test_root_is_that_of_lapack(size):
    matrix = correlation(size, 2 * size + 1)
    root = symmetric_root(matrix)
    np.testing.assert_allclose(root, root_by_lapack(matrix), rtol=0, atol=1e-12)
    assert (root == root.T).all()


@pytest.mark.parametrize("size", [2, 5, 8, 90])
@pytest.mark.parametrize("rank", [1, 2, None])
def test_root_of_a_singular_matrix(size, rank):
    # The root of a rounding error is large beside one, in LAPACK's as well: compare the squares.
    matrix = np.ones((size, size)) if rank == 1 else correlation(size, rank or size // 2)
    root = symmetric_root(matrix)
    np.testing.assert_allclose(root @ root, matrix, rtol=0, atol=1e-12)


def test_multiple_eigenvalues():
    matrix = np.full((12, 12), 0.6) + 0.4 * np.eye(12)
    root = symmetric_root(matrix)
    np.testing.assert_allclose(root, root_by_lapack(matrix), rtol=0, atol=1e-13)
    assert (symmetric_root(np.eye(12)) == np.eye(12)).all()


def test_negative_eigenvalues_count_as_zero():
    matrix = np.array([[1.0, 0.9, -0.9], [0.9, 1.0, 0.9], [-0.9, 0.9, 1.0]])
    assert np.linalg.eigvalsh(matrix)[0] < -0.5
    root = symmetric_root(matrix)
    np.testing.assert_allclose(root, root_by_lapack(matrix), rtol=0, atol=1e-13)


def correlated_case(path, size):
    """Write a case whose plants are one correlation group."""
    small_case(path, openings=2)
    write_json(path, "system/hydros.json", {"hydros": [hydro_plant(h) for h in range(size)]})
    storage = [{"hydro_id": h, "value_hm3": 20.0} for h in range(size)]
    edit(path, "initial_conditions.json", lambda content: content.update(storage=storage))
    write_table(
        path,
        "scenarios/inflow_seasonal_stats.parquet",
        ["hydro_id", "stage_id", "mean_m3s", "std_m3s"],
        [(h, 0, 25.0, 5.0) for h in range(size)],
    )
    entities = [{"type": "inflow", "id": h} for h in range(size)]
    matrix = correlation(size, 2 * size).tolist()
    groups = [{"name": "rivers", "entities": entities, "matrix": matrix}]
    write_json(
        path,
        "scenarios/correlation.json",
        {"method": "spectral", "profiles": {"default": {"correlation_groups": groups}}},
    )
    return path


_PRINT_DIGEST = """
import sys
from tests.sddp.test_symmetric_root import digest
print(digest(sys.argv[1]))
"""


def digest(path):
    (group,) = load_case(path).statistics.correlation.by_stage[0]
    return hashlib.sha256(group[1].tobytes()).hexdigest()


@pytest.mark.parametrize("size", [8, 90])
def test_neither_threads_nor_processor_change_a_bit(tmp_path, size):
    path = correlated_case(tmp_path / "case", size)
    found = set()
    for threads, core in ((1, "Haswell"), (2, "Haswell"), (1, "Prescott")):
        # What a numpy with another BLAS does not know has no effect.
        names = {"OPENBLAS_NUM_THREADS": str(threads), "OPENBLAS_CORETYPE": core}
        result = subprocess.run(
            [sys.executable, "-c", _PRINT_DIGEST, str(path)],
            env={**os.environ, "PYTHONPATH": str(ROOT), **names},
            capture_output=True,
            text=True,
            check=True,
        )
        found.add(result.stdout)
    assert len(found) == 1
