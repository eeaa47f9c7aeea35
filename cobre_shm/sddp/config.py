"""What ``config.json`` asks for."""

from __future__ import annotations

from dataclasses import dataclass

from cobre_shm.sddp.errors import SchemaViolation
from cobre_shm.sddp.fields import Record

# Trajectories and scenarios have 32 bits in the tables that are written.
_MOST = 2**31 - 1
_METHODS = ("none", "penalty", "truncation", "truncation_with_penalty")
_SCHEMES = ("in_sample",)
_OTHER_SCHEMES = ("out_of_sample", "historical", "external")


@dataclass(frozen=True, slots=True)
class StoppingRule:
    """One reason to end the training; fields of the other kinds are zero.

    Attributes:
        kind: ``iteration_limit``, ``time_limit`` or ``bound_stalling``.
        limit: Iterations, for ``iteration_limit``.
        seconds: Wall time, for ``time_limit``.
        window: Iterations over which the bound must move, for ``bound_stalling``.
        tolerance: Relative movement that counts as none, for ``bound_stalling``.
    """

    kind: str
    limit: int = 0
    seconds: float = 0.0
    window: int = 0
    tolerance: float = 0.0


@dataclass(frozen=True, slots=True)
class CheckpointSchedule:
    """Checkpoints after iteration ``first`` and every ``interval`` iterations from there on."""

    first: int
    interval: int

    def is_due(self, iteration: int) -> bool:
        """Tell whether a checkpoint is written after an iteration, counted from 1."""
        return iteration >= self.first and (iteration - self.first) % self.interval == 0


@dataclass(frozen=True, slots=True)
class Config:
    """The settings of a case.

    Attributes:
        forward_passes: Trajectories per iteration over all ranks.
        stopping_rules: Every rule of the case.
        stop_on_all: Whether all rules must hold rather than any one.
        tree_seed: Seed of the opening tree and of the forward draws.
        simulation_scenarios: Trajectories of the final simulation, 0 for none.
        truncate_inflow: Whether negative inflow is cut off outside the problem.
        inflow_slack: Whether a penalised slack lets an inflow be filled up to zero.
        export_tree: Whether the opening tree is written to the output directory.
        policy_mode: ``fresh``, ``warm_start`` from the cuts in ``policy_path``, or ``resume``
            from the checkpoint in the output directory.
        policy_path: Directory of those cuts; a relative one is below the output directory.
        checkpoints: When to write checkpoints, or None for not at all.
    """

    forward_passes: int
    stopping_rules: tuple[StoppingRule, ...]
    stop_on_all: bool
    tree_seed: int
    simulation_scenarios: int
    truncate_inflow: bool
    inflow_slack: bool
    export_tree: bool
    policy_mode: str
    policy_path: str
    checkpoints: CheckpointSchedule | None

    @property
    def iteration_limit(self) -> int:
        """The smallest iteration limit of the stopping rules."""
        return min(rule.limit for rule in self.stopping_rules if rule.kind == "iteration_limit")


def parse_config(document: Record) -> Config:
    """Read and check ``config.json``."""
    training = document.record("training")
    if not training.boolean("enabled", True):
        training.refuse("enabled", "a case without training")
    _check_sources(training)
    _check_refused(training)
    before = len(document.findings)
    rules = tuple(_parse_rule(record) for record in training.records("stopping_rules"))
    readable = len(document.findings) == before
    if readable and not any(rule.kind == "iteration_limit" for rule in rules):
        training.report(
            SchemaViolation,
            "stopping_rules",
            "must hold a rule of type 'iteration_limit'",
            expected="an iteration_limit",
        )
    simulation = document.record("simulation", required=False)
    _check_sources(simulation)
    modeling = document.record("modeling", required=False)
    method = modeling.record("inflow_non_negativity", required=False).choice(
        "method", _METHODS, "penalty"
    )
    policy = document.record("policy", required=False)
    if "boundary" in policy:
        policy.refuse("boundary", "a policy of another study at the end of the horizon")
    return Config(
        forward_passes=training.integer("forward_passes", minimum=1, maximum=_MOST),
        stopping_rules=rules,
        stop_on_all=training.choice("stopping_mode", ("any", "all"), "any") == "all",
        tree_seed=abs(training.integer("tree_seed", 42)),
        simulation_scenarios=(
            simulation.integer("num_scenarios", 2000, minimum=1, maximum=_MOST)
            if simulation.boolean("enabled", False)
            else 0
        ),
        truncate_inflow=method.startswith("truncation"),
        inflow_slack=method.endswith("penalty"),
        export_tree=document.record("exports", required=False).boolean("stochastic", False),
        policy_mode=policy.choice("mode", ("fresh", "warm_start", "resume"), "fresh"),
        policy_path=policy.text("path", "policy"),
        checkpoints=_parse_checkpoints(policy.record("checkpointing", required=False)),
    )


def _parse_rule(record: Record) -> StoppingRule:
    kind = record.choice(
        "type", ("iteration_limit", "time_limit", "bound_stalling"), unsupported=("simulation",)
    )
    if kind == "iteration_limit":
        return StoppingRule(kind, limit=record.integer("limit", minimum=1, maximum=2**63 - 1))
    if kind == "time_limit":
        return StoppingRule(kind, seconds=record.number("seconds", above=0.0))
    if kind == "bound_stalling":
        window = record.integer("iterations", minimum=1)
        return StoppingRule(kind, window=window, tolerance=record.number("tolerance", above=0.0))
    return StoppingRule(kind)


def _parse_checkpoints(record: Record) -> CheckpointSchedule | None:
    if not record.boolean("enabled", False):
        return None
    interval = record.integer("interval_iterations", minimum=1)
    return CheckpointSchedule(record.integer("initial_iteration", interval, minimum=1), interval)


def _check_sources(section: Record) -> None:
    source = section.record("scenario_source", required=False)
    for name in ("inflow", "load", "ncs"):
        source.record(name, required=False).choice(
            "scheme", _SCHEMES, "in_sample", unsupported=_OTHER_SCHEMES
        )


def _check_refused(training: Record) -> None:
    selection = training.record("cut_selection", required=False)
    if selection.boolean("enabled", False):
        selection.refuse("enabled", "cut selection")
    if "cut_formulation" in training:
        training.choice("cut_formulation", ("single",), unsupported=("multi",))
    forward = training.record("forward_pass", required=False)
    if "type" in forward and forward.text("type") != "default":
        forward.refuse("type", f"the forward pass {forward.text('type')!r}")
