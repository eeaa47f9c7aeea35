"""What is valid in a case and yet may not be what its author meant."""

from __future__ import annotations

from collections.abc import Iterator

from cobre_shm.sddp.case_files import CaseFiles
from cobre_shm.sddp.overrides import Overrides
from cobre_shm.sddp.scenarios import Statistics
from cobre_shm.sddp.stages import Horizon
from cobre_shm.sddp.system import Hydro, Source


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


def warn_of_sources(
    horizon: Horizon, sources: tuple[Source, ...], statistics: Statistics, overrides: Overrides
) -> Iterator[str]:
    """Tell where a random source has bounds without effect, or no statistics."""
    bounds = overrides.tables["ncs_bounds"]
    for i in statistics.random_sources:
        source = sources[i]
        active = [t for t, stage in enumerate(horizon.stages) if source.is_active(stage.id)]
        if any(bounds.get((i, t)) for t in active):
            yield (
                f"constraints/ncs_bounds.parquet: source {source.id}: available_generation_mw is "
                "ignored, as the source has statistics"
            )
        without = [horizon.stages[t].id for t in active if (i, t) not in statistics.source]
        if without:
            yield (
                f"scenarios/non_controllable_stats.parquet: source {source.id} has statistics, "
                f"but none at stage {', '.join(map(str, without))}: it generates nothing there"
            )
