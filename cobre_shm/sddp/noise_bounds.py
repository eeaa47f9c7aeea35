"""From noise vectors to the bounds of the columns that carry noise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cobre_shm.sddp.case import Case
from cobre_shm.sddp.layout import StageLp
from cobre_shm.sddp.scenarios import InflowModel

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class NoiseBounds:
    """Bounds of the noise columns of one stage for every opening.

    Attributes:
        lower: float64, (openings, noise columns).
        upper: float64, same shape; the same array where no column has a range. Inflows come
            first, one column per hydro plant.
        inflow_noise: float64, (openings, hydro plants): the deviates behind the inflows, if
            negative inflow has to be cut off by state; otherwise None.
    """

    lower: Floats
    upper: Floats
    inflow_noise: Floats | None


def noise_bounds(case: Case, lp: StageLp, noise: Floats, *, mean_load: bool = False) -> NoiseBounds:
    """Return the bounds that the noise vectors of a stage impose.

    Args:
        case: The case.
        lp: The stage problem.
        noise: float64, (openings, components).
        mean_load: Take the mean for every load. The lower bound is evaluated so by the
            reference program, whose figures are the ones to match.
    """
    hydros, t = len(case.hydros), lp.index
    statistics, overrides = case.statistics, case.overrides
    eta = np.ascontiguousarray(noise[:, :hydros])
    inflow = lp.inflow.base + lp.inflow.sigma * eta
    lower, upper = [inflow], [inflow]
    component = hydros
    ones = (1.0,) * len(lp.hours)
    for bus in statistics.random_buses:
        mean, std = statistics.load.get((bus, t), (0.0, 0.0))
        level = np.maximum(mean + std * noise[:, component], 0.0)
        if mean_load:
            level = np.full_like(level, mean)
        component += 1
        load = level[:, None] * np.array(overrides.load.get((bus, t), ones))
        lower.append(load)
        upper.append(load)
    for source in statistics.random_sources:
        mean, std = statistics.source.get((source, t), (0.0, 0.0))
        share = np.clip(mean + std * noise[:, component], 0.0, 1.0)
        component += 1
        if lp.layout.source[source] is None:
            continue
        capacity = case.sources[source].max_generation_mw
        factors = np.array(overrides.source.get((source, t), ones))
        available = (capacity * share)[:, None] * factors
        lower.append(np.zeros_like(available))
        upper.append(available)
    below = np.concatenate(lower, axis=1)
    is_fixed = all(low is high for low, high in zip(lower, upper, strict=True))
    return NoiseBounds(
        lower=below,
        upper=below if is_fixed else np.concatenate(upper, axis=1),
        inflow_noise=eta if case.config.truncate_inflow else None,
    )


def truncated_inflow(model: InflowModel, eta: Floats, lags: Floats) -> Floats:
    """Return the noise part of the inflow with its noise raised where inflow would be negative.

    Args:
        model: The inflow model of the stage.
        eta: float64, (openings, hydro plants).
        lags: float64, (lags, hydro plants), newest first, in m3/s.

    Returns:
        ``base + sigma * eta`` in m3/s, float64 (openings, hydro plants), such that adding the
        part of the lags gives no negative inflow where sigma is positive.
    """
    past = np.zeros_like(model.base)
    for psi, lag in zip(model.psi, lags, strict=True):
        past = past + psi * lag
    spread = model.sigma > 0
    floor = (0.0 - model.base - past) / np.where(spread, model.sigma, 1.0)
    negative = (model.base + past + model.sigma * eta < 0) & spread
    return model.base + model.sigma * np.where(negative, floor, eta)
