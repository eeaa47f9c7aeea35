"""Statistics of the random quantities, and the noise of every stage.

Inflow follows a periodic autoregressive model with additive normal noise; load and the
availability of non-controllable sources are normal around their mean. All of them read one
noise vector per opening: first the hydro plants, then the buses whose load is random, then the
sources with statistics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from cobre_shm.sddp.case_files import UNKNOWN_STAGE, CaseFiles
from cobre_shm.sddp.correlation import Correlation, parse_correlation
from cobre_shm.sddp.errors import SchemaViolation, Unsupported
from cobre_shm.sddp.fields import UNREADABLE, Positions
from cobre_shm.sddp.findings import Findings
from cobre_shm.sddp.noise import Pcg64, forward_seed, normal_vector, opening_seed
from cobre_shm.sddp.stages import Horizon

Floats = npt.NDArray[np.float64]
Moments = tuple[float, float]
Key = tuple[int, int]

_ZERO: Moments = (0.0, 0.0)


@dataclass(frozen=True)
class Statistics:
    """What is known of the random quantities.

    Attributes:
        inflow: Mean and standard deviation in m3/s by (hydro position, stage **id**); negative
            ids are stages before the study.
        autoregression: Standardised coefficients from lag 1 and the ratio of the residual
            standard deviation, by (hydro position, stage id).
        load: Mean and standard deviation in MW by (bus position, stage position).
        source: Mean and standard deviation as fractions of the capacity by (source position,
            stage position).
        random_buses: Positions of the buses that have a noise component.
        random_sources: Positions of the sources that have a noise component.
        correlation: How noise components are correlated, or None.
        openings: A tree given by the user, one array (openings, components) per stage, or None.
    """

    inflow: Mapping[Key, Moments]
    autoregression: Mapping[Key, tuple[tuple[float, ...], float]]
    load: Mapping[Key, Moments]
    source: Mapping[Key, Moments]
    random_buses: tuple[int, ...]
    random_sources: tuple[int, ...]
    correlation: Correlation | None
    openings: tuple[Floats, ...] | None

    @property
    def lags(self) -> int:
        """The largest order of the inflow model."""
        return max((len(item[0]) for item in self.autoregression.values()), default=0)


@dataclass(frozen=True)
class InflowModel:
    """Inflow of one stage: ``base + sum(psi[l] * lag[l]) + sigma * noise``, in m3/s.

    Attributes:
        base: float64, one per hydro plant.
        sigma: float64, one per hydro plant.
        psi: float64, (lags, hydro plants); row 0 belongs to the newest lag.
    """

    base: Floats
    sigma: Floats
    psi: Floats


def parse_statistics(
    files: CaseFiles, horizon: Horizon, positions: Mapping[str, Positions]
) -> Statistics:
    """Read and check the ``scenarios/`` folder except the block factors."""
    before = len(files.findings)

    def moments(
        file: str, key: str, mean: str, std: str, what: str, **limits: float
    ) -> dict[Key, Moments]:
        name = f"scenarios/{file}.parquet"
        found = {
            (row.reference(key, positions[key], what), row.integer("stage_id")): (
                row.number(mean, **limits),
                row.number(std, minimum=0.0),
            )
            for row in files.rows(name, (key, "stage_id", mean, std))
        }
        # Ids below zero are stages before the study.
        strange = sum(stage >= 0 and stage not in horizon.positions for _, stage in found)
        files.skip(name, UNKNOWN_STAGE, strange)
        return found

    def by_position(values: dict[Key, Moments]) -> dict[Key, Moments]:
        return {
            (entity, horizon.positions[stage]): value
            for (entity, stage), value in values.items()
            if stage in horizon.positions
        }

    hydro_count = len(positions["hydro_id"])
    load = by_position(moments("load_seasonal_stats", "bus_id", "mean_mw", "std_mw", "bus"))
    source = by_position(
        moments(
            *("non_controllable_stats", "ncs_id", "mean", "std", "non-controllable source"),
            minimum=0.0,
            maximum=1.0,
        )
    )
    random_buses = tuple(sorted({bus for (bus, _), (_, std) in load.items() if std > 0}))
    random_sources = tuple(sorted({item for item, _ in source}))
    parts = {
        "inflow": tuple(range(hydro_count)),
        "load": random_buses,
        "ncs": random_sources,
    }
    inflow = moments("inflow_seasonal_stats", "hydro_id", "mean_m3s", "std_m3s", "hydro plant")
    readable = len(files.findings) == before
    components = sum(len(part) for part in parts.values()) if readable else None
    return Statistics(
        inflow=inflow,
        autoregression=_parse_autoregression(files, horizon, positions["hydro_id"]),
        load=load,
        source=source,
        random_buses=random_buses,
        random_sources=random_sources,
        correlation=parse_correlation(files, horizon, parts, positions),
        openings=_parse_openings(files, horizon, components),
    )


def _parse_autoregression(
    files: CaseFiles, horizon: Horizon, hydros: Positions
) -> dict[Key, tuple[tuple[float, ...], float]]:
    file = "scenarios/inflow_ar_coefficients.parquet"
    required = ("hydro_id", "stage_id", "lag", "coefficient", "residual_std_ratio")
    terms: dict[Key, dict[int, tuple[float, float]]] = {}
    before, rows = len(files.findings), list(files.rows(file, required))
    for row in rows:
        key = (row.reference("hydro_id", hydros, "hydro plant"), row.integer("stage_id"))
        lag = row.integer("lag", minimum=1)
        values = (
            row.number("coefficient"),
            row.number("residual_std_ratio", above=0.0, maximum=1.0),
        )
        if key[0] < 0 or lag == UNREADABLE:
            continue
        if lag in terms.setdefault(key, {}):
            row.report(SchemaViolation, "lag", f"lag {lag} occurs twice", value=lag)
        terms[key][lag] = values
    if not rows:
        return {}
    _check_seasons(horizon, files.findings)
    if len(files.findings) > before:
        return {}
    ids = list(hydros)
    for (h, stage_id), by_lag in terms.items():
        if sorted(by_lag) != list(range(1, len(by_lag) + 1)):
            files.findings.add(
                SchemaViolation(
                    f"{file}: the lags of hydro plant {ids[h]} at stage {stage_id} must be "
                    "1, 2, ... without gaps",
                    context={
                        "file": file,
                        "field": "lag",
                        "entity_id": ids[h],
                        "stage_id": stage_id,
                        "value": str(sorted(by_lag)),
                        "expected": "1, 2, ... without gaps",
                    },
                )
            )
    return {
        key: (tuple(by_lag[lag][0] for lag in sorted(by_lag)), by_lag[min(by_lag)][1])
        for key, by_lag in terms.items()
    }


def _check_seasons(horizon: Horizon, findings: Findings) -> None:
    """Refuse ids and seasons for which "one stage back" is not one lag back."""
    ids = [stage.id for stage in horizon.stages]
    for before, after in pairwise(ids):
        if after != before + 1:
            findings.add(
                Unsupported(
                    "stages.json: stages: autoregressive inflow needs stage ids without gaps, for "
                    f"a lag has the statistics of an earlier id, but {after} follows {before}",
                    context={
                        "file": "stages.json",
                        "field": "stages.id",
                        "entity_id": after,
                        "value": after,
                        "expected": before + 1,
                    },
                )
            )
            return
    if horizon.cycle is None:
        return
    if horizon.cycle != "monthly":
        findings.add(
            Unsupported(
                "stages.json: season_definitions.cycle_type: autoregressive inflow needs monthly "
                f"seasons, not {horizon.cycle!r}",
                context={
                    "file": "stages.json",
                    "field": "season_definitions.cycle_type",
                    "value": horizon.cycle,
                    "expected": "monthly",
                },
            )
        )
    groups = [noise_group(horizon, t) for t in range(len(horizon.stages))]
    for t, group in enumerate(groups):
        first = groups.index(group)
        if first < t:
            findings.add(
                Unsupported(
                    "stages.json: stages: autoregressive inflow needs one stage per season and "
                    f"year, but stages {horizon.stages[first].id} and {horizon.stages[t].id} "
                    f"are both in season {group[0]} of {group[1]}",
                    context={
                        "file": "stages.json",
                        "field": "stages.season_id",
                        "entity_id": horizon.stages[t].id,
                        "value": group[0],
                        "expected": "one stage per season and year",
                    },
                )
            )
            return


def noise_group(horizon: Horizon, t: int) -> tuple[int, int]:
    """Return what a stage shares its noise by: its season and year, or itself."""
    stage = horizon.stages[t]
    return (-1, t) if stage.season_id is None else (stage.season_id, stage.start.year)


def _parse_openings(
    files: CaseFiles, horizon: Horizon, components: int | None
) -> tuple[Floats, ...] | None:
    file = "scenarios/noise_openings.parquet"
    counts = [stage.openings for stage in horizon.stages]
    if file not in files or components is None or min(counts, default=0) < 1:
        return None
    before = len(files.findings)
    needed, found = sum(counts) * components, files.count_rows(file)
    if found < needed:
        # Before there is memory for what the table lacks.
        files.findings.add(
            SchemaViolation(
                f"{file}: each opening and entity needs a row, {needed} in all, not {found}",
                context={"file": file, "field": "value", "value": found, "expected": needed},
            )
        )
        return None
    tree = [np.full((count, components), np.nan) for count in counts]
    for row in files.rows(file, ("stage_id", "opening_index", "entity_index", "value")):
        t = row.reference("stage_id", horizon.positions, "stage")
        opening = row.integer("opening_index", minimum=0, maximum=counts[t] - 1)
        entity = row.integer("entity_index", minimum=0, maximum=components - 1)
        value = row.number("value")
        if len(files.findings) == before:
            tree[t][opening, entity] = value
    if len(files.findings) > before:
        return None
    for stage, values in zip(horizon.stages, tree, strict=True):
        if np.isnan(values).any():
            opening, entity = (int(i) for i in np.argwhere(np.isnan(values))[0])
            files.findings.add(
                SchemaViolation(
                    f"{file}: stage {stage.id} lacks opening {opening}, entity {entity}",
                    context={
                        "file": file,
                        "field": "value",
                        "stage_id": stage.id,
                        "expected": f"{values.shape[0]} openings of {components} entities",
                    },
                )
            )
    return tuple(tree)


def noise_components(statistics: Statistics, hydros: int) -> int:
    """Return the length of a noise vector."""
    return hydros + len(statistics.random_buses) + len(statistics.random_sources)


def draw_noise(
    noise: Floats, openings: range, statistics: Statistics, horizon: Horizon, t: int, seed: int
) -> None:
    """Draw some rows of a stage's ``noise``, zero so far, unless it is that of the stage before."""
    if _has_common_noise(horizon, t):
        return
    stage = horizon.stages[t]
    for opening in openings:
        vector = normal_vector(opening_seed(seed, opening, stage.id), noise.shape[1])
        if statistics.correlation is not None:
            vector = statistics.correlation.apply(stage.id, vector)
        noise[opening] = vector


