"""Values that differ by stage: the tables in ``constraints/`` and the block factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from cobre_shm.sddp.case_files import UNKNOWN, CaseFiles
from cobre_shm.sddp.fields import Positions
from cobre_shm.sddp.stages import Horizon
from cobre_shm.sddp.system import Bus, Hydro, Line, Source, Thermal

Key = tuple[int, int]
Values = Mapping[Key, Mapping[str, float]]
Factors = Mapping[Key, tuple[float, ...]]

# File, key column, and the field of the entity that each column replaces.
_TABLES: dict[str, tuple[str, dict[str, str]]] = {
    "hydro_bounds": (
        "hydro_id",
        {
            name: name
            for name in (
                "min_storage_hm3",
                "max_storage_hm3",
                "min_turbined_m3s",
                "max_turbined_m3s",
                "min_outflow_m3s",
                "max_outflow_m3s",
                "min_generation_mw",
                "max_generation_mw",
                "water_withdrawal_m3s",
            )
        },
    ),
    "thermal_bounds": (
        "thermal_id",
        {
            "min_generation_mw": "min_mw",
            "max_generation_mw": "max_mw",
            "cost_per_mwh": "cost_per_mwh",
        },
    ),
    "line_bounds": ("line_id", {"direct_mw": "direct_mw", "reverse_mw": "reverse_mw"}),
    "ncs_bounds": ("ncs_id", {"available_generation_mw": "max_generation_mw"}),
    "penalty_overrides_bus": ("bus_id", {"excess_cost": "excess_cost"}),
    "penalty_overrides_line": ("line_id", {"exchange_cost": "exchange_cost"}),
    "penalty_overrides_hydro": (
        "hydro_id",
        {
            name: name
            for name in (
                "spillage_cost",
                "diversion_cost",
                "turbined_violation_below_cost",
                "outflow_violation_below_cost",
                "outflow_violation_above_cost",
                "generation_violation_below_cost",
            )
        },
    ),
}
# Columns that the reference program reads without any effect on its results.
_WITHOUT_EFFECT = {
    "hydro_bounds": ("max_diversion_m3s",),
    "penalty_overrides_hydro": (
        "water_withdrawal_violation_cost",
        "water_withdrawal_violation_pos_cost",
        "water_withdrawal_violation_neg_cost",
        "inflow_nonnegativity_cost",
    ),
    "penalty_overrides_ncs": ("curtailment_cost",),
}


@dataclass(frozen=True)
class Overrides:
    """Stage values by (position of the entity, position of the stage).

    Attributes:
        tables: For each table of ``constraints/``, the replaced fields.
        load: Load factor of each block.
        source: Availability factor of each block.
        direct: Factor of a line's direct capacity in each block.
        reverse: Factor of a line's reverse capacity in each block.
    """

    tables: Mapping[str, Values]
    load: Factors
    source: Factors
    direct: Factors
    reverse: Factors

    def _of(self, table: str, key: Key) -> Mapping[str, Any]:
        return self.tables.get(table, {}).get(key, {})

    def bus(self, bus: Bus, key: Key) -> Bus:
        """Return ``bus`` as it is at the stage."""
        return replace(bus, **self._of("penalty_overrides_bus", key))

    def line(self, line: Line, key: Key) -> Line:
        """Return ``line`` as it is at the stage, without block factors."""
        return replace(
            line, **self._of("line_bounds", key), **self._of("penalty_overrides_line", key)
        )

    def thermal(self, thermal: Thermal, key: Key) -> Thermal:
        """Return ``thermal`` as it is at the stage."""
        changes = self._of("thermal_bounds", key)
        return replace(thermal, **changes) if changes else thermal

    def source_at(self, source: Source, key: Key) -> Source:
        """Return ``source`` as it is at the stage; its cost has no stage value."""
        return replace(source, **self._of("ncs_bounds", key))

    def hydro(self, hydro: Hydro, key: Key) -> Hydro:
        """Return ``hydro`` as it is at the stage, its productivity excepted."""
        bounds, costs = self._of("hydro_bounds", key), self._of("penalty_overrides_hydro", key)
        if not bounds and not costs:
            return hydro
        return replace(hydro, costs=replace(hydro.costs, **costs), **bounds)


def parse_overrides(
    files: CaseFiles, horizon: Horizon, positions: Mapping[str, Positions]
) -> Overrides:
    """Read every override; rows that name an unknown entity or stage, or a block, have no effect.

    Args:
        files: The files of the case; values and rows that have no effect add a warning.
        horizon: The stages.
        positions: Position by id, for each key column.
    """
    for name, columns in _WITHOUT_EFFECT.items():
        file = f"constraints/{name}.parquet"
        files.warnings.extend(
            f"{file}: {column} is ignored, as the reference program does"
            for column in columns
            if column in files.columns_with_values(file)
        )

    def factors(file: str, key: str, names: tuple[str, ...]) -> Mapping[str, Factors]:
        return _parse_factors(files, file, key, names, horizon, positions[key])

    exchange = factors(
        "constraints/exchange_factors.json", "line_id", ("direct_factor", "reverse_factor")
    )
    return Overrides(
        tables={
            name: _parse_table(files, name, key, fields, horizon, positions[key])
            for name, (key, fields) in _TABLES.items()
        },
        load=factors("scenarios/load_factors.json", "bus_id", ("factor",))["factor"],
        source=factors("scenarios/non_controllable_factors.json", "ncs_id", ("factor",))["factor"],
        direct=exchange["direct_factor"],
        reverse=exchange["reverse_factor"],
    )


def _parse_table(
    files: CaseFiles,
    name: str,
    key: str,
    columns: Mapping[str, str],
    horizon: Horizon,
    positions: Positions,
) -> Values:
    result: dict[Key, dict[str, float]] = {}
    file = f"constraints/{name}.parquet"
    for row in files.rows(file, (key, "stage_id")):
        entity, stage = row.integer(key), row.integer("stage_id")
        if entity not in positions or stage not in horizon.positions:
            files.skip(file, UNKNOWN)
            continue
        if "block_id" in row:
            files.skip(file, "a block")
            continue
        values = result.setdefault((positions[entity], horizon.positions[stage]), {})
        for column, field in columns.items():
            if column in row:
                # A negative withdrawal is water from elsewhere.
                lowest = None if column == "water_withdrawal_m3s" else 0.0
                values[field] = row.number(column, minimum=lowest)
    return result


def _parse_factors(
    files: CaseFiles,
    file: str,
    key: str,
    names: tuple[str, ...],
    horizon: Horizon,
    positions: Positions,
) -> Mapping[str, Factors]:
    result: dict[str, dict[Key, tuple[float, ...]]] = {name: {} for name in names}
    root = file.rsplit("/", 1)[-1].removesuffix(".json")
    for record in files.record(file).records(root):
        entity, stage = record.integer(key), record.integer("stage_id")
        if entity not in positions or stage not in horizon.positions:
            files.skip(file, UNKNOWN)
            continue
        t = horizon.positions[stage]
        last = horizon.stages[t].last_block
        items = record.records("block_factors")
        blocks = [item.integer("block_id", minimum=0, maximum=last) for item in items]
        for name in names:
            found = {
                block: item.number(name, minimum=0.0)
                for block, item in zip(blocks, items, strict=True)
            }
            values = tuple(found.get(k, 1.0) for k in range(len(horizon.stages[t].hours)))
            result[name][positions[entity], t] = values
    return result
