"""Cuts: how the openings at a trial point become one, and the policy that they form.

A cut bounds the future cost of a stage from below by an affine function of the next state
(M. V. F. Pereira, L. M. V. G. Pinto, "Multi-stage stochastic optimization applied to energy
planning", Mathematical Programming 52, 1991). With the risk measure of the stage as weights the
same formula covers the expectation and CVaR.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cobre_shm.sddp.stages import RiskMeasure

Floats = npt.NDArray[np.float64]


def ordered_sum(terms: Floats) -> Floats:
    """Return the sum over the first axis, strictly in order, so that it has one result."""
    total: Floats = np.add.accumulate(terms, axis=0)[-1]
    return total


def opening_weights(values: Floats, risk: RiskMeasure | None) -> Floats:
    """Return the weight of each opening under a risk measure.

    Args:
        values: float64, the optimal cost of each opening.
        risk: The risk measure; None is the expectation.

    Returns:
        float64, non-negative, sum 1 up to rounding.
    """
    count = len(values)
    if risk is None:
        return np.full(count, 1.0 / count)
    limit = (1.0 - risk.weight) / count + risk.weight / (count * risk.tail)
    weights = np.zeros(count)
    rest = 1.0
    for i in np.argsort(-values, kind="stable"):
        weights[i] = min(limit, rest)
        rest -= weights[i]
    return weights


def average_cut(
    values: Floats, slopes: Floats, state: Floats, risk: RiskMeasure | None
) -> tuple[float, Floats]:
    """Return intercept and coefficients of the cut that a trial point gives.

    Args:
        values: float64, the optimal cost of each opening.
        slopes: float64, (openings, state components), its derivatives.
        state: float64, the trial point.
        risk: Risk measure of the stage that receives the cut.
    """
    weights = opening_weights(values, risk)
    intercepts = values
    if state.size:
        intercepts = values - ordered_sum((slopes * state).T)
    intercept = float(ordered_sum(weights * intercepts))
    return intercept, ordered_sum(weights[:, None] * slopes)


@dataclass(frozen=True)
class StageCuts:
    """The cuts of one stage in the order they were made.

    Attributes:
        intercept: float64, one per cut, in $.
        coefficients: float64, (cuts, state components), in $ per unit of the component.
        iteration: int64, the iteration that made the cut, from 1.
        scenario: int64, the trajectory whose state the cut was made at.
    """

    intercept: Floats
    coefficients: Floats
    iteration: npt.NDArray[np.int64]
    scenario: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.intercept)


class CutPool:
    """Collects the cuts of all stages in scaled $, one batch per stage and iteration."""

    def __init__(self, stages: int, forward_passes: int, state_size: int) -> None:
        self._passes = forward_passes
        self._width = state_size
        self._batches: list[list[tuple[int, Floats]]] = [[] for _ in range(stages)]

    def add(self, t: int, iteration: int, batch: Floats) -> None:
        """Take ``batch``, which nobody may change any more: (cuts, 1 + state components)."""
        self._batches[t].append((iteration, batch))

    def policy(self, scale: float) -> tuple[StageCuts, ...]:
        """Return the cuts of every stage in $."""
        return tuple(self._stage(batches, scale) for batches in self._batches)

    def _stage(self, batches: list[tuple[int, Floats]], scale: float) -> StageCuts:
        values = (
            np.concatenate([batch for _, batch in batches]) * scale
            if batches
            else np.zeros((0, 1 + self._width))
        )
        iterations = np.array([iteration for iteration, _ in batches], dtype=np.int64)
        return StageCuts(
            intercept=values[:, 0].copy(),
            coefficients=values[:, 1:].copy(),
            iteration=np.repeat(iterations, self._passes),
            scenario=np.tile(np.arange(self._passes, dtype=np.int64), len(batches)),
        )
