"""The passes of an iteration, as far as this rank does them: forward, backward, lower bound."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from cobre_shm.communicator import Communicator
from cobre_shm.sddp.case import Case
from cobre_shm.sddp.cut_store import CutStore
from cobre_shm.sddp.cuts import CutPool, average_cut, opening_weights, ordered_sum
from cobre_shm.sddp.distribution import ItemGather, Shares, zeros
from cobre_shm.sddp.errors import SolverError
from cobre_shm.sddp.failed_problem import ProblemWriter
from cobre_shm.sddp.node_arrays import NodeArrays
from cobre_shm.sddp.opening_order import groups, outwards, sorted_openings
from cobre_shm.sddp.scenarios import draw_opening
from cobre_shm.sddp.solver import Check, Place, StageSolver
from cobre_shm.sddp.stage_lp import build_stage, cost_scale
from cobre_shm.sddp.training_result import mean_and_std

Floats = npt.NDArray[np.float64]


class Passes:
    """Problems, trajectories and cuts of a training.

    Args:
        case: The case, equal on every rank.
        comm: The communicator.
        writer: Keeps a problem that has no solution.
        check: Called before every problem.

    Attributes:
        scale: What costs in $ are divided by inside the problems.
        tree: The noise of the openings of each stage.
        solvers: The problem of each stage.
        bound_solver: That of the lower bound.
        shares: Who does which trajectory.
        bound_shares: Who does which chain of the lower bound.
        trials: The states of all trajectories, and their costs.
        found: The cuts of one stage.
        bounds: The values of the openings of the first stage, chain by chain.
        pool: All cuts.
    """

    def __init__(
        self, case: Case, comm: Communicator, writer: ProblemWriter | None, check: Check | None
    ) -> None:
        self._case = case
        horizon = case.horizon
        self._state_size = case.state_size
        self.scale: float = cost_scale(case)
        node = NodeArrays(comm)
        self.tree: list[Floats] = node.opening_tree(case)
        lps = [build_stage(case, t, self.scale) for t in range(case.stages)]
        bounds = [
            node.noise_bounds(case, lp, noise) for lp, noise in zip(lps, self.tree, strict=True)
        ]
        # The openings of each stage from the driest to the wettest.
        self._orders = [sorted_openings(noise.upper[:, : len(case.hydros)]) for noise in bounds]
        self.solvers: list[StageSolver] = [
            StageSolver(lp, noise, writer, check) for lp, noise in zip(lps, bounds, strict=True)
        ]
        bound = node.noise_bounds(case, lps[0], self.tree[0], mean_load=True)
        self.bound_solver: StageSolver = StageSolver(lps[0], bound, writer, check)
        self._discounts = np.cumprod([1.0, *(stage.discount for stage in horizon.stages[:-1])])
        self.shares: Shares = Shares(case.config.forward_passes, comm)
        # The opening of each of this rank's trajectories at each stage.
        self._drawn = zeros((len(self.shares.mine), case.stages), np.int64)
        self.trials: ItemGather = ItemGather(self.shares, case.stages * self._state_size + 1, comm)
        self.found: ItemGather = ItemGather(self.shares, 1 + self._state_size, comm)
        # As many chains as trajectories: who has a trajectory then has a part of the bound.
        self._bound_chains = groups(self._orders[0], case.config.forward_passes)
        self.bound_shares: Shares = Shares(len(self._bound_chains), comm)
        self.bounds: ItemGather = ItemGather(self.bound_shares, len(self._bound_chains[0]), comm)
        self.pool: CutPool = CutPool([np.zeros((0, 1 + self._state_size))] * case.stages)
        self._store = CutStore(comm, 1 + self._state_size)

    def begin_with(self, given: Sequence[Floats]) -> None:
        """Begin with cuts, for each stage (cuts, 1 + state components) in scaled $. Collective."""
        self.pool = CutPool([self._store.keep(cuts) for cuts in given])
        for t, cuts in enumerate(given):
            if len(cuts):
                self._add_cuts(t, cuts)

    def add(self, t: int, iteration: int, batch: Floats) -> None:
        """Take the cuts that an iteration made for a stage. Collective."""
        self.pool.add(t, iteration, self._store.keep(batch))
        self._add_cuts(t, batch)

    def counters(self) -> tuple[int, int]:
        """Return how many problems this rank has solved, and how many of them again."""
        solvers = [*self.solvers, self.bound_solver]
        return sum(s.solves for s in solvers), sum(s.retries for s in solvers)

    def forward(self, iteration: int) -> tuple[float, float]:
        """Run this rank's trajectories; return mean and deviation of all trajectory costs."""
        failure = None
        try:
            self._run_trajectories(iteration)
        except SolverError as error:
            failure = error
        return mean_and_std(self.trials.gather(failure)[:, -1])

    def backward(self, iteration: int) -> None:
        """Add one cut per trajectory to every stage but the last. Collective."""
        for t in range(self._case.stages - 2, -1, -1):
            failure = None
            try:
                self._find_cuts(t, iteration)
            except SolverError as error:
                failure = error
            self.add(t, iteration, self.found.gather(failure))

    def lower_bound(self, iteration: int) -> float:
        """Evaluate the first stage over all its openings. Collective."""
        failure = None
        try:
            self._solve_first_stage(iteration)
        except SolverError as error:
            failure = error
        values = np.empty(len(self.tree[0]))
        for chain, row in zip(self._bound_chains, self.bounds.gather(failure), strict=True):
            values[chain] = row[: len(chain)]
        weights = opening_weights(values, self._case.horizon.stages[0].risk)
        return float(ordered_sum(weights * values) * self.scale)

    def _run_trajectories(self, iteration: int) -> None:
        size, config = self._state_size, self._case.config
        for i, scenario in enumerate(self.shares.mine):
            row = self.trials.local[i]
            state, cost = self._case.initial_state, 0.0
            for t, solver in enumerate(self.solvers):
                opening = draw_opening(config.tree_seed, iteration, scenario, t, len(self.tree[t]))
                self._drawn[i, t] = opening
                solver.begin(state, i, openings=slice(opening, opening + 1))
                objective = solver.solve(opening, Place(iteration, scenario))
                values, theta = solver.next_state()
                cost += self._discounts[t] * (objective - solver.lp.discount * theta) * self.scale
                state = row[t * size : (t + 1) * size]
                state[:] = values
            row[-1] = cost

    def _find_cuts(self, t: int, iteration: int) -> None:
        """Find the cut of stage ``t`` at each trial point of this rank."""
        size, solver, openings = self._state_size, self.solvers[t + 1], len(self.tree[t + 1])
        values, slopes = np.empty(openings), np.empty((openings, size))
        risk = self._case.horizon.stages[t].risk
        for i, scenario in enumerate(self.shares.mine):
            state = self.trials.local[i, t * size : (t + 1) * size]
            solver.begin(state, i)
            # First the opening whose basis the forward pass has kept, then its neighbours.
            for opening in outwards(self._orders[t + 1], int(self._drawn[i, t + 1])):
                values[opening] = solver.solve(opening, Place(iteration, scenario))
                slopes[opening] = solver.state_duals()
            cut = self.found.local[i]
            cut[0], cut[1:] = average_cut(values, slopes, state, risk)

    def _solve_first_stage(self, iteration: int) -> None:
        for i, chain in enumerate(self.bound_shares.mine):
            self.bound_solver.begin(self._case.initial_state, i)
            for k, opening in enumerate(self._bound_chains[chain]):
                self.bounds.local[i, k] = self.bound_solver.solve(opening, Place(iteration, None))

    def _add_cuts(self, t: int, batch: Floats) -> None:
        """Add cuts, (cuts, 1 + state components) in scaled $, to the problems of a stage."""
        self.solvers[t].add_cuts(batch[:, 0], batch[:, 1:])
        if t == 0:
            self.bound_solver.add_cuts(batch[:, 0], batch[:, 1:])
