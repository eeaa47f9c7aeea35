"""Values that differ by stage: the tables in ``constraints/`` and the block factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from cobre_shm.sddp.documents import Documents
from cobre_shm.sddp.fields import Record, rows
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
        return replace(thermal, **self._of("thermal_bounds", key))

    def source_at(self, source: Source, key: Key) -> Source:
        """Return ``source`` as it is at the stage; its cost has no stage value."""
        return replace(source, **self._of("ncs_bounds", key))

    def hydro(self, hydro: Hydro, key: Key) -> Hydro:
        """Return ``hydro`` as it is at the stage, its productivity excepted."""
        costs = replace(hydro.costs, **self._of("penalty_overrides_hydro", key))
        return replace(hydro, costs=costs, **self._of("hydro_bounds", key))


def parse_overrides(
    documents: Documents,
    horizon: Horizon,
    positions: Mapping[str, Mapping[int, int]],
    warnings: list[str],
) -> Overrides:
    """Read every override; rows that name an unknown entity or stage have no effect.

    Args:
        documents: The files of the case.
        horizon: The stages.
        positions: Position by id, for each key column.
        warnings: Gets a line for every column with values that have no effect.

    Raises:
        CaseError: A value has the wrong type or is negative.
    """
    for name, columns in _WITHOUT_EFFECT.items():
        file = f"constraints/{name}.parquet"
        warnings.extend(
            f"{file}: {column} is ignored, as the reference program does"
            for column in columns
            if any(value is not None for value in documents.get(file, {}).get(column, ()))
        )
    tables: dict[str, Values] = {}
    for name, (key, fields) in _TABLES.items():
        file = f"constraints/{name}.parquet"
        if file in documents:
            tables[name] = _parse_table(documents[file], file, key, fields, horizon, positions[key])

    def factors(file: str, key: str, names: tuple[str, ...]) -> Mapping[str, Factors]:
        root = file.rsplit("/", 1)[-1].removesuffix(".json")
        records = Record(documents.get(file, {}), file).records(root, [])
        return _parse_factors(records, key, names, horizon, positions[key])

    exchange = factors(
        "constraints/exchange_factors.json", "line_id", ("direct_factor", "reverse_factor")
    )
    return Overrides(
        tables=tables,
        load=factors("scenarios/load_factors.json", "bus_id", ("factor",))["factor"],
        source=factors("scenarios/non_controllable_factors.json", "ncs_id", ("factor",))["factor"],
        direct=exchange["direct_factor"],
        reverse=exchange["reverse_factor"],
    )


def _parse_table(
    table: Mapping[str, list[Any]],
    file: str,
    key: str,
    columns: Mapping[str, str],
    horizon: Horizon,
    positions: Mapping[int, int],
) -> Values:
    result: dict[Key, dict[str, float]] = {}
    for row in rows(table, file, (key, "stage_id")):
        entity, stage = row.integer(key), row.integer("stage_id")
        if entity not in positions or stage not in horizon.positions or "block_id" in row:
            continue
        values = result.setdefault((positions[entity], horizon.positions[stage]), {})
        for column, name in columns.items():
            if column in row:
                # A negative withdrawal is water from elsewhere.
                lowest = None if column == "water_withdrawal_m3s" else 0.0
                values[name] = row.number(column, minimum=lowest)
    return result


def _parse_factors(
    records: list[Record],
    key: str,
    names: tuple[str, ...],
    horizon: Horizon,
    positions: Mapping[int, int],
) -> Mapping[str, Factors]:
    result: dict[str, dict[Key, tuple[float, ...]]] = {name: {} for name in names}
    for record in records:
        entity, stage = record.integer(key), record.integer("stage_id")
        if entity not in positions or stage not in horizon.positions:
            continue
        t = horizon.positions[stage]
        blocks = len(horizon.stages[t].hours)
        for name in names:
            values = [1.0] * blocks
            for item in record.records("block_factors"):
                block = item.integer("block_id", minimum=0, maximum=blocks - 1)
                values[block] = item.number(name, 1.0, minimum=0.0)
            result[name][positions[entity], t] = tuple(values)
    return result
