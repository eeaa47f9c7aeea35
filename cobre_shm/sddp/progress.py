"""The convergence table, and a live line under it where there is a terminal for it."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any, Self, TextIO

from cobre_shm.sddp.training_result import Iteration

_HEADER = (
    f"{'iter':>5}  {'lower bound':>15}  {'upper bound':>15}  {'+- 95%':>11}  "
    f"{'gap %':>7}  {'LPs/s':>7}  {'time s':>7}"
)
_FULL_TABLE = 40


def format_iteration(item: Iteration) -> str:
    """Return the table row of an iteration; costs in $."""
    rate = item.lp_solves / item.total_seconds if item.total_seconds > 0 else 0.0
    return (
        f"{item.iteration:>5}  {_money(item.lower_bound)}  {_money(item.upper_bound_mean)}  "
        f"{_money(item.half_width, 11)}  {item.gap_percent:>7.2f}  {rate:>7.0f}  "
        f"{item.elapsed_seconds:>7.1f}"
    )


def _money(value: float, width: int = 15) -> str:
    # Sums too wide for the column keep five significant digits.
    text = f"{value:,.0f}"
    return f"{text if len(text) <= width else f'{value:.4e}':>{width}}"


class ConvergenceTable:
    """Prints iterations as they end; use as a context manager around the training.

    Long trainings get a row for every n-th iteration, so that the table stays readable; the
    first and the last iteration always have a row.
    """

    def __init__(self, limit: int, stream: TextIO | None = None) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._limit = limit
        self._every = max(1, -(-limit // _FULL_TABLE))
        self._live: Any = None
        self._task: Any = None
        self._pending: Iteration | None = None

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
        if item.iteration == 1:
            self._print(_HEADER)
        if item.iteration == 1 or item.iteration % self._every == 0:
            self._print(format_iteration(item))
            self._pending = None
        else:
            self._pending = item
        if self._live is not None:
            self._live.update(
                self._task,
                completed=item.iteration,
                description=f"lower bound {item.lower_bound:,.0f}  gap {item.gap_percent:.2f} %",
            )

    def _start_live(self) -> None:
        try:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeElapsedColumn,
            )
        except ImportError:
            return
        self._live = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
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
