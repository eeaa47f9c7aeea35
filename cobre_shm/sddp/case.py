"""A case: everything the trainer needs to know, checked and in memory.

Entities are sorted by id, and all references between them are positions in that order; the same
positions index states, noise vectors and cuts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cobre_shm.communicator import Communicator
from cobre_shm.sddp.case_files import CaseFiles, digest_of
from cobre_shm.sddp.case_warnings import (
    warn_of_crossing_bounds,
    warn_of_entity_dates,
    warn_of_lags,
    warn_of_missing_statistics,
    warn_of_past_inflows,
    warn_of_settings,
    warn_of_sources,
    warn_of_storage,
)
from cobre_shm.sddp.config import Config, parse_config
from cobre_shm.sddp.constraints import GenericConstraint, parse_constraints
from cobre_shm.sddp.documents import decode, encode, overridden, read_documents, with_config
from cobre_shm.sddp.errors import OutOfRange, Unsupported
from cobre_shm.sddp.fields import Positions, Record
from cobre_shm.sddp.findings import Findings
from cobre_shm.sddp.hydros import apply_production_models, parse_hydros
from cobre_shm.sddp.overrides import Overrides, parse_overrides
from cobre_shm.sddp.scenarios import Statistics, parse_statistics
from cobre_shm.sddp.sharing import on_rank_zero
from cobre_shm.sddp.stages import Horizon, parse_stages
from cobre_shm.sddp.system import (
    Bus,
    Hydro,
    Line,
    Source,
    Thermal,
    parse_buses,
    parse_lines,
    parse_penalties,
    parse_sources,
    parse_thermals,
)

Floats = npt.NDArray[np.float64]

# How long to go on may change while a training rests.
_UNCOUNTED_TRAINING = ("stopping_rules", "stopping_mode")


@dataclass(frozen=True)
class Case:
    """A checked case.

    Attributes:
        name: Name of the case directory.
        config: The settings.
        settings: ``config.json`` as it was read, with what was given in its place.
        horizon: The stages.
        buses: By position.
        lines: By position.
        thermals: By position.
        hydros: By position.
        sources: Non-controllable sources by position.
        overrides: Values that differ by stage.
        constraints: Generic constraints.
        statistics: The random quantities.
        initial_state: float64, one value per state component: the storages in hm3, then for
            each lag, newest first, the past inflows in m3/s.
        warnings: What was read and has no effect, and what counts as zero for want of a value.
        data_digest: Hash over every file but ``config.json``.
    """

    name: str
    config: Config
    settings: dict[str, Any]
    horizon: Horizon
    buses: tuple[Bus, ...]
    lines: tuple[Line, ...]
    thermals: tuple[Thermal, ...]
    hydros: tuple[Hydro, ...]
    sources: tuple[Source, ...]
    overrides: Overrides
    constraints: tuple[GenericConstraint, ...]
    statistics: Statistics
    initial_state: Floats
    warnings: tuple[str, ...]
    data_digest: str

    def __repr__(self) -> str:
        # All of it fills a screen.
        return (
            f"<Case {self.name}: stages {len(self.horizon.stages)}, buses {len(self.buses)}, "
            f"lines {len(self.lines)}, hydros {len(self.hydros)}, thermals {len(self.thermals)}, "
            f"sources {len(self.sources)}>"
        )

    @property
    def digest(self) -> str:
        """Hash over everything that the course of a training depends on.

        How long it goes on, what is simulated and what is written do not count.
        """
        training = self.settings.get("training", {})
        counted = {k: v for k, v in training.items() if k not in _UNCOUNTED_TRAINING}
        return digest_of([self.data_digest, counted, self.settings.get("modeling")])

    @property
    def stages(self) -> int:
        """Number of study stages."""
        return len(self.horizon.stages)

    @property
    def state_size(self) -> int:
        """Number of state components: one storage and the lags of each hydro plant."""
        return len(self.hydros) * (1 + self.statistics.lags)

    def sizes(self) -> dict[str, Any]:
        """Return the case's name and how many there are of what makes it large, by name."""
        return {
            "case": self.name,
            "stages": self.stages,
            "buses": len(self.buses),
            "lines": len(self.lines),
            "thermals": len(self.thermals),
            "hydros": len(self.hydros),
            "non_controllable_sources": len(self.sources),
            "generic_constraints": len(self.constraints),
            "inflow_lags": self.statistics.lags,
            "state_components": self.state_size,
            "forward_passes": self.config.forward_passes,
        }

    def state_names(self) -> list[tuple[str, int, int, str]]:
        """Return kind, hydro id, lag (0 for storage) and unit of each state component."""
        storages = [("storage", hydro.id, 0, "hm3") for hydro in self.hydros]
        lags = [
            ("inflow_lag", hydro.id, lag, "m3/s")
            for lag in range(1, self.statistics.lags + 1)
            for hydro in self.hydros
        ]
        return storages + lags