def copy_common_noise(tree: Sequence[Floats], horizon: Horizon) -> None:
    """Complete a tree whose other stages are drawn."""
    for t in range(1, len(tree)):
        if _has_common_noise(horizon, t):
            common = min(len(tree[t]), len(tree[t - 1]))
            tree[t][:common] = tree[t - 1][:common]


def _has_common_noise(horizon: Horizon, t: int) -> bool:
    return t > 0 and noise_group(horizon, t) == noise_group(horizon, t - 1)


def draw_opening(seed: int, iteration: int, scenario: int, t: int, openings: int) -> int:
    """Return the opening that a forward trajectory meets at stage position ``t``."""
    return Pcg64(forward_seed(seed, iteration, scenario, t)).below(openings)


def inflow_model(statistics: Statistics, horizon: Horizon, t: int, hydros: int) -> InflowModel:
    """Return the inflow model of stage position ``t`` in units of m3/s."""
    stage_id = horizon.stages[t].id
    base, sigma = np.zeros(hydros), np.zeros(hydros)
    psi = np.zeros((statistics.lags, hydros))
    for h in range(hydros):
        mean, std = statistics.inflow.get((h, stage_id), _ZERO)
        coefficients, ratio = statistics.autoregression.get((h, stage_id), ((), 1.0))
        base[h], sigma[h] = mean, std * ratio
        for lag, coefficient in enumerate(coefficients, start=1):
            lag_mean, lag_std = lag_moments(statistics, horizon, h, stage_id - lag) or _ZERO
            if lag_std > 0:
                psi[lag - 1, h] = coefficient * std / lag_std
                base[h] -= psi[lag - 1, h] * lag_mean
    return InflowModel(base, sigma, psi)


def lag_moments(statistics: Statistics, horizon: Horizon, h: int, stage_id: int) -> Moments | None:
    """Return the moments of an earlier stage, or of its season where it has no row, or None."""
    found = statistics.inflow.get((h, stage_id))
    if found is not None:
        return found
    seasons = [stage.season_id for stage in horizon.stages]
    if seasons[0] is None:
        return None
    wanted = (stage_id + seasons[0]) % len({season for season in seasons if season is not None})
    for stage in horizon.stages:
        if stage.season_id == wanted and (h, stage.id) in statistics.inflow:
            return statistics.inflow[h, stage.id]
    return None
