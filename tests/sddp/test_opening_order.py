"""The order of the openings within a chain."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cobre_shm.sddp.opening_order import groups, outwards, sorted_openings


def test_openings_are_solved_outwards_from_the_first_one():
    inflow = np.array([[5.0, 5.0], [0.0, 1.0], [3.0, 1.0], [9.0, 0.0], [2.0, 0.0]])
    order = sorted_openings(inflow)
    assert order == [1, 4, 2, 3, 0]
    assert outwards(order, 0) == [0, 3, 2, 4, 1]
    assert outwards(order, 4) == [4, 1, 2, 3, 0]
    assert outwards(order, 2) == [2, 4, 1, 3, 0]
    assert outwards(order, 1) == [1, 4, 2, 3, 0]


def test_openings_without_inflow_keep_their_order():
    assert sorted_openings(np.zeros((3, 0))) == [0, 1, 2]


@given(st.lists(st.floats(0, 1e4), min_size=1, max_size=30), st.data())
def test_every_opening_comes_once_and_the_start_first(totals, data):
    start = data.draw(st.integers(0, len(totals) - 1))
    order = outwards(sorted_openings(np.array(totals)[:, None]), start)
    assert order[0] == start
    assert sorted(order) == list(range(len(totals)))


@given(st.permutations(range(12)), st.integers(1, 20))
def test_groups_are_neighbours_in_order_and_as_long_as_each_other(order, count):
    parts = groups(order, count)
    assert len(parts) == min(count, 12)
    assert [opening for part in parts for opening in part] == order
    lengths = [len(part) for part in parts]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] - lengths[-1] <= 1
