"""What the tools do: functions of a session, which know nothing of the protocol.

A result is kept under a name such as ``train-1`` until the session ends or sixteen newer ones have
come. Everything that is returned can be written as JSON.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cobre_shm.api.place import Place
from cobre_shm.api.policy import Policy
from cobre_shm.api.result import ProgressEvent, TrainingResult
from cobre_shm.api.training import simulate_at, train_at, trainer_options
from cobre_shm.communicator import Communicator
from cobre_shm.errors import CobreError
from cobre_shm.mcp_server.folders import Folders
from cobre_shm.sddp import shipped_case_path
from cobre_shm.sddp.case import check_case, load_case
from cobre_shm.sddp.errors import CaseError, MissingFile, OutOfRange, ParseError
from cobre_shm.sddp.results import read_table, write_training
from cobre_shm.sddp.simulation import SimulationResult
from cobre_shm.sddp.simulation_results import summary, write_simulation
from cobre_shm.sddp.solver import Check

__all__ = ["Findings", "Session"]

SHIPPED = "shipped"
_KEPT = 16
_MOST_ROWS = 1000

Values = dict[str, Any]


class Findings(Exception):
    """A case has mistakes: the answer is all of them."""

    def __init__(self, errors: list[CaseError], warnings: list[str]) -> None:
        super().__init__(f"{len(errors)} findings")
        self.errors = errors
        self.warnings = warnings


class Session:
    """The state of a server.

    Args:
        comm: Does all of the work; it stays open.
        folders: Which files clients may name.
    """

    def __init__(self, comm: Communicator, folders: Folders) -> None:
        self._place = Place(comm=comm)
        self._folders = folders
        # Other threads may be reading it: it is replaced, never changed.
        self._results: Mapping[str, TrainingResult | SimulationResult] = {}
        self._numbers = itertools.count(1)

    # Cases

    def validate(self, case: str) -> Values:
        """Find everything that is wrong with a case.

        Raises:
            Findings: All of it.
        """
        try:
            loaded, findings, warnings = check_case(self._case_path(case))
        except MissingFile as error:
            raise Findings([error], []) from error
        if loaded is None:
            raise Findings(list(findings), warnings)
        return {**loaded.sizes(), "warnings": warnings}

    def inspect_case(self, case: str) -> Values:
        """Describe a case: its sizes, settings and entities."""
        loaded = load_case(self._case_path(case))
        config = loaded.config
        return {
            **loaded.sizes(),
            "stopping_rules": [
                {
                    "type": rule.kind,
                    **{key: getattr(rule, name) for key, name in _RULE_FIELDS[rule.kind].items()},
                }
                for rule in config.stopping_rules
            ],
            "tree_seed": config.tree_seed,
            "simulation_scenarios": config.simulation_scenarios,
            "stage_ids": [stage.id for stage in loaded.horizon.stages],
            "entities": {
                kind: [{"id": item.id, "name": item.name} for item in getattr(loaded, kind)]
                for kind in ("buses", "lines", "thermals", "hydros", "sources")
            },
            "state": _components(loaded.state_names()),
            "initial_state": loaded.initial_state.tolist(),
        }

    # Work

    def train(
        self,
        case: str,
        config_overrides: Values | None,
        output_dir: str | None,
        resume: bool,
        tell: Callable[[ProgressEvent], object],
        check: Check,
    ) -> Values:
        """Train a policy, and keep the result.

        ``check`` is called before every problem; what it raises ends the training.
        """
        folder = None if output_dir is None else self._folders.output(output_dir)
        loaded = load_case(self._case_path(case), config_overrides)
        if loaded.config.policy_mode != "fresh":
            # The case names a directory as well.
            self._folders.policy(str((folder or Path()) / loaded.config.policy_path))
        options = trainer_options(resume, folder)
        result = train_at(self._place, loaded, None, tell, folder, options, check=check)
        name = self._keep("train", result)
        return {"result": name, **_training(result)}

    def simulate(
        self,
        case: str,
        policy: str,
        scenarios: int | None,
        config_overrides: Values | None,
        check: Check,
    ) -> Values:
        """Run a policy on random scenarios, and keep the result; ``check`` as for a training."""
        loaded = load_case(self._case_path(case), config_overrides)
        found = self._policy(policy)
        result = simulate_at(self._place, loaded, found, scenarios, None, None, check)
        return {"result": self._keep("simulate", result), "total_cost": summary(result)}

    # Results

    def names(self) -> list[Values]:
        """List what is kept."""
        return [
            {
                "result": name,
                "kind": "training" if isinstance(result, TrainingResult) else "simulation",
                "case": result.case.name,
            }
            for name, result in self._results.items()
        ]

    def describe(self, name: str) -> Values:
        """Summarise a result."""
        result = self._result(name)
        if isinstance(result, TrainingResult):
            return {"result": name, **_training(result)}
        return {"result": name, "case": result.case.name, "total_cost": summary(result)}

    def query_convergence(self, result: str, first: int, last: int | None) -> Values:
        """Return rows of the convergence table, of a result or of a training's output."""
        if result in self._results:
            history = self._training(result).history
            columns = {name: np.asarray(history[name]) for name in history.dtype.names or ()}
        else:
            columns = _read_convergence(self._folders.convergence(result))
        numbers = columns["iteration"]
        stop = int(numbers[-1]) if last is None else last
        rows = np.flatnonzero((numbers >= first) & (numbers <= stop))
        return {
            "iterations": len(numbers),
            "rows": [
                {name: _plain(values[row]) for name, values in columns.items()}
                for row in rows[:_MOST_ROWS]
            ],
            "is_complete": len(rows) <= _MOST_ROWS,
        }

    def convergence_of(self, name: str) -> Values:
        """Return the convergence of a training of this session."""
        self._training(name)
        return self.query_convergence(name, 1, None)

    def policy_of(self, name: str) -> Values:
        """Describe the policy of a training of this session."""
        self._training(name)
        return self.inspect_policy(name, None, None)

    def inspect_policy(self, policy: str, stage: int | None, state: list[float] | None) -> Values:
        """Describe a policy, one of its stages, or its value at a state."""
        found = self._policy(policy)
        if stage is None:
            return {
                "stages": [{"stage": each, "cuts": len(found.cuts(each))} for each in found.stages],
                "state": _components(found.components),
            }
        cuts = found.cuts(stage)
        answer: Values = {"stage": stage, "cuts": len(cuts)}
        if len(cuts):
            answer["intercept"] = _range(cuts.intercept)
            answer["coefficients"] = [
                {**component, **_range(cuts.coefficients[:, j])}
                for j, component in enumerate(_components(found.components))
            ]
        if state is not None:
            answer["future_cost"] = found.evaluate(stage, state)
        return answer

    def compare_policies(self, first: str, second: str, states: list[list[float]]) -> Values:
        """Compare two policies stage by stage, at given states or at zero."""
        one, other = self._policy(first), self._policy(second)
        if one.components != other.components or one.stages != other.stages:
            raise CobreError(
                "The policies are of different cases: their stages or state components differ",
                context={"first": first, "second": second},
                suggestion="Compare policies of the same case",
            )
        points = states or [[0.0] * len(one.components)]
        stages = []
        for stage in one.stages:
            values = [(one.evaluate(stage, p), other.evaluate(stage, p)) for p in points]
            stages.append(
                {
                    "stage": stage,
                    "cuts": [len(one.cuts(stage)), len(other.cuts(stage))],
                    "future_cost": [list(pair) for pair in values],
                    "largest_difference": max(abs(a - b) for a, b in values),
                }
            )
        return {"states": points, "stages": stages}

    def export_results(self, result: str, output_dir: str) -> Values:
        """Write the files of a result."""
        found = self._result(result)
        folder = self._folders.output(output_dir)
        if isinstance(found, TrainingResult):
            write_training(found.details, folder)
        else:
            write_simulation(found, folder)
        files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*"))
        return {"output_dir": str(folder), "files": files}

    # Names

    def _case_path(self, case: str) -> Any:
        return shipped_case_path() if case == SHIPPED else self._folders.case(case)

    def _policy(self, name: str) -> Policy:
        if name in self._results:
            return self._training(name).policy
        return Policy.load(self._folders.policy(name))

    def _training(self, name: str) -> TrainingResult:
        result = self._result(name)
        if isinstance(result, TrainingResult):
            return result
        raise _unknown(name, self._results, "a training")

    def _result(self, name: str) -> TrainingResult | SimulationResult:
        try:
            return self._results[name]
        except KeyError:
            raise _unknown(name, self._results, "a result") from None

    def _keep(self, kind: str, result: TrainingResult | SimulationResult) -> str:
        name = f"{kind}-{next(self._numbers)}"
        kept = [*self._results.items(), (name, result)]
        self._results = dict(kept[-_KEPT:])
        return name


