"""Running a trained policy on fresh trajectories.

The trajectories are drawn from the same openings as the training, with seeds of their own, and
are shared between the ranks in the same way. Each solve is a chain of its own, so that the
result is equal for any number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cobre_shm.communicator import Communicator
from cobre_shm.sddp.case import Case
from cobre_shm.sddp.cuts import StageCuts
from cobre_shm.sddp.distribution import ItemGather, Shares
from cobre_shm.sddp.errors import SolverError
from cobre_shm.sddp.failed_problem import ProblemWriter
from cobre_shm.sddp.node_arrays import NodeArrays
from cobre_shm.sddp.noise import SIMULATION_SCENARIO_OFFSET
from cobre_shm.sddp.scenarios import draw_opening
from cobre_shm.sddp.solver import Check, Place, StageSolver
from cobre_shm.sddp.stage_lp import build_stage, cost_scale

Floats = npt.NDArray[np.float64]

# Key of the bases of the first scenario.
_FIRST = "first"


@dataclass(frozen=True)
class StageOutcome:
    """What happened at one stage, float64; the first axis of every array is the scenario.

    The arrays of all stages are parts of one, which holds the result once.

    Attributes:
        immediate_cost: (scenarios,), in $.
        future_cost: (scenarios,), cost of the following stages as the policy sees it, in $.
        turbined: (scenarios, hydros), mean over the stage, in m3/s.
        spilled: (scenarios, hydros), mean over the stage, in m3/s.
        inflow: (scenarios, hydros), in m3/s.
        storage_initial: (scenarios, hydros), in hm3.
        storage_final: (scenarios, hydros), in hm3.
        hydro_generation: (scenarios, hydros), mean over the stage, in MW.
        water_value: (scenarios, hydros), in $ per hm3.
        thermal: (scenarios, thermals, blocks), in MW.
        exchange: (scenarios, lines, blocks), net flow from source to target, in MW.
        source: (scenarios, sources, blocks), in MW.
        load: (scenarios, buses, blocks), in MW.
        deficit: (scenarios, buses, blocks), in MW.
        excess: (scenarios, buses, blocks), in MW.
        spot_price: (scenarios, buses, blocks), in $ per MWh.
    """

    immediate_cost: Floats
    future_cost: Floats
    turbined: Floats
    spilled: Floats
    inflow: Floats
    storage_initial: Floats
    storage_final: Floats
    hydro_generation: Floats
    water_value: Floats
    thermal: Floats
    exchange: Floats
    source: Floats
    load: Floats
    deficit: Floats
    excess: Floats
    spot_price: Floats


@dataclass(frozen=True)
class SimulationResult:
    """Result of a simulation, equal on every rank.

    Attributes:
        case: The case.
        total_cost: float64, one per scenario: the discounted cost in $.
        stages: What happened at each stage.
        discounts: float64, one per stage: its weight in the total cost.
    """

    case: Case
    total_cost: Floats
    stages: tuple[StageOutcome, ...]
    discounts: Floats

    def __repr__(self) -> str:
        # All of it would be tens of thousands of characters.
        return (
            f"<SimulationResult of case {self.case.name}: scenarios {len(self.total_cost)}, "
            f"mean cost {self.total_cost.mean():,.2f} $>"
        )


def simulate(
    case: Case,
    cuts: Sequence[StageCuts],
    comm: Communicator,
    scenarios: int | None = None,
    *,
    output_dir: str | Path | None = None,
    check: Check | None = None,
) -> SimulationResult:
    """Run the policy. Collective: every rank calls it with equal arguments.

    Args:
        case: The case, equal on every rank.
        cuts: The cuts of each stage, as :func:`cobre_shm.sddp.train` returns them.
        comm: The communicator; it stays open.
        scenarios: Number of trajectories; by default what the case asks for.
        output_dir: Where a problem without solution is written; None writes none.
        check: Called on this rank before every problem, as for :func:`cobre_shm.sddp.train`.

    Raises:
        SolverError: A stage problem has no solution; on every rank.
        AllocationFailed: There is no memory for the result.
        ValueError: The cuts do not fit the case, or as :func:`scenario_count` has it.
    """
    count = scenario_count(case, scenarios)
    if len(cuts) != case.stages:
        raise ValueError(f"cuts of {case.stages} stages are needed, not of {len(cuts)}")
    for found in cuts:
        if found.coefficients.shape != (len(found), case.state_size):
            raise ValueError(
                f"a cut of the case has {case.state_size} coefficients, "
                f"not {found.coefficients.shape[1]}"
            )
    scale = cost_scale(case)
    writer = None if output_dir is None else ProblemWriter(case, Path(output_dir) / "failed")
    node = NodeArrays(comm)
    tree = node.opening_tree(case)
    stages = []
    for t, noise in enumerate(tree):
        lp = build_stage(case, t, scale)
        solver = StageSolver(lp, node.noise_bounds(case, lp, noise), writer, check)
        if len(cuts[t]):
            solver.add_cuts(cuts[t].intercept / scale, cuts[t].coefficients / scale)
        stages.append(_Stage(case, solver, scale))
    widths = [stage.width for stage in stages]
    ends = np.cumsum(widths).tolist()
    factors = [1.0, *(stage.discount for stage in case.horizon.stages[:-1])]
    discounts = np.cumprod(np.array(factors))
    shares = Shares(count, comm)
    gather = ItemGather(shares, 1 + sum(widths), comm)

    def run(scenario: int, row: Floats) -> None:
        state, total = case.initial_state, 0.0
        for t, stage in enumerate(stages):
            opening = draw_opening(
                case.config.tree_seed, 0, SIMULATION_SCENARIO_OFFSET + scenario, t, len(tree[t])
            )
            record = row[1 + ends[t] - widths[t] : 1 + ends[t]]
            state, cost = stage.run(state, opening, scenario, record)
            total += discounts[t] * cost
        row[0] = total

    failure = None
    try:
        if shares.mine:
            # On every rank, alike: all others begin with the bases of the first one, so that
            # nothing depends on what else their rank has solved.
            first = np.empty(1 + sum(widths))
            run(0, first)
        for i, scenario in enumerate(shares.mine):
            if scenario == 0:
                gather.local[i] = first
            else:
                run(scenario, gather.local[i])
    except SolverError as error:
        failure = error
    everything = gather.gather(failure)
    return SimulationResult(
        case=case,
        total_cost=everything[:, 0].copy(),
        stages=tuple(
            stage.outcome(everything[:, 1 + end - stage.width : 1 + end])
            for stage, end in zip(stages, ends, strict=True)
        ),
        discounts=discounts,
    )


def scenario_count(case: Case, scenarios: int | None) -> int:
    """Return the number of trajectories to simulate, by default what the case asks for.

    Raises:
        ValueError: It is below 1 or above 2**31 - 1, or it is not given and the case asks for no
            simulation.
    """
    count = case.config.simulation_scenarios if scenarios is None else scenarios
    if scenarios is None and not count:
        raise ValueError(
            "config.json of the case asks for no simulation (simulation.enabled): give scenarios="
        )
    if not 1 <= count < 2**31:
        raise ValueError(f"the number of scenarios must be from 1 to 2**31 - 1, not {count}")
    return count


class _Stage:
    """One stage problem and where its outcome stands in a scenario's record."""

    def __init__(self, case: Case, solver: StageSolver, scale: float) -> None:
        self.solver, self.scale, self.lp = solver, scale, solver.lp
        at, blocks, hydros = self.lp.layout, len(self.lp.hours), len(case.hydros)
        self.hours = np.array(self.lp.hours)
        self.turbined = _columns(at.turbined, hydros, blocks)
        self.spilled = _columns(at.spilled, hydros, blocks)
        self.thermal = _columns(at.thermal, len(case.thermals), blocks)
        self.direct = _columns(at.direct, len(case.lines), blocks)
        self.reverse = _columns(at.reverse, len(case.lines), blocks)
        self.excess = _columns(at.excess, len(case.buses), blocks)
        self.load_rows = _columns(at.load_rows, len(case.buses), blocks)
        per_hydro, per_bus = (hydros,), (len(case.buses), blocks)
        self.shapes: dict[str, tuple[int, ...]] = {
            "immediate_cost": (),
            "future_cost": (),
            **dict.fromkeys(
                (
                    "turbined",
                    "spilled",
                    "inflow",
                    "storage_initial",
                    "storage_final",
                    "hydro_generation",
                    "water_value",
                ),
                per_hydro,
            ),
            "thermal": (len(case.thermals), blocks),
            "exchange": (len(case.lines), blocks),
            "source": (len(case.sources), blocks),
            **dict.fromkeys(("load", "deficit", "excess", "spot_price"), per_bus),
        }
        assert tuple(self.shapes) == tuple(item.name for item in fields(StageOutcome))
        self.width = sum(int(np.prod(shape)) for shape in self.shapes.values())

    def run(
        self, state: Floats, opening: int, scenario: int, record: Floats
    ) -> tuple[Floats, float]:
        """Solve, write the outcome into ``record``, return the next state and the cost in $."""
        solver, lp, at = self.solver, self.lp, self.lp.layout
        met = slice(opening, opening + 1)
        solver.begin(state, _FIRST, keep=scenario == 0, openings=met)
        objective = solver.solve(opening, Place(0, scenario))
        values, duals = solver.solution()
        future = lp.discount * values[at.theta]
        cost = float((objective - future) * self.scale)
        weights = self.hours / self.hours.sum()
        turbined = (values[self.turbined] * weights).sum(axis=1)
        load = lp.row_lower[self.load_rows]
        for bus, columns in at.random_load.items():
            load[bus] = values[columns]
        source = np.zeros(self.shapes["source"])
        for i, sources in enumerate(at.source):
            if sources is not None:
                source[i] = values[sources]
        deficit = np.zeros_like(load)
        for bus, segments in enumerate(at.deficit):
            for columns in segments:
                deficit[bus] += values[columns]
        outcome = {
            "immediate_cost": cost,
            "future_cost": future * self.scale,
            "turbined": turbined,
            "spilled": (values[self.spilled] * weights).sum(axis=1),
            "inflow": values[at.inflow],
            "storage_initial": values[at.start_storage],
            "storage_final": values[at.storage],
            "hydro_generation": turbined * lp.productivity,
            # One hm3 more on the right-hand side of the balance is one hm3 more water.
            "water_value": -duals[at.water_rows] * self.scale,
            "thermal": values[self.thermal],
            "exchange": values[self.direct] - values[self.reverse],
            "source": source,
            "load": load,
            "deficit": deficit,
            "excess": values[self.excess],
            "spot_price": duals[self.load_rows] * self.scale / self.hours,
        }
        record[:] = np.concatenate([np.ravel(value) for value in outcome.values()])
        return values[lp.next_state_columns], cost

    def outcome(self, records: Floats) -> StageOutcome:
        """Return the stage's part of all records, (scenarios, width), by name: views of them."""
        arrays, start = {}, 0
        for name, shape in self.shapes.items():
            end = start + int(np.prod(shape))
            arrays[name] = records[:, start:end].reshape(len(records), *shape)
            start = end
        return StageOutcome(**arrays)


def _columns(layout: Sequence[Sequence[int]], entities: int, blocks: int) -> npt.NDArray[np.int64]:
    return np.array(layout, dtype=np.int64).reshape(entities, blocks)
