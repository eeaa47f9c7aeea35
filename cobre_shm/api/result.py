"""What comes back from a training."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, fields
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cobre_shm.api.policy import Policy
from cobre_shm.sddp.errors import MissingDependency
from cobre_shm.sddp.training_result import TIMING_COLUMNS, Iteration, TrainingDetails

if TYPE_CHECKING:
    from cobre_shm.sddp.case import Case

__all__ = ["History", "ProgressEvent", "TrainingResult", "WorkerInfo"]

_WAITS = ("gather_states_ms", "gather_cuts_ms", "share_bound_ms", "share_counters_ms")
_DTYPES = {"int": np.int64, "float": np.float64}


@dataclass(frozen=True)
class ProgressEvent:
    """One iteration, as one worker ended it; costs in $.

    Attributes:
        worker_id: Rank of the process, worker or not; 0 in a single one.
        iteration: Number of the iteration, from 1; ascending for each worker.
        iteration_limit: The iteration after which the training ends at the latest, unless the
            case asks that all of its stopping rules hold.
        lower_bound: Bound of the expected (or risk-adjusted) cost.
        upper_bound_mean: Mean cost of the iteration's trajectories.
        upper_bound_std: Their sample standard deviation.
        gap_percent: Distance of the bounds relative to the upper one.
        cuts_active: Cuts in the problems after the iteration, over all stages.
        lp_solves: Problems solved in this iteration by all workers.
        iteration_seconds: Time of the iteration on this worker.
        elapsed_seconds: Time since the start of the training on this worker.
    """

    worker_id: int
    iteration: int
    iteration_limit: int
    lower_bound: float
    upper_bound_mean: float
    upper_bound_std: float
    gap_percent: float
    cuts_active: int
    lp_solves: int
    iteration_seconds: float
    elapsed_seconds: float

    @classmethod
    def of(cls, item: Iteration, worker_id: int, iteration_limit: int) -> ProgressEvent:
        """Return the event of an iteration that has just ended."""
        return cls(
            worker_id=worker_id,
            iteration=item.iteration,
            iteration_limit=iteration_limit,
            lower_bound=item.lower_bound,
            upper_bound_mean=item.upper_bound_mean,
            upper_bound_std=item.upper_bound_std,
            gap_percent=item.gap_percent,
            cuts_active=item.cuts_active,
            lp_solves=item.lp_solves,
            iteration_seconds=item.total_seconds,
            elapsed_seconds=item.elapsed_seconds,
        )


@dataclass(frozen=True)
class WorkerInfo:
    """What one worker process did.

    Attributes:
        rank: Its rank.
        pid: Its process id, while it ran.
        backend: Name of the communication backend.
        seconds: Wall time of the training, by the clock of rank 0.
        lp_solves: Problems that it solved.
        wait_share: Part of that time, 0 to 1, in which it exchanged data or waited for the others.
    """

    rank: int
    pid: int
    backend: str
    seconds: float
    lp_solves: int
    wait_share: float


class History(np.ndarray[tuple[int], np.dtype[np.void]]):
    """One record per iteration: a numpy structured array, whose fields are those of ``Iteration``.

    ``history["lower_bound"]`` is the series, ``history[-1]`` the last iteration.
    """

    @classmethod
    def of(cls, iterations: Sequence[Iteration]) -> History:
        """Return the records of iterations."""
        described = [(field.name, _DTYPES[str(field.type)]) for field in fields(Iteration)]
        rows = [tuple(getattr(item, name) for name, _ in described) for item in iterations]
        return np.array(rows, dtype=described).view(cls)

    def to_pandas(self) -> Any:
        """Return a pandas ``DataFrame`` with one row per iteration.

        Raises:
            MissingDependency: pandas is not installed.
        """
        pandas = _imported("pandas")
        return pandas.DataFrame({name: np.asarray(self[name]) for name in self._names()})

    def to_arrow(self) -> Any:
        """Return a pyarrow ``Table`` with one row per iteration.

        Raises:
            MissingDependency: pyarrow is not installed.
        """
        arrow = _imported("pyarrow")
        return arrow.table({name: np.asarray(self[name]) for name in self._names()})

    def _names(self) -> tuple[str, ...]:
        return self.dtype.names or ()


def _imported(package: str) -> Any:
    try:
        return import_module(package)
    except ImportError as error:
        raise MissingDependency(
            f"the package {package!r} is not installed",
            context={"package": package},
            suggestion=f"pip install {package}",
        ) from error


class TrainingResult:
    """Result of a training.

    Args:
        details: The trainer's own result.
        workers: What each worker process did; None where no processes were started.

    Attributes:
        case: The case that was trained, with the iteration limit that held.
        iterations: Number of iterations.
        lower_bound: Of the last iteration, in $.
        upper_bound: Mean cost of the last iteration's trajectories, in $.
        upper_bound_std: Their sample standard deviation, in $.
        upper_bound_half_width: Half the width of the mean's 95 % confidence interval, in $.
        gap_percent: Distance of the bounds of the last iteration relative to the upper one.
        converged: Whether the training ended because the lower bound had settled.
        stop_reason: ``iteration_limit``, ``time_limit``, ``bound_stalling`` or ``interrupted``.
        seconds: Wall time of the training.
        lp_solves: Problems solved by all ranks.
        ranks: Number of ranks.
        backend: Name of the communication backend.
        history: One record per iteration.
        policy: The cuts.
        workers: One ``WorkerInfo`` per worker process, by rank, or None.
        details: The trainer's own result, as ``cobre_shm.sddp`` has it.
    """

    def __init__(
        self, details: TrainingDetails, workers: tuple[WorkerInfo, ...] | None = None
    ) -> None:
        last = details.history[-1]
        self.details: TrainingDetails = details
        self.workers: tuple[WorkerInfo, ...] | None = workers
        self.case: Case = details.case
        self.iterations: int = details.iterations
        self.lower_bound: float = last.lower_bound
        self.upper_bound: float = last.upper_bound_mean
        self.upper_bound_std: float = last.upper_bound_std
        self.upper_bound_half_width: float = last.half_width
        self.gap_percent: float = last.gap_percent
        self.converged: bool = details.converged
        self.stop_reason: str = details.stop_reason
        self.seconds: float = details.seconds
        self.lp_solves: int = details.lp_solves
        self.ranks: int = details.ranks
        self.backend: str = details.backend
        self.history: History = History.of(details.history)
        self.policy: Policy = Policy.of(details)

    def __repr__(self) -> str:
        lines = [f"TrainingResult of case {self.case.name}"]
        lines += [f"  {name:<12}{value}" for name, value in self._rows()]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th style='text-align:left'>{name}</th>"
            f"<td style='text-align:left'>{html.escape(value)}</td></tr>"
            for name, value in self._rows()
        )
        title = html.escape(self.case.name)
        return f"<div><b>Training of {title}</b><table>{rows}</table>{self._chart()}</div>"

    def _rows(self) -> list[tuple[str, str]]:
        half_width = f"{self.upper_bound_half_width:,.2f}"
        ranks = "1 rank" if self.ranks == 1 else f"{self.ranks} ranks"
        rows = [
            ("stopped", f"after {self.iterations} iterations: {self.stop_reason}"),
            ("lower bound", f"{self.lower_bound:,.2f} $"),
            ("upper bound", f"{self.upper_bound:,.2f} $ ± {half_width} (95 %)"),
            ("gap", f"{self.gap_percent:.2f} %"),
            ("cuts", f"{sum(len(cuts) for cuts in self.details.cuts)}"),
            ("time", f"{self.seconds:.2f} s, {self.lp_solves} LPs, {ranks} ({self.backend})"),
        ]
        if self.workers:
            shares = ", ".join(f"{100 * worker.wait_share:.0f} %" for worker in self.workers)
            rows.append(("waiting", f"{shares} of the time, by rank"))
        return rows

    def _chart(self) -> str:
        """The bounds over the iterations as SVG; the scale is that of the lower bound's range."""
        lower, upper = self.history["lower_bound"], self.history["upper_bound_mean"]
        low, high = float(lower.min()), float(max(lower.max(), np.median(upper)))
        if self.iterations < 2 or not high > low:
            return ""
        width, height = 420.0, 120.0
        x = np.linspace(0.0, width, self.iterations)

        def line(values: npt.NDArray[np.float64], colour: str) -> str:
            y = height - np.clip((values - low) / (high - low), -0.1, 1.1) * height
            points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
            return f"<polyline fill='none' stroke='{colour}' stroke-width='1.5' points='{points}'/>"

        return (
            f"<svg viewBox='-5 -15 {width + 10:g} {height + 30:g}' width='{width:g}'>"
            f"{line(upper, '#c55a11')}{line(lower, '#1f4e79')}</svg>"
            "<div><span style='color:#1f4e79'>lower bound</span>, "
            "<span style='color:#c55a11'>upper bound (mean of each iteration)</span>, "
            f"iterations 1 to {self.iterations}</div>"
        )


def worker_infos(details: TrainingDetails, pids: Sequence[int]) -> tuple[WorkerInfo, ...]:
    """Return what each worker did."""
    waits = [TIMING_COLUMNS.index(name) for name in _WAITS]
    solves = TIMING_COLUMNS.index("lp_solves")
    return tuple(
        WorkerInfo(
            rank=rank,
            pid=pid,
            backend=details.backend,
            seconds=details.seconds,
            lp_solves=int(timing[:, solves].sum()),
            wait_share=min(1.0, float(timing[:, waits].sum()) / 1e3 / details.seconds),
        )
        for rank, (pid, timing) in enumerate(zip(pids, details.timing, strict=True))
    )
