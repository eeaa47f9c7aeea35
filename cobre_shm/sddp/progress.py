"""What a training shows while it runs.

For people a convergence table, with a live line under it where there is a terminal for it; for
programs one JSON object a line.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from types import TracebackType
from typing import Any, Self, TextIO

import numpy as np

from cobre_shm.sddp.training_result import Iteration

_HEADER = (
    f"{'iter':>5}  {'lower bound':>15}  {'upper bound':>15}  {'+- 95%':>11}  "
    f"{'gap %':>7}  {'LPs/s':>7}  {'wait %':>6}  {'time s':>7}"
)
_FULL_TABLE = 40
# No row is further from the one before than this part of the iterations up to there: what ends a
# training need not be its limit.
_DISTANCE = 5
# Iterations before their times say anything about those to come.
_FORECAST_FROM = 3


def format_iteration(item: Iteration) -> str:
    """Return the table row of an iteration; costs in $."""
    return (
        f"{item.iteration:>5}  {_money(item.lower_bound)}  {_money(item.upper_bound_mean)}  "
        f"{_money(item.half_width, 11)}  {item.gap_percent:>7.2f}  {_rate(item):>7.0f}  "
        f"{100 * item.wait_share:>6.1f}  {item.elapsed_seconds:>7.1f}"
    )


def _rate(item: Iteration) -> float:
    """Return problems per second of wall time, over all ranks."""
    return item.lp_solves / item.total_seconds if item.total_seconds > 0 else 0.0


def remaining_seconds(seconds: Sequence[float], left: int) -> float | None:
    """Return the time that so many more iterations take, None while it cannot be told.

    An iteration takes longer the more cuts there are, which grow by the same number each time:
    the times are continued on the least-squares line through those so far.

    Args:
        seconds: How long the iterations took, one after the other up to the last one.
        left: How many there are left; below 0 where other rules keep a training going on beyond
            its limit.
    """
    known = len(seconds)
    if left == 0:
        return 0.0
    if left < 0 or known < _FORECAST_FROM:
        return None
    slope, offset = (float(value) for value in np.polyfit(np.arange(known), seconds, 1))
    if slope <= 0:
        return float(np.mean(seconds)) * left
    middle = known + (left - 1) / 2
    return max(0.0, left * (offset + slope * middle))


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class EventLines:
    """Prints an ``iteration`` event a line, as JSON; see :class:`Iteration` for its fields."""

    def __init__(self, limit: int, stream: TextIO | None = None) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._limit = limit
        self._seconds: list[float] = []

    def __call__(self, item: Iteration) -> None:
        """Print an iteration that has just ended."""
        self._seconds.append(item.total_seconds)
        event = {
            "event": "iteration",
            **asdict(item),
            "iteration_limit": self._limit,
            "upper_bound_half_width": item.half_width,
            "lp_solves_per_second": _rate(item),
            "remaining_seconds": remaining_seconds(self._seconds, self._limit - item.iteration),
        }
        print(json.dumps(event), file=self._stream, flush=True)


def _money(value: float, width: int = 15) -> str:
    # Sums too wide for the column keep five significant digits.
    text = f"{value:,.0f}"
    return f"{text if len(text) <= width else f'{value:.4e}':>{width}}"


class ConvergenceTable:
    """Prints iterations as they end; use as a context manager around the training.

    Long trainings get rows at distances that grow, so that the table stays readable; the first
    and the last iteration shown always have a row.
    """

    def __init__(self, limit: int, stream: TextIO | None = None) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._limit = limit
        self._every = max(1, -(-limit // _FULL_TABLE))
        self._next_row: int | None = None
        self._live: Any = None
        self._task: Any = None
        self._pending: Iteration | None = None
        self._seconds: list[float] = []

    def __enter__(self) -> Self:
        if self._stream.isatty():
            self._start_live()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pending is not None:
            self._print(format_iteration(self._pending))
        if self._live is not None:
            self._live.stop()

    def __call__(self, item: Iteration) -> None:
        """Show an iteration that has just ended."""
        self._seconds.append(item.total_seconds)
        if self._next_row is None:
            self._print(_HEADER)
            self._next_row = item.iteration
        if item.iteration >= self._next_row:
            self._print(format_iteration(item))
            self._next_row += max(1, min(self._every, item.iteration // _DISTANCE))
            self._pending = None
        else:
            self._pending = item
        if self._live is not None:
            self._live.update(
                self._task,
                completed=item.iteration,
                description=self._describe(item),
            )

    def _describe(self, item: Iteration) -> str:
        left = _clock(remaining_seconds(self._seconds, self._limit - item.iteration))
        bounds = (_money(item.lower_bound).strip(), _money(item.upper_bound_mean).strip())
        # No bar: on 80 columns there is room for the figures only.
        return (
            f"{bounds[0]} .. {bounds[1]}  gap {item.gap_percent:.2f} %  "
            f"{_rate(item):.0f} LPs/s  wait {100 * item.wait_share:.0f} %  left {left}"
        )

    def _start_live(self) -> None:
        try:
            from rich.console import Console
            from rich.progress import MofNCompleteColumn, Progress, TextColumn
        except ImportError:
            return
        self._live = Progress(
            MofNCompleteColumn(),
            TextColumn("{task.description}", markup=False),
            console=Console(file=self._stream, highlight=False),
            transient=True,
        )
        self._task = self._live.add_task("training", total=self._limit)
        self._live.start()

    def _print(self, line: str) -> None:
        if self._live is not None:
            self._live.console.print(line, markup=False, soft_wrap=True)
        else:
            print(line, file=self._stream, flush=True)
