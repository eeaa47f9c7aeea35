"""What a training found out, in one form for every number of ranks."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cobre_shm.sddp.case import Case
from cobre_shm.sddp.cuts import StageCuts

Floats = npt.NDArray[np.float64]

# 97.5 % quantile of the normal distribution, as rounded by the reference program.
CONFIDENCE = 1.96

TIMING_COLUMNS = (
    "forward_ms",
    "backward_ms",
    "bound_ms",
    "gather_states_ms",
    "gather_states_bytes",
    "gather_cuts_ms",
    "gather_cuts_bytes",
    "share_bound_ms",
    "share_bound_bytes",
    "share_counters_ms",
    "share_counters_bytes",
    "lp_solves",
)


@dataclass(frozen=True)
class Iteration:
    """What is known after one iteration; costs in $.

    Attributes:
        iteration: Number of the iteration, from 1.
        lower_bound: Bound of the expected (or risk-adjusted) cost.
        upper_bound_mean: Mean cost of the iteration's trajectories.
        upper_bound_std: Their sample standard deviation; 0 for one trajectory.
        gap_percent: Distance of the bounds relative to the upper one.
        cuts_added: Cuts that the iteration added, over all stages.
        cuts_active: Cuts in the problems after the iteration.
        lp_solves: Problems solved in this iteration by all ranks.
        forward_seconds: Time of the forward pass on the slowest rank.
        backward_seconds: Time of the backward pass on the slowest rank.
        total_seconds: Time of the iteration on this rank.
        elapsed_seconds: Time since the start of the training on this rank.
        forward_passes: Trajectories of the iteration.
        wait_share: Part of the ranks' time, 0 to 1, that went into exchanging and waiting.
    """

    iteration: int
    lower_bound: float
    upper_bound_mean: float
    upper_bound_std: float
    gap_percent: float
    cuts_added: int
    cuts_active: int
    lp_solves: int
    forward_seconds: float
    backward_seconds: float
    total_seconds: float
    elapsed_seconds: float
    forward_passes: int
    wait_share: float = 0.0

    @property
    def half_width(self) -> float:
        """Half the width of the 95 % confidence interval of the mean."""
        return float(CONFIDENCE * self.upper_bound_std / np.sqrt(self.forward_passes))


@dataclass(frozen=True)
class TrainingDetails:
    """All that the trainer knows of a training, equal on every rank except for times.

    Attributes:
        case: The case that was trained, with the iteration limit that held.
        iterations: Number of iterations.
        lower_bound: float64, one per iteration, in $.
        upper_bound_mean: float64, one per iteration, in $.
        upper_bound_std: float64, one per iteration, in $.
        gap_percent: float64, one per iteration.
        converged: Whether the training ended because the lower bound had settled.
        stop_reason: ``iteration_limit``, ``time_limit``, ``bound_stalling`` or ``interrupted``.
        seconds: Wall time of the training.
        lp_solves: Problems solved by all ranks.
        lp_retries: Problems that HiGHS needed more than one attempt for.
        cuts: Cuts of each stage; the last stage has none.
        history: Every iteration.
        timing: float64, (ranks, iterations, len(TIMING_COLUMNS)): what each rank spent.
        ranks: Number of ranks.
        backend: Name of the communication backend.
        tree: float64 per stage, (openings, components): the noise of the opening tree.
    """

    case: Case
    iterations: int
    lower_bound: Floats
    upper_bound_mean: Floats
    upper_bound_std: Floats
    gap_percent: Floats
    converged: bool
    stop_reason: str
    seconds: float
    lp_solves: int
    lp_retries: int
    cuts: tuple[StageCuts, ...]
    history: tuple[Iteration, ...]
    timing: Floats
    ranks: int
    backend: str
    tree: tuple[Floats, ...]

    def __repr__(self) -> str:
        # All of it would be hundreds of thousands of characters.
        bound = f"lower bound {self.lower_bound[-1]:,.2f} $, " if self.iterations else ""
        return (
            f"<TrainingDetails of case {self.case.name}: iterations {self.iterations} "
            f"({self.stop_reason}), {bound}cuts {sum(len(cuts) for cuts in self.cuts)}>"
        )


def series_digest(result: TrainingDetails) -> str:
    """Return a hash over the bytes of every bound and every cut.

    Two results have the same digest only if they agree in every bit, whatever the number of
    ranks and the backend that computed them.
    """
    digest = hashlib.sha256()
    for series in (result.lower_bound, result.upper_bound_mean, result.upper_bound_std):
        digest.update(series.tobytes())
    for cuts in result.cuts:
        digest.update(cuts.intercept.tobytes())
        digest.update(cuts.coefficients.tobytes())
    return digest.hexdigest()


def mean_and_std(values: Floats) -> tuple[float, float]:
    """Return mean and sample standard deviation by Welford's recurrence, in index order."""
    mean, squares = 0.0, 0.0
    for i, value in enumerate(values.tolist(), start=1):
        delta = value - mean
        mean += delta / i
        squares += delta * (value - mean)
    return mean, float(np.sqrt(squares / (len(values) - 1))) if len(values) > 1 else 0.0
