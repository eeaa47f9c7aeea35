"""The deterministic equivalent of a small case: the whole scenario tree as one dense problem.

Written from the formulas alone, and sharing no code with the trainer except the opening tree:
columns by name, rows as dictionaries, a dense matrix, one solve. The nested risk measure is in
its linear form (R. T. Rockafellar, S. Uryasev, "Optimization of conditional value-at-risk",
Journal of Risk 2, 2000).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import highspy._core as highs
import numpy as np
import pyarrow.parquet as pq

INF = np.inf


class Problem:
    """Columns by name and rows as dictionaries from name to coefficient."""

    def __init__(self) -> None:
        self.columns: dict[Any, int] = {}
        self.cost: list[float] = []
        self.lower: list[float] = []
        self.upper: list[float] = []
        self.rows: list[tuple[dict[Any, float], float, float]] = []

    def column(self, name: Any, cost: float = 0.0, lower: float = 0.0, upper: float = INF) -> Any:
        self.columns[name] = len(self.cost)
        self.cost.append(cost)
        self.lower.append(lower)
        self.upper.append(upper)
        return name

    def row(self, terms: dict[Any, float], lower: float, upper: float = INF) -> None:
        self.rows.append((terms, lower, upper))

    def solve(self) -> float:
        matrix = np.zeros((len(self.rows), len(self.cost)))
        for i, (terms, _, _) in enumerate(self.rows):
            for name, value in terms.items():
                matrix[i, self.columns[name]] += value
        lp = highs.HighsLp()
        lp.num_row_, lp.num_col_ = matrix.shape
        lp.col_cost_, lp.col_lower_, lp.col_upper_ = map(
            np.array, (self.cost, self.lower, self.upper)
        )
        lp.row_lower_ = np.array([row[1] for row in self.rows])
        lp.row_upper_ = np.array([row[2] for row in self.rows])
        lp.a_matrix_.format_ = highs.MatrixFormat.kRowwise
        lp.a_matrix_.start_ = np.arange(0, matrix.size + 1, matrix.shape[1])
        lp.a_matrix_.index_ = np.tile(np.arange(matrix.shape[1]), matrix.shape[0])
        lp.a_matrix_.value_ = matrix.reshape(-1)
        solver = highs._Highs()
        solver.setOptionValue("output_flag", False)
        solver.passModel(lp)
        solver.run()
        assert solver.getModelStatus() == highs.HighsModelStatus.kOptimal
        return float(solver.getObjectiveValue())


class Equivalent:
    """Reads the files of a case itself; only what ``systems()`` of the test generates is known."""

    def __init__(self, case: Path, tree: list[np.ndarray]) -> None:
        def document(name: str) -> Any:
            return json.loads((case / name).read_text())

        def table(name: str, *keys: str) -> dict[Any, dict[str, Any]]:
            path = case / "scenarios" / f"{name}.parquet"
            rows = pq.read_table(path).to_pylist() if path.is_file() else []
            return {tuple(row[key] for key in keys): row for row in rows}

        self.tree = tree
        self.costs = document("penalties.json")
        self.stages = document("stages.json")["stages"]
        self.rate = document("stages.json")["policy_graph"]["annual_discount_rate"]
        self.buses = document("system/buses.json")["buses"]
        self.lines = document("system/lines.json")["lines"]
        self.thermals = document("system/thermals.json")["thermals"]
        self.hydros = document("system/hydros.json")["hydros"]
        path = case / "system" / "non_controllable_sources.json"
        self.sources = (
            document("system/non_controllable_sources.json")["non_controllable_sources"]
            if path.is_file()
            else []
        )
        self.initial = document("initial_conditions.json")
        modeling = document("config.json")["modeling"]
        self.penalty = modeling["inflow_non_negativity"]["method"] == "penalty"
        self.inflow = table("inflow_seasonal_stats", "hydro_id", "stage_id")
        self.lag = table("inflow_ar_coefficients", "hydro_id", "stage_id")
        self.load = table("load_seasonal_stats", "bus_id", "stage_id")
        self.wind = table("non_controllable_stats", "ncs_id", "stage_id")
        self.random_buses = sorted({b for (b, _), row in self.load.items() if row["std_mw"] > 0})
        self.problem = Problem()

    def optimum(self) -> float:
        """Return the optimal risk-adjusted cost."""
        root = self.problem.column("root", 1.0, -INF)
        self._value_of_children(root, (), 0)
        return self.problem.solve()

    def _value_of_children(self, value: Any, node: tuple[int, ...], t: int) -> None:
        """Make ``value`` at least the risk-adjusted cost of the children of ``node``."""
        openings = len(self.tree[t])
        measure = self.stages[max(t - 1, 0)].get("risk_measure", "expectation")
        most = 1.0 / openings
        if measure != "expectation":
            tail, weight = measure["cvar"]["alpha"], measure["cvar"]["lambda"]
            # The reference program bounds each weight from above only.
            most = min(1.0, (1.0 - weight) / openings + weight / (tail * openings))
        children = [self._node((*node, opening), t) for opening in range(openings)]
        if most * openings <= 1.0 + 1e-9:
            self.problem.row({value: 1.0, **dict.fromkeys(children, -1.0 / openings)}, 0.0)
            return
        # The largest expectation with weights of at most ``most`` is the conditional value at
        # risk of the share 1 / (most * openings).
        quantile = self.problem.column(("quantile", node), 0.0, -INF)
        terms = {value: 1.0, quantile: -1.0}
        for child in children:
            excess = self.problem.column(("excess", child))
            self.problem.row({excess: 1.0, child: -1.0, quantile: 1.0}, 0.0)
            terms[excess] = -most
        self.problem.row(terms, 0.0)

    def _days(self, t: int) -> int:
        stage = self.stages[t]
        start, end = (np.datetime64(stage[key]) for key in ("start_date", "end_date"))
        return int((end - start).astype(int))

    def _node(self, node: tuple[int, ...], t: int) -> Any:
        """Add the problem of a node and return the column of its cost and what follows."""
        problem, noise = self.problem, self.tree[t][node[-1]]
        hours = [block["hours"] for block in self.stages[t]["blocks"]]
        terms: dict[Any, float] = {}

        def column(name: str, *key: Any, cost: float = 0.0, upper: float = INF, lower: float = 0.0):
            result = problem.column((name, node, *key), 0.0, lower, upper)
            terms[result] = -cost
            return result

        for b, bus in enumerate(self.buses):
            for k, hour in enumerate(hours):
                for i, segment in enumerate(self.costs["bus"]["deficit_segments"]):
                    depth = segment["depth_mw"]
                    column(
                        "deficit",
                        b,
                        k,
                        i,
                        cost=segment["cost"] * hour,
                        upper=INF if depth is None else depth,
                    )
                column("surplus", b, k, cost=self.costs["bus"]["excess_cost"] * hour)
            assert bus["id"] == b
        for j, thermal in enumerate(self.thermals):
            for k, hour in enumerate(hours):
                limits = thermal["generation"]
                column(
                    "thermal",
                    j,
                    k,
                    cost=thermal["cost_per_mwh"] * hour,
                    lower=limits["min_mw"],
                    upper=limits["max_mw"],
                )
        for i, line in enumerate(self.lines):
            for k, hour in enumerate(hours):
                for way in ("direct", "reverse"):
                    limit = line["capacity"][f"{way}_mw"]
                    column(way, i, k, cost=self.costs["line"]["exchange_cost"] * hour, upper=limit)
        for r, source in enumerate(self.sources):
            share = self._share(r, t, noise)
            curtailment = self.costs["non_controllable_source"]["curtailment_cost"]
            for k, hour in enumerate(hours):
                upper = source["max_generation_mw"] * share
                column("source", r, k, cost=-curtailment * hour, upper=upper)
        for h in range(len(self.hydros)):
            self._plant(node, t, h, noise, hours, column)
        for h in range(len(self.hydros)):
            self._water(node, t, h, hours)
        for b in range(len(self.buses)):
            self._balance(node, t, b, noise, len(hours))
        future = column("future", upper=0.0 if t == len(self.stages) - 1 else INF)
        terms[future] = -((1.0 + self.rate) ** (-self._days(t) / 365.25))
        cost = problem.column(("cost", node), 0.0, -INF)
        problem.row({cost: 1.0, **terms}, 0.0, 0.0)
        if t + 1 < len(self.stages):
            self._value_of_children(future, node, t + 1)
        return cost

    def _plant(
        self, node: Any, t: int, h: int, noise: Any, hours: list[float], column: Any
    ) -> None:
        plant, costs = self.hydros[h], self.costs["hydro"]
        generation, outflow = plant["generation"], plant["outflow"]
        rate = generation["productivity_mw_per_m3s"]
        column("end", h, upper=plant["reservoir"]["max_storage_hm3"])
        inflow = column("inflow", h, lower=-INF)
        for k, hour in enumerate(hours):
            limit = min(generation["max_turbined_m3s"], generation["max_generation_mw"] / rate)
            turbined = column("turbined", h, k, upper=limit)
            spilled = column("spilled", h, k, cost=costs["spillage_cost"] * hour)
            out = {turbined: 1.0, spilled: 1.0}
            if "diversion" in plant:
                limit = plant["diversion"]["max_flow_m3s"]
                diverted = column(
                    "diverted", h, k, cost=costs["diversion_cost"] * hour, upper=limit
                )
                out[diverted] = 1.0
            missing = column("missing", h, k, cost=costs["outflow_violation_below_cost"] * hour)
            self.problem.row({**out, missing: 1.0}, outflow["min_outflow_m3s"])
        mean, std = (self.inflow[h, t][key] for key in ("mean_m3s", "std_m3s"))
        base, spread, before = mean, std, {}
        if (h, t) in self.lag:
            row, earlier = self.lag[h, t], self.inflow[h, t - 1]
            psi = row["coefficient"] * std / earlier["std_m3s"]
            base, spread = mean - psi * earlier["mean_m3s"], std * row["residual_std_ratio"]
            if t:
                before = {("inflow", node[:-1], h): -psi}
            else:
                base += psi * self.initial["past_inflows"][h]["values_m3s"][0]
        value = base + spread * noise[h]
        self.problem.row({inflow: 1.0, **before}, value, value)
        if self.penalty:
            column("added", h, cost=costs["inflow_nonnegativity_cost"] * sum(hours))

    def _water(self, node: Any, t: int, h: int, hours: list[float]) -> None:
        volume = 0.0036 * sum(hours)
        terms = {("end", node, h): 1.0, ("inflow", node, h): -volume}
        if self.penalty:
            terms["added", node, h] = -volume
        for u, plant in enumerate(self.hydros):
            sign = (u == h) - (plant["downstream_id"] == h)
            shift = (u == h) - (plant.get("diversion", {}).get("downstream_id") == h)
            for k, hour in enumerate(hours):
                terms["turbined", node, u, k] = sign * 0.0036 * hour
                terms["spilled", node, u, k] = sign * 0.0036 * hour
                if "diversion" in plant:
                    terms["diverted", node, u, k] = shift * 0.0036 * hour
        start = 0.0
        if t:
            terms["end", node[:-1], h] = -1.0
        else:
            start = self.initial["storage"][h]["value_hm3"]
        self.problem.row(terms, start, start)

    def _balance(self, node: Any, t: int, b: int, noise: Any, blocks: int) -> None:
        row = self.load[b, t]
        load = row["mean_mw"]
        if b in self.random_buses and t:
            # In the first stage the bound is evaluated at the mean load.
            at = len(self.hydros) + self.random_buses.index(b)
            load = max(load + row["std_mw"] * noise[at], 0.0)
        for k in range(blocks):
            terms: dict[Any, float] = {("surplus", node, b, k): -1.0}
            for i in range(len(self.costs["bus"]["deficit_segments"])):
                terms["deficit", node, b, k, i] = 1.0
            for j, thermal in enumerate(self.thermals):
                terms["thermal", node, j, k] = float(thermal["bus_id"] == b)
            for r, source in enumerate(self.sources):
                terms["source", node, r, k] = float(source["bus_id"] == b)
            for h, plant in enumerate(self.hydros):
                rate = plant["generation"]["productivity_mw_per_m3s"]
                terms["turbined", node, h, k] = rate * (plant["bus_id"] == b)
            for i, line in enumerate(self.lines):
                sign = float((line["target_bus_id"] == b) - (line["source_bus_id"] == b))
                terms["direct", node, i, k], terms["reverse", node, i, k] = sign, -sign
            self.problem.row(terms, load, load)

    def _share(self, r: int, t: int, noise: Any) -> float:
        if not self.wind:
            return 1.0
        row = self.wind[r, t]
        at = len(self.hydros) + len(self.random_buses) + r
        return min(max(row["mean"] + row["std"] * noise[at], 0.0), 1.0)
