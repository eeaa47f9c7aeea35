"""The convergence table on a terminal and off it."""

from __future__ import annotations

import io
import json

import pytest

from cobre_shm.sddp.progress import (
    ConvergenceTable,
    EventLines,
    format_iteration,
    remaining_seconds,
)
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
        wait_share=0.125,
    )


def shown(limit, stream, first=1, last=None):
    with ConvergenceTable(limit, stream) as table:
        for number in range(first, (last or limit) + 1):
            table(iteration(number))
    return stream.getvalue()


def rows(text):
    return [int(line.split()[0]) for line in text.splitlines() if line.split()[0] != "iter"]


def test_row_shows_bounds_gap_and_rate():
    row = format_iteration(iteration(7)).split()
    assert row == ["7", "1,234,567", "2,000,000", "98,000", "12.50", "200", "12.5", "3.5"]


def test_wide_costs_keep_the_columns():
    assert len(format_iteration(iteration(1, -1.5e18))) == len(format_iteration(iteration(1)))


@pytest.mark.parametrize("limit", [1, 5, 40])
def test_short_training_shows_every_iteration(limit):
    assert rows(shown(limit, io.StringIO())) == list(range(1, limit + 1))


def test_long_training_shows_some_iterations_with_first_and_last():
    numbers = rows(shown(257, io.StringIO()))
    assert numbers[0] == 1
    assert numbers[-1] == 257
    assert len(numbers) < 55


def test_training_that_ends_long_before_its_limit_shows_some_iterations():
    numbers = rows(shown(10**12, io.StringIO(), last=257))
    assert numbers[:5] == [1, 2, 3, 4, 5]
    assert numbers[-1] == 257
    assert 20 < len(numbers) < 55


def test_training_that_goes_on_has_a_header_and_its_first_iteration():
    lines = shown(240, io.StringIO(), first=101, last=104).splitlines()
    assert lines[0].split()[0] == "iter"
    assert rows("\n".join(lines)) == [101, 104]


def test_terminal_gets_the_same_rows_with_or_without_rich(monkeypatch):
    pytest.importorskip("rich")
    with_rich = shown(3, Terminal())
    assert "98,000" in with_rich
    monkeypatch.setitem(__import__("sys").modules, "rich.console", None)
    assert rows(shown(3, Terminal())) == [1, 2, 3]


def test_time_left_continues_the_growth_of_the_iterations():
    # 1, 2, 3, 4 seconds so far, so 5 + 6 are left for two more.
    assert remaining_seconds([1.0, 2.0, 3.0, 4.0], 2) == pytest.approx(11.0)
    assert remaining_seconds([2.0, 2.0, 2.0], 2) == pytest.approx(4.0)
    assert remaining_seconds([4.0, 3.0, 2.0], 2) == pytest.approx(6.0)


def test_time_left_is_unknown_at_first_and_nothing_at_the_end():
    assert remaining_seconds([1.0, 1.0], 8) is None
    assert remaining_seconds([1.0], 0) == 0.0


def test_time_left_of_any_number_of_iterations():
    assert remaining_seconds([1.0, 2.0, 3.0], 10**12) == pytest.approx(5e23)


def test_time_left_is_unknown_beyond_the_limit():
    """With ``stopping_mode`` "all" another rule may keep a training going on."""
    assert remaining_seconds([1.0, 1.0, 1.0], -1) is None


def test_time_left_of_a_training_that_goes_on_is_that_of_the_iterations_left():
    stream = io.StringIO()
    events = EventLines(10, stream)
    for number in (7, 8, 9):
        events(iteration(number))
    assert json.loads(stream.getvalue().splitlines()[-1])["remaining_seconds"] == pytest.approx(0.5)


def test_terminal_shows_rate_wait_share_and_time_left():
    pytest.importorskip("rich")
    text = shown(5, Terminal())
    assert "200 LPs/s" in text
    assert "wait 12 %" in text
    assert "left 0:00" in text
    assert "5/5" in text


def test_events_are_one_json_object_a_line():
    stream = io.StringIO()
    events = EventLines(4, stream)
    for number in range(1, 4):
        events(iteration(number))
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 2, 3]
    assert lines[0]["event"] == "iteration"
    assert lines[0]["remaining_seconds"] is None
    assert lines[2]["remaining_seconds"] == pytest.approx(0.5)
    assert lines[2]["upper_bound_half_width"] == pytest.approx(98000.0)
    assert lines[2]["wait_share"] == 0.125
