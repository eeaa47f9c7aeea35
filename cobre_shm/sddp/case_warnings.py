"""What is valid in a case and yet may not be what its author meant."""

from __future__ import annotations

import os
from collections.abc import Container, Iterator, Mapping

from cobre_shm.sddp.case_files import CaseFiles
from cobre_shm.sddp.config import Config
from cobre_shm.sddp.overrides import Overrides
from cobre_shm.sddp.scenarios import Floats, Key, Statistics, lag_moments
from cobre_shm.sddp.stages import Horizon
from cobre_shm.sddp.system import Bus, Hydro, Source

_INFLOW = "scenarios/inflow_seasonal_stats.parquet"
_LOAD = "scenarios/load_seasonal_stats.parquet"
_SOURCE = "scenarios/non_controllable_stats.parquet"


def warn_of_settings(files: CaseFiles, config: Config) -> Iterator[str]:
    """Tell of a seed that is not the one which counts, and of a directory that is not read.

    A training writes policy and checkpoints to one place only.
    """
    source = files.record("config.json").data["training"].get("scenario_source") or {}
    seed = source.get("seed")
    if isinstance(seed, int) and abs(seed) != config.tree_seed:
        yield (
            "config.json: training.scenario_source.seed is ignored: openings and forward draws "
            f"come from training.tree_seed, {config.tree_seed}"
        )
    if config.policy_mode != "warm_start" and os.path.normpath(config.policy_path) != "policy":
        yield (
            f"config.json: policy.path {config.policy_path!r} is ignored unless policy.mode is "
            "'warm_start': policy and checkpoints are in 'policy' of the output directory"
        )


def warn_of_entity_dates(files: CaseFiles) -> Iterator[str]:
    """Tell of stages of entry and exit, which the reference program heeds for sources only."""
    for kind in ("hydro", "thermal", "line"):
        for record in files.record(f"system/{kind}s.json").records(f"{kind}s"):
            for key in ("entry_stage_id", "exit_stage_id"):
                if key in record:
                    yield (
                        f"{record.file}: {kind} {record.data['id']}: {key} is ignored, as the "
                        "reference program does"
                    )


def warn_of_past_inflows(
    files: CaseFiles, horizon: Horizon, hydros: tuple[Hydro, ...], statistics: Statistics
) -> Iterator[str]:
    """Tell of inflows before the study that the inflow model needs and that are not given."""
    file = "initial_conditions.json"
    given = {
        record.data["hydro_id"]: len(record.data["values_m3s"])
        for record in files.record(file).records("past_inflows", [])
    }
    for h, hydro in enumerate(hydros):
        # A later stage has more of its lags inside the study.
        needed = max(
            len(statistics.autoregression.get((h, stage.id), ((), 1.0))[0]) - t
            for t, stage in enumerate(horizon.stages)
        )
        found = given.get(hydro.id, 0)
        if found < needed:
            yield (
                f"{file}: hydro {hydro.id}: its inflow depends on {needed} past_inflows, and "
                f"{found} are given: the others count as zero"
            )


def warn_of_lags(
    horizon: Horizon, hydros: tuple[Hydro, ...], statistics: Statistics
) -> Iterator[str]:
    """Tell of coefficients without effect, because the stage that they look back to is unknown."""
    for h, hydro in enumerate(hydros):
        unknown = sorted(
            {
                stage.id - lag
                for stage in horizon.stages
                for lag, coefficient in enumerate(
                    statistics.autoregression.get((h, stage.id), ((), 1.0))[0], start=1
                )
                if coefficient and lag_moments(statistics, horizon, h, stage.id - lag) is None
            }
        )
        if unknown:
            yield (
                f"{_INFLOW}: hydro {hydro.id} has no row for stage {_listed(unknown)}: "
                "coefficients of lags that reach it have no effect"
            )


def warn_of_storage(hydros: tuple[Hydro, ...], initial_state: Floats) -> Iterator[str]:
    """Tell of reservoirs that begin outside of their bounds."""
    for hydro, storage in zip(hydros, initial_state, strict=False):
        if not hydro.min_storage_hm3 <= storage <= hydro.max_storage_hm3:
            yield (
                f"initial_conditions.json: hydro {hydro.id}: its storage of {storage:g} hm3 is not "
                f"within its bounds, {hydro.min_storage_hm3:g} to {hydro.max_storage_hm3:g}"
            )


def warn_of_crossing_bounds(
    horizon: Horizon, hydros: tuple[Hydro, ...], overrides: Overrides
) -> Iterator[str]:
    """Tell of stages where a plant must pay for a bound that it cannot keep."""
    for h, hydro in enumerate(hydros):
        for name in ("turbined_m3s", "outflow_m3s", "generation_mw"):
            crossing = [
                stage.id
                for t, stage in enumerate(horizon.stages)
                if getattr(at := overrides.hydro(hydro, (h, t)), f"min_{name}")
                > getattr(at, f"max_{name}")
            ]
            if crossing:
                yield (
                    f"constraints/hydro_bounds.parquet: hydro {hydro.id}: min_{name} exceeds "
                    f"max_{name} at stage {_listed(crossing)}: one of them is paid for there"
                )


def warn_of_sources(
    horizon: Horizon, sources: tuple[Source, ...], statistics: Statistics, overrides: Overrides
) -> Iterator[str]:
    """Tell where a random source has bounds without effect."""
    bounds = overrides.tables["ncs_bounds"]
    for i in statistics.random_sources:
        source = sources[i]
        if any(bounds.get((i, t)) for t in _active(source, horizon)):
            yield (
                f"constraints/ncs_bounds.parquet: source {source.id}: available_generation_mw is "
                "ignored, as the source has statistics"
            )


def warn_of_missing_statistics(
    horizon: Horizon,
    hydros: tuple[Hydro, ...],
    buses: tuple[Bus, ...],
    sources: tuple[Source, ...],
    statistics: Statistics,
) -> Iterator[str]:
    """Tell of stages that a table of statistics leaves out.

    A source without any row is none of a random availability. The reference program refuses what
    is left out of the others, but for stages outside of a plant's dates, which are ignored here.
    """
    every = range(len(horizon.stages))
    inflow = {
        (h, horizon.positions[stage])
        for h, stage in statistics.inflow
        if stage in horizon.positions
    }
    has_rows = {i: sources[i] for i in statistics.random_sources}
    tables: tuple[tuple[str, str, Mapping[int, Hydro | Bus | Source], Container[Key], str], ...] = (
        (_INFLOW, "hydro", dict(enumerate(hydros)) if inflow else {}, inflow, "its inflow is zero"),
        (
            _LOAD,
            "bus",
            dict(enumerate(buses)) if statistics.load else {},
            statistics.load,
            "its load is zero",
        ),
        (_SOURCE, "source", has_rows, statistics.source, "it generates nothing"),
    )
    for file, kind, entities, given, effect in tables:
        for i, entity in entities.items():
            needed = _active(entity, horizon) if isinstance(entity, Source) else every
            without = [horizon.stages[t].id for t in needed if (i, t) not in given]
            if without:
                stages = _listed(without)
                yield f"{file}: {kind} {entity.id} has no row for stage {stages}: {effect} there"


def _active(source: Source, horizon: Horizon) -> list[int]:
    return [t for t, stage in enumerate(horizon.stages) if source.is_active(stage.id)]


def _listed(stages: list[int]) -> str:
    more = f" and {len(stages) - 6} more" if len(stages) > 7 else ""
    return ", ".join(map(str, stages[:6] if more else stages)) + more
