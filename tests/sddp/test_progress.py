"""The convergence table on a terminal and off it."""

from __future__ import annotations

import io

import pytest

from cobre_shm.sddp.progress import ConvergenceTable, format_iteration
from cobre_shm.sddp.training_result import Iteration


class Terminal(io.StringIO):
    def isatty(self):
        return True


def iteration(number, lower=1234567.0):
    return Iteration(
        iteration=number,
        lower_bound=lower,
        upper_bound_mean=2e6,
        upper_bound_std=1e5,
        gap_percent=12.5,
        cuts_added=3,
        cuts_active=3 * number,
        lp_solves=100,
        forward_seconds=0.1,
        backward_seconds=0.3,
        total_seconds=0.5,
        elapsed_seconds=0.5 * number,
        forward_passes=4,
    )


def shown(limit, stream):
    with ConvergenceTable(limit, stream) as table:
        for number in range(1, limit + 1):
            table(iteration(number))
    return stream.getvalue()


def rows(text):
    return [int(line.split()[0]) for line in text.splitlines() if line.split()[0] != "iter"]


def test_row_shows_bounds_gap_and_rate():
    row = format_iteration(iteration(7)).split()
    assert row == ["7", "1,234,567", "2,000,000", "98,000", "12.50", "200", "3.5"]


def test_wide_costs_keep_the_columns():
    assert len(format_iteration(iteration(1, -1.5e18))) == len(format_iteration(iteration(1)))


@pytest.mark.parametrize("limit", [1, 5, 40])
def test_short_training_shows_every_iteration(limit):
    assert rows(shown(limit, io.StringIO())) == list(range(1, limit + 1))


def test_long_training_shows_some_iterations_with_first_and_last():
    numbers = rows(shown(257, io.StringIO()))
    assert numbers[0] == 1
    assert numbers[-1] == 257
    assert len(numbers) < 45


def test_terminal_gets_the_same_rows_with_or_without_rich(monkeypatch):
    pytest.importorskip("rich")
    with_rich = shown(3, Terminal())
    assert "98,000" in with_rich
    monkeypatch.setitem(__import__("sys").modules, "rich.console", None)
    assert rows(shown(3, Terminal())) == [1, 2, 3]
