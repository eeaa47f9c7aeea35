"""Reduction of gathered rows, against the plain loop."""

import numpy as np
import pytest

from cobre_shm.native.rows import reduce_rows
from cobre_shm.testing.conformance.expect import assert_same_numbers
from cobre_shm.testing.conformance.payloads import numbers, reduced, reductions


@pytest.mark.parametrize("count", [1, 7, 3000])
def test_rows_are_reduced_in_order(count):
    for dtype, op in reductions():
        blocks = [numbers(dtype, count, rank) for rank in range(5)]
        target = np.zeros(count, dtype)
        reduce_rows(op, np.stack(blocks).astype(dtype), target)
        assert_same_numbers(target, reduced(op, blocks), f"{op} of {dtype}")


def test_one_row_is_copied():
    target = np.zeros(3)
    reduce_rows(next(op for _, op in reductions()), np.arange(3.0).reshape(1, 3), target)
    assert target.tolist() == [0, 1, 2]
