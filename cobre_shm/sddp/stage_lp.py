"""The linear problem of one stage as plain arrays, independent of any solver.

Power, inflow and stored water of one stage against the future cost ``theta``. All that changes
from one solve to the next are bounds of columns: the state (start storage, inflow lags) and the
noise (inflow, random load, availability). Cuts are rows that are added later.

Units: storage hm3, flows m3/s, power MW. Costs are divided by ``scale`` so that the solver's
absolute tolerances make sense; ``theta`` is in the scaled unit already.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from cobre_shm.sddp.case import Case
from cobre_shm.sddp.constraints import GenericConstraint, Term
from cobre_shm.sddp.layout import Floats, Indices, Layout, StageLp
from cobre_shm.sddp.scenarios import inflow_model
from cobre_shm.sddp.system import Hydro

# One m3/s for one hour is 3600 m3 = 0.0036 hm3.
HM3_PER_M3S_HOUR = 0.0036

_LARGE_STUDY = 1e10


def cost_scale(case: Case) -> float:
    """Return the number that all costs are divided by inside the problems of ``case``.

    Large systems have objectives for which the solver's absolute tolerance of 1e-7 is below
    rounding; dividing by more keeps them solvable. Any value gives the same results up to
    rounding.
    """
    dearest = max((thermal.cost_per_mwh for thermal in case.thermals), default=0.0)
    energy = sum(
        mean * math.fsum(case.horizon.stages[t].hours)
        for (_, t), (mean, _) in case.statistics.load.items()
    )
    return 1e6 if energy * dearest > _LARGE_STUDY else 1e3


class _Builder:
    """Collects columns and rows; a row is written as (column, coefficient) pairs."""

    def __init__(self) -> None:
        self.cost: list[float] = []
        self.lower: list[float] = []
        self.upper: list[float] = []
        self.row_lower: list[float] = []
        self.row_upper: list[float] = []
        self.starts: list[int] = [0]
        self.indices: list[int] = []
        self.values: list[float] = []

    def column(self, cost: float = 0.0, lower: float = 0.0, upper: float = math.inf) -> int:
        self.cost.append(cost)
        self.lower.append(lower)
        self.upper.append(upper)
        return len(self.cost) - 1

    def row(self, terms: Sequence[tuple[int, float]], lower: float, upper: float) -> int:
        merged: dict[int, float] = {}
        for column, value in terms:
            merged[column] = merged.get(column, 0.0) + value
        self.indices.extend(merged)
        self.values.extend(merged.values())
        self.starts.append(len(self.indices))
        self.row_lower.append(lower)
        self.row_upper.append(upper)
        return len(self.row_lower) - 1


def build_stage(case: Case, t: int, scale: float) -> StageLp:
    """Return the problem of stage position ``t`` with costs divided by ``scale``."""
    return _StageBuilder(case, t, scale).build()


class _StageBuilder:
    def __init__(self, case: Case, t: int, scale: float) -> None:
        self.case, self.t = case, t
        self.stage = case.horizon.stages[t]
        self.last = t == case.stages - 1
        self.lp = _Builder()
        self.at = Layout()
        self.model = inflow_model(case.statistics, case.horizon, t, len(case.hydros))
        self.hydros = [case.overrides.hydro(h, (i, t)) for i, h in enumerate(case.hydros)]
        self.productivity = [h.productivity_by_stage.get(t, h.productivity) for h in case.hydros]
        self.blocks = range(len(self.stage.hours))
        # $ per unit and block hours to the objective's unit.
        self.weights = [hours / scale for hours in self.stage.hours]
        self.volumes = [HM3_PER_M3S_HOUR * hours for hours in self.stage.hours]
        self.stage_weight = math.fsum(self.stage.hours) / scale
        self.stage_volume = HM3_PER_M3S_HOUR * math.fsum(self.stage.hours)

    def build(self) -> StageLp:
        self._add_state()
        self._add_hydros()
        self._add_network()
        self._add_slacks()
        self._add_water_rows()
        self._add_load_rows()
        self._add_inflow_rows()
        self._add_limit_rows()
        self._add_generic_rows()
        lp, at = self.lp, self.at
        noise = list(at.noise_inflow)
        for bus in self.case.statistics.random_buses:
            noise += at.random_load[bus]
        for source in self.case.statistics.random_sources:
            noise += at.source[source] or []
        kept_lags = at.lags[: -len(self.hydros)] if at.lags else []
        newest = at.inflow if at.lags else []

        def floats(values: list[float]) -> Floats:
            return np.array(values, dtype=np.float64)

        def indices(values: list[int]) -> Indices:
            return np.array(values, dtype=np.int32)

        return StageLp(
            index=self.t,
            stage_id=self.stage.id,
            hours=self.stage.hours,
            discount=self.stage.discount,
            layout=at,
            inflow=self.model,
            productivity=floats(self.productivity),
            state_columns=indices(at.start_storage + at.lags),
            next_state_columns=indices(at.storage + newest + kept_lags),
            noise_columns=indices(noise),
            cost=floats(lp.cost),
            lower=floats(lp.lower),
            upper=floats(lp.upper),
            row_lower=floats(lp.row_lower),
            row_upper=floats(lp.row_upper),
            starts=indices(lp.starts),
            indices=indices(lp.indices),
            values=floats(lp.values),
        )

    def _add_state(self) -> None:
        at, column = self.at, self.lp.column
        at.storage = [column(lower=h.min_storage_hm3, upper=h.max_storage_hm3) for h in self.hydros]
        at.start_storage = [column(upper=0.0) for _ in self.hydros]
        at.lags = [column(upper=0.0) for _ in range(self.model.psi.size)]
        at.noise_inflow = [column(upper=0.0) for _ in self.hydros]
        at.inflow = [column(lower=-math.inf) for _ in self.hydros] if at.lags else at.noise_inflow
        at.theta = column(self.stage.discount, upper=0.0 if self.last else math.inf)

    def _per_block(self, cost: float, upper: float = math.inf, lower: float = 0.0) -> list[int]:
        return [self.lp.column(cost * weight, lower, upper) for weight in self.weights]

    def _add_hydros(self) -> None:
        at = self.at
        for hydro, productivity in zip(self.hydros, self.productivity, strict=True):
            limit = hydro.max_turbined_m3s
            if productivity > 0:
                limit = min(limit, hydro.max_generation_mw / productivity)
            at.turbined.append(self._per_block(0.0, limit))
        for hydro in self.hydros:
            at.spilled.append(self._per_block(hydro.costs.spillage_cost))
        for hydro in self.hydros:
            diverts = hydro.diversion_target is not None
            at.diverted.append(
                self._per_block(hydro.costs.diversion_cost, hydro.max_diversion_m3s)
                if diverts
                else None
            )

    def _add_network(self) -> None:
        at, case, t, overrides = self.at, self.case, self.t, self.case.overrides
        ones = (1.0,) * len(self.stage.hours)
        for i, thermal in enumerate(case.thermals):
            plant = overrides.thermal(thermal, (i, t))
            at.thermal.append(self._per_block(plant.cost_per_mwh, plant.max_mw, plant.min_mw))
        for i, line in enumerate(case.lines):
            link = overrides.line(line, (i, t))
            pairs = ((link.direct_mw, overrides.direct), (link.reverse_mw, overrides.reverse))
            for (capacity, table), columns in zip(pairs, (at.direct, at.reverse), strict=True):
                factors = table.get((i, t), ones)
                columns.append(
                    [
                        self.lp.column(link.exchange_cost * weight, 0.0, capacity * factor)
                        for weight, factor in zip(self.weights, factors, strict=True)
                    ]
                )
        for i, item in enumerate(case.sources):
            source = overrides.source_at(item, (i, t))
            if not source.is_active(self.stage.id):
                at.source.append(None)
                continue
            factors = overrides.source.get((i, t), ones)
            at.source.append(
                [
                    self.lp.column(
                        -source.curtailment_cost * weight, 0.0, source.max_generation_mw * factor
                    )
                    for weight, factor in zip(self.weights, factors, strict=True)
                ]
            )
        buses = [overrides.bus(bus, (b, t)) for b, bus in enumerate(case.buses)]
        for bus in buses:
            at.deficit.append(
                [self._per_block(segment.cost, segment.depth_mw) for segment in bus.deficit]
            )
        for bus in buses:
            at.excess.append(self._per_block(bus.excess_cost))
        for b in case.statistics.random_buses:
            # The solver offers no batch call for row bounds, so a random load is a fixed column.
            at.random_load[b] = [self.lp.column(upper=0.0) for _ in self.blocks]

    def _add_slacks(self) -> None:
        at, column = self.at, self.lp.column
        if self.case.config.inflow_slack:
            at.inflow_slack = [
                column(h.costs.inflow_nonnegativity_cost * self.stage_weight) for h in self.hydros
            ]
        for hydro in self.hydros:
            if hydro.water_withdrawal_m3s <= 0:
                at.withdrawal_slack.append(None)
                continue
            costs = hydro.costs
            symmetric = costs.water_withdrawal_violation_cost
            short = costs.water_withdrawal_violation_neg_cost
            over = costs.water_withdrawal_violation_pos_cost
            at.withdrawal_slack.append(
                (
                    column((symmetric if short is None else short) * self.stage_weight),
                    column((symmetric if over is None else over) * self.stage_weight),
                )
            )

    def _released(self, h: int) -> list[tuple[int, float]]:
        """Turbined and spilled water of a plant in hm3."""
        at = self.at
        return [
            (columns[h][k], self.volumes[k])
            for k in self.blocks
            for columns in (at.turbined, at.spilled)
        ]

    def _diverted(self, h: int) -> list[tuple[int, float]]:
        columns = self.at.diverted[h]
        return [] if columns is None else list(zip(columns, self.volumes, strict=True))

    def _add_water_rows(self) -> None:
        at, volume = self.at, self.stage_volume
        for h, hydro in enumerate(self.hydros):
            terms = [(at.storage[h], 1.0), (at.start_storage[h], -1.0), (at.inflow[h], -volume)]
            terms += self._released(h) + self._diverted(h)
            for u, other in enumerate(self.hydros):
                if other.downstream == h:
                    terms += [(column, -value) for column, value in self._released(u)]
                if other.diversion_target == h:
                    terms += [(column, -value) for column, value in self._diverted(u)]
            if at.inflow_slack:
                terms.append((at.inflow_slack[h], -volume))
            slack = at.withdrawal_slack[h]
            if slack is not None:
                terms += [(slack[0], -volume), (slack[1], volume)]
            demand = -volume * hydro.water_withdrawal_m3s
            at.water_rows.append(self.lp.row(terms, demand, demand))

    def _add_load_rows(self) -> None:
        at, case = self.at, self.case
        for b in range(len(case.buses)):
            factors = case.overrides.load.get((b, self.t), (1.0,) * len(self.stage.hours))
            mean, _ = case.statistics.load.get((b, self.t), (0.0, 0.0))
            rows = []
            for k in self.blocks:
                terms = [
                    (at.turbined[h][k], self.productivity[h])
                    for h, hydro in enumerate(self.hydros)
                    if hydro.bus == b
                ]
                terms += [
                    (at.thermal[j][k], 1.0)
                    for j, thermal in enumerate(case.thermals)
                    if thermal.bus == b
                ]
                terms += [
                    (columns[k], 1.0)
                    for source, columns in zip(case.sources, at.source, strict=True)
                    if source.bus == b and columns is not None
                ]
                for i, line in enumerate(case.lines):
                    sign = (line.target == b) - (line.source == b)
                    if sign:
                        terms += [(at.direct[i][k], sign), (at.reverse[i][k], -sign)]
                terms += [(segment[k], 1.0) for segment in at.deficit[b]]
                terms.append((at.excess[b][k], -1.0))
                load = mean * factors[k]
                if b in at.random_load:
                    terms.append((at.random_load[b][k], -1.0))
                    load = 0.0
                rows.append(self.lp.row(terms, load, load))
            at.load_rows.append(rows)

    def _add_inflow_rows(self) -> None:
        at, count = self.at, len(self.hydros)
        if not at.lags:
            return
        for h in range(count):
            terms = [(at.inflow[h], 1.0), (at.noise_inflow[h], -1.0)]
            terms += [
                (at.lags[lag * count + h], -float(psi))
                for lag, psi in enumerate(self.model.psi[:, h])
                if psi != 0.0
            ]
            self.lp.row(terms, 0.0, 0.0)

    def _add_limit_rows(self) -> None:
        for h, hydro in enumerate(self.hydros):
            for k, weight in enumerate(self.weights):
                self._limit_plant(h, hydro, k, weight)

    def _limit_plant(self, h: int, hydro: Hydro, k: int, weight: float) -> None:
        at, costs, lp = self.at, hydro.costs, self.lp
        turbined = at.turbined[h][k]
        outflow = [(turbined, 1.0), (at.spilled[h][k], 1.0)]
        diverted = at.diverted[h]
        if diverted is not None:
            outflow.append((diverted[k], 1.0))
        # A minimum generation is measured with the plant's own productivity, as the reference
        # program does, even where the stage has another.
        floors = (
            (outflow, hydro.min_outflow_m3s, costs.outflow_violation_below_cost),
            ([(turbined, 1.0)], hydro.min_turbined_m3s, costs.turbined_violation_below_cost),
            (
                [(turbined, hydro.productivity)],
                hydro.min_generation_mw,
                costs.generation_violation_below_cost,
            ),
        )
        for terms, floor, cost in floors:
            if floor > 0:
                lp.row([*terms, (lp.column(cost * weight), 1.0)], floor, math.inf)
        if math.isfinite(hydro.max_outflow_m3s):
            slack = lp.column(costs.outflow_violation_above_cost * weight)
            lp.row([*outflow, (slack, -1.0)], -math.inf, hydro.max_outflow_m3s)

    def _add_generic_rows(self) -> None:
        for constraint in self.case.constraints:
            for block, bound in constraint.bounds.get(self.t, ()):
                for k in self.blocks if block is None else (block,):
                    self._constrain(constraint, k, bound)

    def _constrain(self, constraint: GenericConstraint, k: int, bound: float) -> None:
        terms = [
            (column, term.factor * value)
            for term in constraint.terms
            for column, value in self._quantity(term, k if term.block is None else term.block)
        ]
        if constraint.penalty is not None:
            cost = constraint.penalty * self.weights[k]
            signs = {"<=": (-1.0,), ">=": (1.0,), "==": (-1.0, 1.0)}[constraint.sense]
            terms += [(self.lp.column(cost), sign) for sign in signs]
        self.lp.row(terms, *constraint.limits(bound))

    def _quantity(self, term: Term, k: int) -> list[tuple[int, float]]:
        at, i = self.at, term.entity
        match term.quantity:
            case "thermal_generation":
                return [(at.thermal[i][k], 1.0)]
            case "hydro_generation":
                return [(at.turbined[i][k], self.productivity[i])]
            case "hydro_turbined":
                return [(at.turbined[i][k], 1.0)]
            case "hydro_spillage":
                return [(at.spilled[i][k], 1.0)]
            case "hydro_outflow":
                return [(at.turbined[i][k], 1.0), (at.spilled[i][k], 1.0)]
            case "hydro_storage":
                return [(at.storage[i], 1.0)]
            case "line_direct":
                return [(at.direct[i][k], 1.0)]
            case "line_reverse":
                return [(at.reverse[i][k], 1.0)]
            case "line_exchange":
                return [(at.direct[i][k], 1.0), (at.reverse[i][k], -1.0)]
            case "bus_deficit":
                return [(segment[k], 1.0) for segment in at.deficit[i]]
            case _:
                return [(at.excess[i][k], 1.0)]