def load_case(path: str | Path, config_overrides: Mapping[str, Any] | None = None) -> Case:
    """Read and check a case directory.

    Args:
        path: The directory.
        config_overrides: Values that replace those of ``config.json``, nested as there.

    Raises:
        CaseError: The case is incomplete, wrong, or asks for something that is not supported;
            the subclass and the context say which file, field and value. The first finding is
            raised; :func:`check_case` returns all.
        MissingDependency: pyarrow is not installed.
    """
    case, findings, _ = check_case(path, config_overrides)
    findings.check()
    assert case is not None
    return case


def check_case(
    path: str | Path, config_overrides: Mapping[str, Any] | None = None
) -> tuple[Case | None, Findings, list[str]]:
    """Read a case directory and find everything that is wrong with it.

    Args:
        path: The directory.
        config_overrides: As for :func:`load_case`.

    Returns:
        The case, or None if there are findings; the findings; what has no effect.

    Raises:
        MissingFile: There is no such directory.
        MissingDependency: pyarrow is not installed.
    """
    findings = Findings()
    documents = with_config(read_documents(path, findings), config_overrides)
    files = CaseFiles(documents, findings)
    case = build_case(Path(path).resolve().name, files)
    return case, findings, files.warnings


def share_case(
    path: str | Path, comm: Communicator, config_overrides: Mapping[str, Any] | None = None
) -> Case:
    """Read a case on rank 0 and give it to every rank.

    Collective. If rank 0 cannot use the case, every rank raises the error that rank 0 found, so
    that no rank is left waiting.

    Args:
        path: The directory; only rank 0 needs to see it.
        comm: The communicator.
        config_overrides: As for :func:`load_case`; only rank 0's count.

    Raises:
        CaseError: As :func:`load_case`, on every rank.
        MissingDependency: As :func:`load_case`, on every rank.
    """

    def read() -> bytes:
        findings = Findings()
        documents = with_config(read_documents(path, findings), config_overrides)
        name = Path(path).resolve().name
        build_case(name, CaseFiles(documents, findings))
        findings.check()
        return encode({"name": name, "documents": documents})

    from cobre_shm.sddp.node_arrays import share_openings

    shared = decode(on_rank_zero(read, comm))
    case = build_case(shared["name"], CaseFiles(shared["documents"], Findings()))
    assert case is not None, "rank 0 has checked the same documents"
    return share_openings(case, comm)


def build_case(name: str, files: CaseFiles) -> Case | None:
    """Check the files of a case and return the case, or None if there are findings."""
    config = parse_config(files.record("config.json"))
    horizon = parse_stages(files.record("stages.json"))
    penalties = parse_penalties(files.record("penalties.json"))
    buses, bus_ids = parse_buses(files.record("system/buses.json"), penalties)
    lines, line_ids = parse_lines(
        files.record("system/lines.json"), penalties, bus_ids, files.warnings
    )
    thermals, thermal_ids = parse_thermals(files.record("system/thermals.json"), bus_ids)
    hydros, hydro_ids = parse_hydros(files.record("system/hydros.json"), penalties, bus_ids)
    hydros = apply_production_models(
        files.record("system/hydro_production_models.json"), hydros, hydro_ids, horizon.stages
    )
    sources: tuple[Source, ...] = ()
    source_ids = Positions(())
    if "system/non_controllable_sources.json" in files:
        sources, source_ids = parse_sources(
            files.record("system/non_controllable_sources.json"), penalties, bus_ids
        )
    for file, key in (("pumping_stations", "pumping_stations"), ("energy_contracts", "contracts")):
        record = files.record(f"system/{file}.json")
        for item in {key, file}:
            if record.data.get(item):
                record.refuse(item, file.replace("_", " "))
    positions = {
        "bus_id": bus_ids,
        "line_id": line_ids,
        "thermal_id": thermal_ids,
        "hydro_id": hydro_ids,
        "ncs_id": source_ids,
    }
    statistics = parse_statistics(files, horizon, positions)
    overrides = parse_overrides(files, horizon, positions)
    constraints = parse_constraints(files, horizon, positions)
    initial_state = _parse_initial(
        files.record("initial_conditions.json"), hydro_ids, statistics.lags
    )
    _check_stage_bounds(hydros, thermals, overrides, horizon, files.findings)
    if len(files.findings):
        return None
    files.warnings += [
        *files.skipped(),
        *warn_of_settings(files, config),
        *warn_of_entity_dates(files),
        *warn_of_storage(hydros, initial_state),
        *warn_of_crossing_bounds(horizon, hydros, overrides),
        *warn_of_past_inflows(files, horizon, hydros, statistics),
        *warn_of_lags(horizon, hydros, statistics),
        *warn_of_sources(horizon, sources, statistics, overrides),
        *warn_of_missing_statistics(horizon, hydros, buses, sources, statistics),
    ]
    return Case(
        name=name,
        config=config,
        settings=dict(files.record("config.json").data),
        horizon=horizon,
        buses=buses,
        lines=lines,
        thermals=thermals,
        hydros=hydros,
        sources=sources,
        overrides=overrides,
        constraints=constraints,
        statistics=statistics,
        initial_state=initial_state,
        warnings=tuple(files.warnings),
        data_digest=files.data_digest(),
    )


