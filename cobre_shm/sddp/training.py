"""Stochastic dual dynamic programming over the ranks of a communicator.

Every iteration runs trajectories forward, adds one cut per trajectory and stage backward, and
evaluates the lower bound (M. V. F. Pereira, L. M. V. G. Pinto, Mathematical Programming 52,
1991). The ranks share the trajectories; whatever is summed over trajectories is gathered first
and summed in trajectory order on every rank. Together with the chain rule of the solver this
makes every result equal, bit for bit, for any number of ranks.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from cobre_shm.communicator import Communicator
from cobre_shm.datatypes import ReduceOp
from cobre_shm.sddp.case import Case, share_case, with_iterations
from cobre_shm.sddp.checkpoint import (
    Checkpoint,
    decode,
    encode,
    read_checkpoint,
    refusal,
    write_checkpoint,
)
from cobre_shm.sddp.distribution import Shares, gather_items
from cobre_shm.sddp.errors import CheckpointError
from cobre_shm.sddp.failed_problem import ProblemWriter
from cobre_shm.sddp.passes import Passes
from cobre_shm.sddp.sharing import on_rank_zero
from cobre_shm.sddp.solver import Check, StageSolver, Statuses
from cobre_shm.sddp.stopping import stop_reason
from cobre_shm.sddp.training_files import INTERRUPTED, TrainingFiles, training_files
from cobre_shm.sddp.training_result import TIMING_COLUMNS, Iteration, TrainingDetails
from cobre_shm.sddp.warm_start import Floats, share_policy

# The number of the reason to end, as rank 0 shares it.
_VERDICT = np.dtype(np.float64)
_REASONS = ("", "iteration_limit", "time_limit", "bound_stalling")

Progress = Callable[[Iteration], None]


def train(
    case: Case | str | Path,
    comm: Communicator,
    *,
    iterations: int | None = None,
    output_dir: str | Path | None = None,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] | None = None,
    checkpoint_every: int | None = None,
    resume: bool | None = None,
    warm_start: str | Path | None = None,
    check: Check | None = None,
) -> TrainingDetails:
    """Train a policy. Collective: every rank calls it with equal arguments.

    Args:
        case: The case, equal on every rank, or a case directory that rank 0 can read.
        comm: The communicator; it stays open.
        iterations: Replaces the iteration limit of the case.
        output_dir: Where rank 0 writes the result; None writes nothing.
        progress: Called after every iteration, on each rank that gives it.
        should_stop: Asked on every rank after every iteration; if any rank's answer is true,
            all end after that iteration with the reason ``interrupted``.
        checkpoint_every: Write a checkpoint below ``output_dir`` after every so many
            iterations; by default what the case asks for. One is also written where the
            training was interrupted, and where it ended if the case or this asks for any.
        resume: Go on from the checkpoint below ``output_dir``, to the same bits as without a
            pause and on any number of ranks; where there is none, begin. None does what the
            case asks for.
        warm_start: A policy directory with cuts to begin with; by default what the case asks
            for. A training that resumes has its cuts already.
        check: Called on this rank before every problem that it solves. What it raises ends
            the training here and at once; the other ranks learn of it when this one's
            communicator is closed.

    Raises:
        CaseError: The case directory cannot be used; on every rank.
        CheckpointError: The checkpoint or the policy is damaged or of another case; on every
            rank.
        OutputError: ``output_dir`` cannot be used; on every rank, before the training starts.
        SolverError: A stage problem has no solution; on every rank. With an ``output_dir``, the
            problem is in a file there.
        AllocationFailed: There is no memory for as many trajectories.
        IncompatibleSettings: Checkpoints are asked for without ``output_dir``, here or by
            ``policy.mode`` of the case.
        ValueError: A number is below 1.
    """
    for name, value in (("iterations", iterations), ("checkpoint_every", checkpoint_every)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    if not isinstance(case, Case):
        case = share_case(case, comm)
    if iterations is not None:
        case = with_iterations(case, iterations)
    files = training_files(case.config, output_dir, checkpoint_every, resume, warm_start)
    if output_dir is not None:
        from cobre_shm.sddp.results import prepare_output, write_training

        prepare_output(output_dir, comm)
    trainer = _Trainer(case, comm, files, check)
    trainer.resume()
    result = trainer.run(progress, should_stop)
    if output_dir is not None:
        on_rank_zero(lambda: write_training(result, Path(output_dir)), comm)
    return result


class _Trainer:
    def __init__(
        self, case: Case, comm: Communicator, files: TrainingFiles, check: Check | None
    ) -> None:
        self.case, self.comm, self.files = case, comm, files
        directory = files.directory
        writer = None if directory is None else ProblemWriter(case, directory / "failed")
        self.passes = Passes(case, comm, writer, check)
        self.history: list[Iteration] = []
        self.timing: list[list[float]] = []
        self.retries = 0

    def resume(self) -> None:
        """Take over what an earlier training found, if there is one. Collective."""
        if self.files.resume_from is not None:
            path = self.files.resume_from
            data = on_rank_zero(lambda: read_checkpoint(path, self.case), self.comm)
            if data:
                saved = decode(data, self.case.digest, self.case.stages, path)
                self._check_beginning(saved, path)
                self._restore(saved)
                return
        if self.files.warm_start is not None:
            self.passes.begin_with(self._given(self.files.warm_start))

    def _given(self, directory: Path) -> list[Floats]:
        """Return the cuts of a policy as the problems take them, in scaled $. Collective."""
        policy = share_policy(directory, self.case, self.comm)
        return [cuts / self.passes.scale for cuts in policy]

    def _check_beginning(self, saved: Checkpoint, path: Path) -> None:
        """Refuse a checkpoint that began with other cuts than those asked for. Collective."""
        directory = self.files.warm_start
        if directory is None:
            return

        def is_its_own() -> bytes:
            folders = [os.path.realpath(folder) for folder in (directory, path.parent)]
            return b"yes" if folders[0] == folders[1] else b""

        # A training that begins with the policy in its output directory puts its own there.
        if on_rank_zero(is_its_own, self.comm):
            return
        try:
            given = self._given(directory)
        except CheckpointError:
            # It is gone since, and not needed any more.
            return
        if not all(map(np.array_equal, given, saved.given)):
            raise refusal(
                path,
                f"it began with other cuts than those in {str(directory)!r}; without a warm start "
                "it goes on with its own",
            )

    def run(
        self, progress: Progress | None, should_stop: Callable[[], bool] | None
    ) -> TrainingDetails:
        start = time.perf_counter()
        reason = ""
        if self.history:
            start -= self.history[-1].elapsed_seconds
            reason = self._decide([item.lower_bound for item in self.history], start)
        while not reason:
            reason = self._iterate(start, should_stop)
            if progress is not None:
                progress(self.history[-1])
            self._save(reason)
        seconds = time.perf_counter() - start
        timing = self.comm.allgatherv(np.array(self.timing, dtype=np.float64).reshape(-1))
        history = self.history
        return TrainingDetails(
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
            cuts=self.passes.pool.policy(self.passes.scale),
            history=tuple(history),
            timing=timing.reshape(self.comm.size, len(history), len(TIMING_COLUMNS)),
            ranks=self.comm.size,
            backend=self.comm.backend,
            tree=tuple(self.passes.tree),
        )

    def _decide(self, bounds: Sequence[float], start: float) -> str:
        """Return why the training ends after these lower bounds, or nothing. Collective."""
        verdict = np.zeros(1, dtype=_VERDICT)
        if self.comm.rank == 0:
            reason = stop_reason(self.case.config, bounds, time.perf_counter() - start)
            verdict[0] = _REASONS.index(reason or "")
        self.comm.broadcast(verdict, root=0)
        return _REASONS[int(verdict[0])]

    def _save(self, reason: str) -> None:
        """Write a checkpoint if one is due. Collective."""
        path = self.files.checkpoint
        if path is None or not self.files.writes_checkpoint(len(self.history), reason):
            return
        make = self._checkpoint()
        on_rank_zero(lambda: write_checkpoint(path, encode(make(), self.case.digest)), self.comm)

    def _checkpoint(self) -> Callable[[], Checkpoint]:
        """Gather what the ranks know; return how rank 0 makes a checkpoint of it. Collective."""
        bases = self._gather_bases(self.passes.solvers, self.passes.shares)
        bound_bases = self._gather_bases([self.passes.bound_solver], self.passes.bound_shares)
        timing = self.comm.allgatherv(np.array(self.timing, dtype=np.float64).reshape(-1))

        def make() -> Checkpoint:
            return Checkpoint(
                history=tuple(self.history),
                retries=self.retries,
                given=self.passes.pool.given,
                cuts=tuple(self.passes.pool.made(t) for t in range(self.case.stages)),
                bases=bases,
                bound_bases=bound_bases,
                timing=timing.reshape(self.comm.size, len(self.history), len(TIMING_COLUMNS)),
            )

        return make

    def _gather_bases(self, solvers: Sequence[StageSolver], shares: Shares) -> Statuses:
        """Return the bases of all chains, those of one item in a row. Collective."""
        local = np.zeros((len(shares.mine), sum(s.basis_size for s in solvers)), dtype=np.int8)
        for i in range(len(local)):
            local[i] = np.concatenate([solver.basis(i) for solver in solvers])
        return gather_items(local, shares, self.comm)

    def _restore(self, saved: Checkpoint) -> None:
        self.passes.begin_with(saved.given)
        passes = self.case.config.forward_passes
        for t, cuts in enumerate(saved.cuts):
            # In the batches in which they came, so that the problem grows in the same way.
            for k in range(len(cuts) // passes):
                batch = cuts[k * passes : (k + 1) * passes]
                self.passes.add(t, k + 1, batch)
        for solvers, shares, bases in (
            (self.passes.solvers, self.passes.shares, saved.bases),
            ([self.passes.bound_solver], self.passes.bound_shares, saved.bound_bases),
        ):
            ends = np.cumsum([solver.basis_size for solver in solvers])
            for i, item in enumerate(shares.mine):
                for solver, part in zip(solvers, np.split(bases[item], ends[:-1]), strict=True):
                    solver.restore_basis(i, part)
        self.history = list(saved.history)
        self.retries = saved.retries
        known = saved.timing[self.comm.rank : self.comm.rank + 1]
        # A rank that was not there has spent nothing.
        self.timing = (known[0] if len(known) else np.zeros_like(saved.timing[0])).tolist()

    def _iterate(self, start: float, should_stop: Callable[[], bool] | None) -> str:
        iteration = len(self.history) + 1
        gathers = (self.passes.trials, self.passes.found, self.passes.bounds)
        before = [(gather.seconds, gather.nbytes) for gather in gathers]
        solves_before, retries_before = self.passes.counters()
        clock = [time.perf_counter()]
        mean, std = self.passes.forward(iteration)
        clock.append(time.perf_counter())
        self.passes.backward(iteration)
        clock.append(time.perf_counter())
        lower = self.passes.lower_bound(iteration)
        clock.append(time.perf_counter())
        reason = self._decide([*(item.lower_bound for item in self.history), lower], start)
        clock.append(time.perf_counter())

        waits = [
            (gather.seconds - seconds, gather.nbytes - nbytes)
            for gather, (seconds, nbytes) in zip(gathers, before, strict=True)
        ]
        waited = clock[4] - clock[3] + sum(seconds for seconds, _ in waits)
        solves, retries = self.passes.counters()
        counts = np.array(
            # Nanoseconds: whole numbers have one sum in any order.
            [solves - solves_before, retries - retries_before, round(1e9 * waited)],
            dtype=np.int64,
        )
        counts_all = self.comm.allreduce(counts, op=ReduceOp.SUM)
        interrupted = should_stop is not None and should_stop()
        peaks = np.array([clock[1] - clock[0], clock[2] - clock[1], float(interrupted)])
        peaks_all = self.comm.allreduce(peaks, op=ReduceOp.MAX)
        clock.append(time.perf_counter())

        self.timing.append(
            [
                1e3 * (clock[1] - clock[0] - waits[0][0]),
                1e3 * (clock[2] - clock[1] - waits[1][0]),
                1e3 * (clock[3] - clock[2] - waits[2][0]),
                *(value for wait, nbytes in waits[:2] for value in (1e3 * wait, nbytes)),
                # Sharing the bound is its exchange and rank 0's word whether to go on.
                1e3 * (clock[4] - clock[3] + waits[2][0]),
                waits[2][1] + _VERDICT.itemsize,
                1e3 * (clock[5] - clock[4]),
                counts.nbytes + peaks.nbytes,
                float(counts[0]),
            ]
        )
        self.retries += int(counts_all[1])
        added = self.case.config.forward_passes * (self.case.stages - 1)
        self.history.append(
            Iteration(
                iteration=iteration,
                lower_bound=lower,
                upper_bound_mean=mean,
                upper_bound_std=std,
                gap_percent=100.0 * (mean - lower) / max(1.0, abs(mean)),
                cuts_added=added,
                cuts_active=added * iteration + sum(len(cuts) for cuts in self.passes.pool.given),
                lp_solves=int(counts_all[0]),
                forward_seconds=float(peaks_all[0]),
                backward_seconds=float(peaks_all[1]),
                total_seconds=clock[5] - clock[0],
                elapsed_seconds=clock[5] - start,
                forward_passes=self.case.config.forward_passes,
                wait_share=1e-9 * int(counts_all[2]) / (self.comm.size * (clock[4] - clock[0])),
            )
        )
        return reason or (INTERRUPTED if peaks_all[2] else "")
