"""A case: everything the trainer needs to know, checked and in memory.

Entities are sorted by id, and all references between them are positions in that order; the same
positions index states, noise vectors and cuts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cobre_shm.communicator import Communicator
from cobre_shm.sddp.config import Config, parse_config
from cobre_shm.sddp.constraints import GenericConstraint, parse_constraints
from cobre_shm.sddp.documents import Documents, decode, encode, read_documents
from cobre_shm.sddp.errors import OutOfRange, Unsupported
from cobre_shm.sddp.fields import Record
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


@dataclass(frozen=True)
class Case:
    """A checked case.

    Attributes:
        name: Name of the case directory.
        config: The settings.
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
        warnings: What was read and has no effect.
    """

    name: str
    config: Config
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

    @property
    def stages(self) -> int:
        """Number of study stages."""
        return len(self.horizon.stages)

    @property
    def state_size(self) -> int:
        """Number of state components: one storage and the lags of each hydro plant."""
        return len(self.hydros) * (1 + self.statistics.lags)

    def state_names(self) -> list[tuple[str, int, int, str]]:
        """Return kind, hydro id, lag (0 for storage) and unit of each state component."""
        storages = [("storage", hydro.id, 0, "hm3") for hydro in self.hydros]
        lags = [
            ("inflow_lag", hydro.id, lag, "m3/s")
            for lag in range(1, self.statistics.lags + 1)
            for hydro in self.hydros
        ]
        return storages + lags


def load_case(path: str | Path) -> Case:
    """Read and check a case directory.

    Args:
        path: The directory.

    Raises:
        CaseError: The case is incomplete, wrong, or asks for something that is not supported;
            the subclass and the context say which file, field and value.
        MissingDependency: pyarrow is not installed.
    """
    return build_case(Path(path).resolve().name, read_documents(path))


def share_case(path: str | Path, comm: Communicator) -> Case:
    """Read a case on rank 0 and give it to every rank.

    Collective. If rank 0 cannot use the case, every rank raises the error that rank 0 found, so
    that no rank is left waiting.

    Args:
        path: The directory; only rank 0 needs to see it.
        comm: The communicator.

    Raises:
        CaseError: As :func:`load_case`, on every rank.
        MissingDependency: As :func:`load_case`, on every rank.
    """

    def read() -> bytes:
        documents = read_documents(path)
        name = Path(path).resolve().name
        build_case(name, documents)
        return encode({"name": name, "documents": documents})

    from cobre_shm.sddp.node_arrays import share_openings

    shared = decode(on_rank_zero(read, comm))
    return share_openings(build_case(shared["name"], shared["documents"]), comm)


def build_case(name: str, documents: Documents) -> Case:
    """Check the documents of a case and return the case.

    Raises:
        CaseError: As :func:`load_case`.
    """

    def document(file: str) -> Record:
        return Record(documents.get(file, {}), file)

    warnings: list[str] = []
    config = parse_config(document("config.json"))
    horizon = parse_stages(document("stages.json"))
    penalties = parse_penalties(document("penalties.json"))
    buses = parse_buses(document("system/buses.json"), penalties)
    bus_positions = {bus.id: i for i, bus in enumerate(buses)}
    lines = parse_lines(document("system/lines.json"), penalties, bus_positions, warnings)
    thermals = parse_thermals(document("system/thermals.json"), bus_positions)
    hydros = parse_hydros(document("system/hydros.json"), penalties, bus_positions)
    hydros = apply_production_models(
        document("system/hydro_production_models.json"), hydros, horizon.stages
    )
    sources: tuple[Source, ...] = ()
    if "system/non_controllable_sources.json" in documents:
        sources = parse_sources(
            document("system/non_controllable_sources.json"), penalties, bus_positions
        )
    for file, key in (("pumping_stations", "pumping_stations"), ("energy_contracts", "contracts")):
        record = document(f"system/{file}.json")
        if any(record.data.get(item) for item in (key, file)):
            record.refuse(key, file.replace("_", " "))
    positions = {
        "bus_id": bus_positions,
        "line_id": {line.id: i for i, line in enumerate(lines)},
        "thermal_id": {thermal.id: i for i, thermal in enumerate(thermals)},
        "hydro_id": {hydro.id: i for i, hydro in enumerate(hydros)},
        "ncs_id": {source.id: i for i, source in enumerate(sources)},
    }
    statistics = parse_statistics(documents, horizon, positions)
    overrides = parse_overrides(documents, horizon, positions, warnings)
    case = Case(
        name=name,
        config=config,
        horizon=horizon,
        buses=buses,
        lines=lines,
        thermals=thermals,
        hydros=hydros,
        sources=sources,
        overrides=overrides,
        constraints=parse_constraints(documents, horizon, positions),
        statistics=statistics,
        initial_state=_parse_initial(
            document("initial_conditions.json"), positions["hydro_id"], statistics.lags
        ),
        warnings=tuple(warnings),
    )
    _check_stage_bounds(case)
    return case


def _parse_initial(document: Record, hydros: Mapping[int, int], lags: int) -> Floats:
    for key in ("filling_storage", "recent_observations"):
        if document.items(key, []):
            raise document.error(
                Unsupported, key, f"{key} is not supported", expected="an empty list"
            )
    count = len(hydros)
    state = np.zeros((1 + lags, count))
    for record in document.records("storage", []):
        h = record.reference("hydro_id", hydros, "hydro plant")
        state[0, h] = record.number("value_hm3", minimum=0.0)
    for record in document.records("past_inflows", []):
        h = record.reference("hydro_id", hydros, "hydro plant")
        values = record.numbers("values_m3s")[:lags]
        state[1 : 1 + len(values), h] = values
    return state.reshape(-1)


def _check_stage_bounds(case: Case) -> None:
    """Check what a table of stage values may have turned around."""
    for t, stage in enumerate(case.horizon.stages):
        pairs: list[tuple[str, int, str, float, float]] = []
        for i, hydro in enumerate(case.hydros):
            at = case.overrides.hydro(hydro, (i, t))
            pairs.append(("hydro", at.id, "storage_hm3", at.min_storage_hm3, at.max_storage_hm3))
        for i, thermal in enumerate(case.thermals):
            plant = case.overrides.thermal(thermal, (i, t))
            pairs.append(("thermal", plant.id, "generation_mw", plant.min_mw, plant.max_mw))
        for kind, entity_id, name, low, high in pairs:
            if low > high:
                file = f"constraints/{kind}_bounds.parquet"
                raise OutOfRange(
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


def with_iterations(case: Case, iterations: int) -> Case:
    """Return ``case`` with its iteration limits replaced by ``iterations``."""
    rules = tuple(
        replace(rule, limit=iterations) if rule.kind == "iteration_limit" else rule
        for rule in case.config.stopping_rules
    )
    return replace(case, config=replace(case.config, stopping_rules=rules))