# By type of rule: its fields in config.json, and what the program calls them.
_RULE_FIELDS: dict[str, dict[str, str]] = {
    "iteration_limit": {"limit": "limit"},
    "time_limit": {"seconds": "seconds"},
    "bound_stalling": {"iterations": "window", "tolerance": "tolerance"},
}


def _read_convergence(path: Path) -> dict[str, Any]:
    """Read a training's convergence table.

    Raises:
        ParseError: It is another table, or has no rows.
    """
    columns = read_table(path)
    if "iteration" not in columns:
        what = "there is no column 'iteration'"
    elif not len(columns["iteration"]):
        what = "there are no rows"
    elif others := [name for name, values in columns.items() if values.dtype.kind not in "iuf"]:
        what = f"there are columns without numbers: {', '.join(others)}"
    else:
        return columns
    raise ParseError(f"{path}: not a convergence table: {what}", context={"file": str(path)})


def _unknown(name: str, known: Mapping[str, Any], what: str) -> OutOfRange:
    return OutOfRange(
        f"{name!r} is not {what} of this session",
        context={"field": "result", "value": name, "expected": list(known)},
        suggestion="Train first: the answer names the result",
    )


def _training(result: TrainingResult) -> Values:
    return {
        "case": result.case.name,
        "iterations": result.iterations,
        "stop_reason": result.stop_reason,
        "converged": result.converged,
        "cost_unit": "$",
        "lower_bound": result.lower_bound,
        "upper_bound": result.upper_bound,
        "upper_bound_half_width": result.upper_bound_half_width,
        "gap_percent": result.gap_percent,
        "cuts": sum(len(cuts) for cuts in result.policy.all_cuts()),
        "seconds": result.seconds,
        "lp_solves": result.lp_solves,
    }


def _components(names: Any) -> list[Values]:
    return [
        {"kind": kind, "hydro_id": hydro, "lag": lag, "unit": unit}
        for kind, hydro, lag, unit in names
    ]


def _range(values: Any) -> Values:
    return {
        "minimum": float(values.min()),
        "mean": float(values.mean()),
        "maximum": float(values.max()),
    }


def _plain(value: Any) -> Any:
    item = value.item()
    return None if isinstance(item, float) and not math.isfinite(item) else item
