"""The conformance suite under real MPIs: flat, on one node, and on nodes that are made up."""

import pytest

from cobre_shm.testing.conformance import CHECKS

WAYS = [
    *(("flat", size) for size in (1, 2, 3, 4, 8)),
    ("plain", 3),
    *(("node", size) for size in (2, 3)),
    ("two", 4),
    *(pytest.param("node", size, marks=pytest.mark.slow) for size in (4, 8)),
    pytest.param("two", 8, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("way", "size"), WAYS)
def test_mpi_keeps_the_contract(mpi, way, size):
    done = mpi.program(size, "conform", way)
    assert done.code == 0, done.stderr
    # Left out: who outlives an abort, what needs gigabytes or more ranks, and what nobody compares.
    expected = [
        check
        for check in CHECKS.values()
        if not check.outlives_peers
        and not check.huge
        and size >= check.min_size
        and (way != "plain" or check.topic != "mismatch")
    ]
    assert f"checked {len(expected)} checks" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("way", "size"), [("huge flat", 2), ("huge two", 3)])
def test_more_elements_than_32_bits_count(mpi, way, size):
    """Takes up to 9 GB of memory."""
    done = mpi.program(size, "conform", way)
    assert done.code == 0, done.stderr
    expected = [check for check in CHECKS.values() if check.huge]
    assert f"checked {len(expected)} checks" in done.stdout
