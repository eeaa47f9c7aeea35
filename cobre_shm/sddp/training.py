"""Stochastic dual dynamic programming over the ranks of a communicator.

Every iteration runs trajectories forward, adds one cut per trajectory and stage backward, and
evaluates the lower bound (M. V. F. Pereira, L. M. V. G. Pinto, Mathematical Programming 52,
1991). The ranks share the trajectories; whatever is summed over trajectories is gathered first
and summed in trajectory order on every rank. Together with the chain rule of the solver this
makes every result equal, bit for bit, for any number of ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cobre_shm.communicator import Communicator
from cobre_shm.datatypes import ReduceOp
from cobre_shm.sddp.case import Case, share_case, with_iterations
from cobre_shm.sddp.cut_store import CutStore
from cobre_shm.sddp.cuts import CutPool, average_cut, opening_weights, ordered_sum
from cobre_shm.sddp.distribution import ItemGather, Shares
from cobre_shm.sddp.errors import SolverError
from cobre_shm.sddp.node_arrays import NodeArrays
from cobre_shm.sddp.noise_bounds import noise_bounds
from cobre_shm.sddp.scenarios import draw_opening
from cobre_shm.sddp.sharing import on_rank_zero, share_failure
from cobre_shm.sddp.solver import StageSolver
from cobre_shm.sddp.stage_lp import build_stage, cost_scale
from cobre_shm.sddp.stopping import stop_reason
from cobre_shm.sddp.training_result import (
    TIMING_COLUMNS,
    Iteration,
    TrainingResult,
    mean_and_std,
)

Floats = npt.NDArray[np.float64]

_REASONS = ("", "iteration_limit", "time_limit", "bound_stalling")
_INTERRUPTED = "interrupted"

Progress = Callable[[Iteration], None]


def train(
    case: Case | str | Path,
    comm: Communicator,
    *,
    iterations: int | None = None,
    output_dir: str | Path | None = None,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> TrainingResult:
    """Train a policy. Collective: every rank calls it with equal arguments.

    Args:
        case: The case, equal on every rank, or a case directory that rank 0 can read.
        comm: The communicator; it stays open.
        iterations: Replaces the iteration limit of the case.
        output_dir: Where rank 0 writes the result; None writes nothing.
        progress: Called on rank 0 after every iteration.
        should_stop: Asked on every rank after every iteration; if any rank's answer is true,
            all end after that iteration with the reason ``interrupted``.

    Raises:
        CaseError: The case directory cannot be used; on every rank.
        OutputError: ``output_dir`` cannot be used; on every rank, before the training starts.
        SolverError: A stage problem has no solution; on every rank.
        ValueError: ``iterations`` is below 1.
    """
    if iterations is not None and iterations < 1:
        raise ValueError(f"iterations must be at least 1, not {iterations}")
    if not isinstance(case, Case):
        case = share_case(case, comm)
    if iterations is not None:
        case = with_iterations(case, iterations)
    if output_dir is not None:
        from cobre_shm.sddp.results import prepare_output, write_training

        prepare_output(output_dir, comm)
    result = _Trainer(case, comm).run(progress, should_stop)
    if output_dir is not None:
        on_rank_zero(lambda: write_training(result, Path(output_dir)), comm)
    return result


class _Trainer:
    def __init__(self, case: Case, comm: Communicator) -> None:
        self.case, self.comm = case, comm
        horizon = case.horizon
        passes, self.state_size = case.config.forward_passes, case.state_size
        self.scale = cost_scale(case)
        node = NodeArrays(comm)
        self.tree = node.opening_tree(case)
        lps = [build_stage(case, t, self.scale) for t in range(case.stages)]
        self.solvers = [
            StageSolver(lp, node.noise_bounds(case, lp, noise))
            for lp, noise in zip(lps, self.tree, strict=True)
        ]
        self.bound_solver = (
            StageSolver(lps[0], noise_bounds(case, lps[0], self.tree[0], mean_load=True))
            if comm.rank == 0
            else None
        )
        self.discounts = np.cumprod([1.0, *(stage.discount for stage in horizon.stages[:-1])])
        self.shares = Shares(passes, comm)
        self.trials = ItemGather(self.shares, case.stages * self.state_size + 1, comm)
        self.found = ItemGather(self.shares, 1 + self.state_size, comm)
        self.pool = CutPool(case.stages, passes, self.state_size)
        self.store = CutStore(comm, 1 + self.state_size)
        self.history: list[Iteration] = []
        self.timing: list[list[float]] = []
        self.retries = 0

    def run(
        self, progress: Progress | None, should_stop: Callable[[], bool] | None
    ) -> TrainingResult:
        start = time.perf_counter()
        reason = ""
        while not reason:
            reason = self._iterate(start, should_stop)
            if progress is not None and self.comm.rank == 0:
                progress(self.history[-1])
        seconds = time.perf_counter() - start
        timing = self.comm.allgatherv(np.array(self.timing, dtype=np.float64).reshape(-1))
        history = self.history
        return TrainingResult(
            case=self.case,
            iterations=len(history),
            lower_bound=np.array([item.lower_bound for item in history]),
            upper_bound_mean=np.array([item.upper_bound_mean for item in history]),
            upper_bound_std=np.array([item.upper_bound_std for item in history]),
            gap_percent=np.array([item.gap_percent for item in history]),
            converged=reason == "bound_stalling",
            stop_reason=reason,
            seconds=seconds,
            lp_solves=sum(item.lp_solves for item in history),
            lp_retries=self.retries,
            cuts=self.pool.policy(self.scale),
            history=tuple(history),
            timing=timing.reshape(self.comm.size, len(history), len(TIMING_COLUMNS)),
            ranks=self.comm.size,
            backend=self.comm.backend,
            tree=tuple(self.tree),
        )

    def _iterate(self, start: float, should_stop: Callable[[], bool] | None) -> str:
        iteration = len(self.history) + 1
        gathers = (self.trials, self.found)
        before = [(gather.seconds, gather.nbytes) for gather in gathers]
        solves_before, retries_before = self._counters()
        clock = [time.perf_counter()]
        mean, std = self._forward(iteration)
        clock.append(time.perf_counter())
        self._backward(iteration)
        clock.append(time.perf_counter())
        verdict, failure = self._judge(iteration, start)
        clock.append(time.perf_counter())
        self.comm.broadcast(verdict, root=0)
        clock.append(time.perf_counter())
        if np.isnan(verdict[0]):
            share_failure(failure.to_dict() if failure else {}, self.comm)

        solves, retries = self._counters()
        counts = np.array([solves - solves_before, retries - retries_before], dtype=np.int64)
        counts_all = self.comm.allreduce(counts, op=ReduceOp.SUM)
        interrupted = should_stop is not None and should_stop()
        peaks = np.array([clock[1] - clock[0], clock[2] - clock[1], float(interrupted)])
        peaks_all = self.comm.allreduce(peaks, op=ReduceOp.MAX)
        clock.append(time.perf_counter())

        waits = [
            (gather.seconds - seconds, gather.nbytes - nbytes)
            for gather, (seconds, nbytes) in zip(gathers, before, strict=True)
        ]
        self.timing.append(
            [
                1e3 * (clock[1] - clock[0] - waits[0][0]),
                1e3 * (clock[2] - clock[1] - waits[1][0]),
                1e3 * (clock[3] - clock[2]),
                *(value for wait, nbytes in waits for value in (1e3 * wait, nbytes)),
                1e3 * (clock[4] - clock[3]),
                verdict.nbytes,
                1e3 * (clock[5] - clock[4]),
                counts.nbytes + peaks.nbytes,
                float(counts[0]),
            ]
        )
        self.retries += int(counts_all[1])
        lower = float(verdict[0])
        added = self.case.config.forward_passes * (self.case.stages - 1)
        self.history.append(
            Iteration(
                iteration=iteration,
                lower_bound=lower,
                upper_bound_mean=mean,
                upper_bound_std=std,
                gap_percent=100.0 * (mean - lower) / max(1.0, abs(mean)),
                cuts_added=added,
                cuts_active=added * iteration,
                lp_solves=int(counts_all[0]),
                forward_seconds=float(peaks_all[0]),
                backward_seconds=float(peaks_all[1]),
                total_seconds=clock[5] - clock[0],
                elapsed_seconds=clock[5] - start,
                forward_passes=self.case.config.forward_passes,
            )
        )
        return _REASONS[int(verdict[1])] or (_INTERRUPTED if peaks_all[2] else "")

    def _judge(self, iteration: int, start: float) -> tuple[Floats, SolverError | None]:
        """Return lower bound and stop reason on rank 0; NaN where there is an error instead."""
        verdict = np.zeros(2)
        if self.comm.rank == 0:
            try:
                verdict[0] = self._lower_bound(iteration)
            except SolverError as error:
                verdict[0] = np.nan
                return verdict, error
            bounds = [*(item.lower_bound for item in self.history), float(verdict[0])]
            reason = stop_reason(self.case.config, bounds, time.perf_counter() - start)
            verdict[1] = _REASONS.index(reason or "")
        return verdict, None

    def _counters(self) -> tuple[int, int]:
        solvers = [*self.solvers, *([self.bound_solver] if self.bound_solver else [])]
        return sum(s.solves for s in solvers), sum(s.retries for s in solvers)

    def _forward(self, iteration: int) -> tuple[float, float]:
        """Run this rank's trajectories; return mean and deviation of all trajectory costs."""
        failure = None
        try:
            self._run_trajectories(iteration)
        except SolverError as error:
            failure = error
        return mean_and_std(self.trials.gather(failure)[:, -1])

    def _run_trajectories(self, iteration: int) -> None:
        size, config = self.state_size, self.case.config
        for i, scenario in enumerate(self.shares.mine):
            row = self.trials.local[i]
            state, cost = self.case.initial_state, 0.0
            for t, solver in enumerate(self.solvers):
                opening = draw_opening(config.tree_seed, iteration, scenario, t, len(self.tree[t]))
                solver.begin(state, i)
                objective = solver.solve(opening, (iteration, scenario))
                values, theta = solver.next_state()
                cost += self.discounts[t] * (objective - solver.lp.discount * theta) * self.scale
                state = row[t * size : (t + 1) * size]
                state[:] = values
            row[-1] = cost

    def _backward(self, iteration: int) -> None:
        for t in range(self.case.stages - 2, -1, -1):
            failure = None
            try:
                self._find_cuts(t, iteration)
            except SolverError as error:
                failure = error
            batch = self.found.gather(failure)
            self.pool.add(t, iteration, self.store.keep(batch))
            self.solvers[t].add_cuts(batch[:, 0].copy(), batch[:, 1:])
            if t == 0 and self.bound_solver is not None:
                self.bound_solver.add_cuts(batch[:, 0].copy(), batch[:, 1:])

    def _find_cuts(self, t: int, iteration: int) -> None:
        """Find the cut of stage ``t`` at each trial point of this rank."""
        size, solver, openings = self.state_size, self.solvers[t + 1], len(self.tree[t + 1])
        values, slopes = np.empty(openings), np.empty((openings, size))
        risk = self.case.horizon.stages[t].risk
        for i, scenario in enumerate(self.shares.mine):
            state = self.trials.local[i, t * size : (t + 1) * size]
            solver.begin(state, i)
            for opening in range(openings):
                values[opening] = solver.solve(opening, (iteration, scenario))
                slopes[opening] = solver.state_duals()
            cut = self.found.local[i]
            cut[0], cut[1:] = average_cut(values, slopes, state, risk)

    def _lower_bound(self, iteration: int) -> float:
        """Evaluate the first stage over all its openings; rank 0 only."""
        solver, openings = self.bound_solver, len(self.tree[0])
        assert solver is not None
        solver.begin(self.case.initial_state, 0)
        values = np.array([solver.solve(w, (iteration, 0)) for w in range(openings)])
        weights = opening_weights(values, self.case.horizon.stages[0].risk)
        return float(ordered_sum(weights * values) * self.scale)
