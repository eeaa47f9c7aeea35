"""Solving one stage problem many times with HiGHS.

HiGHS remembers more than the basis from one solve to the next, so the bits of a result depend on
what was solved before. A *chain* is a sequence of solves that always happens as a whole and in
the same order: one forward solve, all openings at one trial point, one group of the openings of
the bound.
The solver's memory is cleared where a chain begins (``StageSolver.begin`` is the only place) and
only a basis that belongs to the same chain of an earlier pass is given back. So a result depends
on its chain and not on which rank ran which chains before.

Clearing leaves one thing: HiGHS finds its scale factors at the first solve of a problem and keeps
them, also for rows that come later. Therefore every problem is solved once before it has cuts, and
what a problem needs beyond the usual options is tried on a copy. So a problem that is built anew
from its cuts, after a pause or for a simulation, is the same problem to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cobre_shm.sddp.errors import SolverError, require
from cobre_shm.sddp.failed_problem import ProblemWriter
from cobre_shm.sddp.layout import StageLp
from cobre_shm.sddp.noise_bounds import NoiseBounds, truncated_inflow

try:
    import highspy._core as highs
except ImportError as _error:
    raise require("highspy") from _error

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int32]
Statuses = npt.NDArray[np.int8]
Check = Callable[[], object]

_OPTIONS: dict[str, Any] = {
    "output_flag": False,
    "presolve": "off",
    "solver": "simplex",
    "simplex_strategy": 1,
    "parallel": "off",
    "threads": 1,
    "simplex_dual_edge_weight_strategy": 1,
    "dual_simplex_cost_perturbation_multiplier": 0.0,
    "simplex_price_strategy": 1,
    "primal_feasibility_tolerance": 1e-7,
    "dual_feasibility_tolerance": 1e-7,
    # No test of the factors before a solution is accepted. Its primal and dual residuals are
    # tested in any case, and a chain is too short for many updates of the factors.
    "rebuild_refactor_solution_error_tolerance": 0.0,
}
# Attempts for a problem that HiGHS gives up on, each from a new solver. They depend on the problem
# alone, so every rank count takes the same path.
_RETRIES: tuple[dict[str, Any], ...] = (
    {},
    {
        "simplex_scale_strategy": 2,
        "dual_simplex_cost_perturbation_multiplier": 1.0,
        "rebuild_refactor_solution_error_tolerance": 1e-8,
    },
    {"presolve": "on"},
)

_OPTIMAL = highs.HighsModelStatus.kOptimal
_ERROR = highs.HighsStatus.kError
_BASIC = highs.HighsBasisStatus.kBasic
_STATUSES = sorted(highs.HighsBasisStatus.__members__.values(), key=int)


class Place(NamedTuple):
    """What a problem is solved for.

    Attributes:
        iteration: Iteration of the training; 0 is the simulation.
        scenario: Trajectory; None is the evaluation of the lower bound.
    """

    iteration: int
    scenario: int | None

    def __str__(self) -> str:
        when = f"iteration {self.iteration}" if self.iteration else "the simulation"
        what = "the lower bound" if self.scenario is None else f"scenario {self.scenario}"
        return f"{when}, {what}"


_NOWHERE = Place(0, 0)


def _go_on() -> None:
    """The check where nobody asks for the end."""


def _new_solver() -> Any:
    solver = highs._Highs()
    for name, value in _OPTIONS.items():
        solver.setOptionValue(name, value)
    return solver


class _NewRows:
    """Room for a number of cuts as HiGHS takes rows; what is equal in all of them is there."""

    def __init__(self, count: int, cut_columns: Indices) -> None:
        width = len(cut_columns)
        self.count: int = count
        self.lower: Floats = np.zeros(count)
        self.upper: Floats = np.full(count, np.inf)
        self.starts: Indices = np.arange(0, count * width, width, dtype=np.int32)
        self.columns: Indices = np.tile(cut_columns, count)
        self.values: Floats = np.ones(count * width)
        self.coefficients: Floats = self.values.reshape(count, width)[:, 1:]


class StageSolver:
    """A stage problem inside HiGHS, with its cuts and the bases of its chains.

    Attributes:
        lp: The problem without cuts.
        solves: Problems solved so far, retries not counted.
        retries: Problems that needed more than one attempt.
    """

    def __init__(
        self,
        lp: StageLp,
        noise: NoiseBounds,
        writer: ProblemWriter | None = None,
        check: Check | None = None,
    ) -> None:
        """Take a problem and the noise of its openings.

        Args:
            lp: The problem.
            noise: Bounds of its noise columns for every opening.
            writer: Keeps the problem that has no solution; None keeps none.
            check: Called before every solve; what it raises comes out of there.
        """
        self.lp = lp
        self._writer = writer
        self._check: Check = check or _go_on
        self.solves: int = 0
        self.retries: int = 0
        self._noise = noise
        self._highs = _new_solver()
        self._pass_model()
        # For its scale factors only; see above.
        self._check()
        self._highs.run()
        self._answer = self._highs
        self._rows = len(lp.row_lower)
        self._cut_columns = np.append(lp.theta_column, lp.next_state_columns).astype(np.int32)
        self._new_rows = _NewRows(0, self._cut_columns)
        self._next_state = lp.next_state_columns.tolist()
        self._first_state = int(lp.state_columns[0]) if lp.state_columns.size else 0
        self._states = lp.state_columns.size
        self._bases: dict[Hashable, tuple[Any, int]] = {}
        self._key: Hashable = None
        self._unsaved = False
        lower, upper = noise.lower, noise.upper
        if noise.inflow_noise is not None:
            # The inflows in them are each chain's own.
            lower = noise.lower.copy()
            upper = lower if noise.upper is noise.lower else noise.upper.copy()
        self._use(lower, upper)

    def _pass_model(self) -> None:
        lp, model = self.lp, highs.HighsLp()
        model.num_col_, model.num_row_ = len(lp.cost), len(lp.row_lower)
        model.col_cost_, model.col_lower_, model.col_upper_ = lp.cost, lp.lower, lp.upper
        model.row_lower_, model.row_upper_ = lp.row_lower, lp.row_upper
        model.a_matrix_.format_ = highs.MatrixFormat.kRowwise
        model.a_matrix_.num_col_, model.a_matrix_.num_row_ = model.num_col_, model.num_row_
        model.a_matrix_.start_ = lp.starts
        model.a_matrix_.index_ = lp.indices
        model.a_matrix_.value_ = lp.values
        self._expect(self._highs.passModel(model), "passModel", "the problem")

    def _expect(self, status: Any, call: str, what: str, **context: Any) -> None:
        """Raise if HiGHS refused what it was given: it would go on with what it had before."""
        if status == _ERROR:
            raise SolverError(
                f"HiGHS refused {what} of stage {self.lp.stage_id}",
                context={"stage": self.lp.stage_id, **context, "status": f"{call} failed"},
            )

    def _use(self, lower: Floats, upper: Floats) -> None:
        # Not as lists of rows: the views would take more memory than most rows do.
        self._lower_rows, self._upper_rows = lower, upper

    @property
    def cuts(self) -> int:
        """Number of cuts in the problem."""
        return self._rows - len(self.lp.row_lower)

    def add_cuts(self, intercepts: Floats, coefficients: Floats) -> None:
        """Add the rows ``theta - coefficients @ next_state >= intercept``.

        Args:
            intercepts: float64, one per cut, in scaled $.
            coefficients: float64, (cuts, state components).
        """
        count = len(intercepts)
        if count != self._new_rows.count:
            self._new_rows = _NewRows(count, self._cut_columns)
        rows = self._new_rows
        rows.lower[:] = intercepts
        np.negative(coefficients, out=rows.coefficients)
        status = self._highs.addRows(
            count, rows.lower, rows.upper, rows.values.size, rows.starts, rows.columns, rows.values
        )
        # A warning only says that coefficients next to zero were dropped.
        self._expect(status, "addRows", "a cut")
        self._rows += count

    def basis(self, key: Hashable) -> Statuses:
        """Return the basis kept under ``key`` as numbers: columns, then all rows of now."""
        basis, rows = self._bases[key]
        statuses = [*basis.col_status, *basis.row_status, *[_BASIC] * (self._rows - rows)]
        return np.array([int(status) for status in statuses], dtype=np.int8)

    @property
    def basis_size(self) -> int:
        """Number of statuses in a basis of the problem with its cuts."""
        return len(self.lp.cost) + self._rows

    def restore_basis(self, key: Hashable, statuses: Statuses) -> None:
        """Keep under ``key`` a basis that :meth:`basis` of an equal problem returned."""
        values = [_STATUSES[status] for status in statuses.tolist()]
        basis, columns = highs.HighsBasis(), len(self.lp.cost)
        basis.col_status, basis.row_status = values[:columns], values[columns:]
        # As HiGHS marks a basis of its own: one from elsewhere it would examine and repair.
        basis.valid, basis.alien, basis.was_alien = True, False, False
        self._bases[key] = (basis, len(values) - columns)

    def begin(
        self,
        state: Floats,
        key: Hashable = None,
        *,
        keep: bool = True,
        openings: slice = slice(None),
    ) -> None:
        """Begin a chain at ``state``.

        Args:
            state: float64, one value per state component.
            key: Names the chain among those of this solver. The basis of the chain's first
                solve is kept under it for the next chain of the same key; None keeps nothing.
            keep: Whether it is; without, the basis that is there stays.
            openings: Those that the chain solves.

        Raises:
            SolverError: HiGHS refuses the state or the basis.
        """
        solver, columns = self._highs, self.lp.state_columns
        solver.clearSolver()
        saved = self._bases.get(key)
        if saved is not None:
            basis, rows = saved
            if rows < self._rows:
                basis.row_status = basis.row_status + [_BASIC] * (self._rows - rows)
            self._expect(solver.setBasis(basis), "setBasis", "a basis")
        self._key, self._unsaved = key, keep and key is not None
        if self._states:
            status = solver.changeColsBounds(self._states, columns, state, state)
            self._expect(status, "changeColsBounds", "a state at the beginning")
        noise = self._noise.inflow_noise
        if noise is not None:
            self._truncate(noise, state, openings)

    def _truncate(self, eta: Floats, state: Floats, openings: slice) -> None:
        hydros = eta.shape[1]
        lags = state.reshape(-1, hydros)[1:] if hydros else state.reshape(0, 0)
        inflow = truncated_inflow(self.lp.inflow, eta[openings], lags)
        self._lower_rows[openings, :hydros] = self._upper_rows[openings, :hydros] = inflow

    def solve(self, opening: int, place: Place = _NOWHERE) -> float:
        """Solve for one opening and return the scaled objective.

        Args:
            opening: Position of the opening.
            place: What the problem is solved for, for error messages only.

        Raises:
            SolverError: No attempt found an optimal solution, or HiGHS refuses the noise.
        """
        self._check()
        solver, columns = self._highs, self.lp.noise_columns
        if columns.size:
            status = solver.changeColsBounds(
                columns.size, columns, self._lower_rows[opening], self._upper_rows[opening]
            )
            if status == _ERROR:
                where = {**place._asdict(), "opening": opening}
                self._expect(status, "changeColsBounds", f"the noise of opening {opening}", **where)
        solver.run()
        self.solves += 1
        if solver.getModelStatus() != _OPTIMAL:
            solver = self._retry(opening, place)
        self._answer = solver
        if self._unsaved:
            self._bases[self._key] = (solver.getBasis(), self._rows)
            self._unsaved = False
        objective: float = solver.getObjectiveValue()
        return objective

    def _retry(self, opening: int, place: Place) -> Any:
        """Return a solver that has solved the problem as it stands."""
        self.retries += 1
        for options in _RETRIES:
            solver = _new_solver()
            for name, value in options.items():
                solver.setOptionValue(name, value)
            self._expect(solver.passModel(self._highs.getLp()), "passModel", "the problem")
            solver.run()
            if solver.getModelStatus() == _OPTIMAL:
                return solver
        raise self._failure(opening, place)

    def _failure(self, opening: int, place: Place) -> SolverError:
        status = self._highs.modelStatusToString(self._highs.getModelStatus())
        context = {"stage": self.lp.stage_id, **place._asdict(), "opening": opening}
        path = None
        if self._writer is not None:
            name = "_".join(f"{key}-{value}" for key, value in context.items() if value is not None)
            path = self._writer.write(self._highs, self.lp, name)
        return SolverError(
            f"the problem of stage {self.lp.stage_id} has no optimal solution ({status}) "
            f"in {place}, opening {opening}",
            context={
                **context,
                "solver_status": status,
                "lp_file": None if path is None else str(path),
            },
            suggestion="Give an output directory to get the problem as a file"
            if path is None
            else f"The problem is in {str(path)!r}",
        )

    def state_duals(self) -> list[float]:
        """Return the derivative of the objective by each state component."""
        first = self._first_state
        duals: list[float] = self._answer.getSolution().col_dual[first : first + self._states]
        return duals

    def next_state(self) -> tuple[list[float], float]:
        """Return the next state and ``theta``."""
        values = self._answer.getSolution().col_value
        return [values[j] for j in self._next_state], values[self.lp.theta_column]

    def solution(self) -> tuple[Floats, Floats]:
        """Return all column values and all row duals."""
        solution = self._answer.getSolution()
        return np.array(solution.col_value), np.array(solution.row_dual)