def _parse_initial(document: Record, hydros: Positions, lags: int) -> Floats:
    for key in ("filling_storage", "recent_observations"):
        if document.items(key, []):
            document.report(Unsupported, key, f"{key} is not supported", expected="an empty list")
    state = np.zeros((1 + lags, len(hydros)))
    storages = [
        (record.reference("hydro_id", hydros, "hydro plant"), record.number("value_hm3", minimum=0))
        for record in document.records("storage")
    ]
    for h, value in storages:
        if h >= 0:
            state[0, h] = value
    inflows = [
        (record.reference("hydro_id", hydros, "hydro plant"), record.numbers("values_m3s"))
        for record in document.records("past_inflows", [])
    ]
    for h, values in inflows:
        if h >= 0:
            newest = values[:lags]
            state[1 : 1 + len(newest), h] = newest
    return state.reshape(-1)


def _check_stage_bounds(
    hydros: tuple[Hydro, ...],
    thermals: tuple[Thermal, ...],
    overrides: Overrides,
    horizon: Horizon,
    findings: Findings,
) -> None:
    """Check what a table of stage values may have turned around."""
    for t, stage in enumerate(horizon.stages):
        pairs: list[tuple[str, int, str, float, float]] = []
        for i, hydro in enumerate(hydros):
            at = overrides.hydro(hydro, (i, t))
            if at is not hydro:
                # What else may cross is paid for.
                low, high = at.min_storage_hm3, at.max_storage_hm3
                pairs.append(("hydro", at.id, "storage_hm3", low, high))
        for i, thermal in enumerate(thermals):
            plant = overrides.thermal(thermal, (i, t))
            if plant is not thermal:
                pairs.append(("thermal", plant.id, "generation_mw", plant.min_mw, plant.max_mw))
        for kind, entity_id, name, low, high in pairs:
            if low > high:
                file = f"constraints/{kind}_bounds.parquet"
                findings.add(
                    OutOfRange(
                        f"{file}: min_{name} of {kind} {entity_id} at stage {stage.id} exceeds "
                        f"max_{name}",
                        context={
                            "file": file,
                            "field": f"min_{name}",
                            "entity_id": entity_id,
                            "stage_id": stage.id,
                            "value": low,
                            "expected": f"at most {high:g}",
                        },
                    )
                )


def with_overrides(case: Case, config_overrides: Mapping[str, Any]) -> Case:
    """Return ``case`` with other settings.

    Args:
        case: The case, which stays as it is.
        config_overrides: As for :func:`load_case`.

    Raises:
        CaseError: A value is wrong.
    """
    findings = Findings()
    settings = overridden(case.settings, config_overrides)
    config = parse_config(Record(settings, "config.json", findings))
    findings.check()
    return replace(case, config=config, settings=settings)


def with_iterations(case: Case, iterations: int) -> Case:
    """Return ``case`` with its iteration limits replaced by ``iterations``."""
    rules = [
        {**rule, "limit": iterations} if rule["type"] == "iteration_limit" else rule
        for rule in case.settings["training"]["stopping_rules"]
    ]
    return with_overrides(case, {"training": {"stopping_rules": rules}})
