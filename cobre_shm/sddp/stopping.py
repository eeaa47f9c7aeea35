"""When to stop."""

from __future__ import annotations

from collections.abc import Sequence

from cobre_shm.sddp.config import Config, StoppingRule


def stop_reason(config: Config, bounds: Sequence[float], seconds: float) -> str | None:
    """Return the name of the rule that ends the training, or None to go on.

    Only rank 0 may decide: the clocks of two ranks need not agree.

    Args:
        config: The rules and how they combine.
        bounds: The lower bound after each iteration so far, in $.
        seconds: Time since the start of the training.
    """
    met = [rule.kind for rule in config.stopping_rules if _is_met(rule, bounds, seconds)]
    needed = len(config.stopping_rules) if config.stop_on_all else 1
    if len(met) < needed:
        return None
    return "bound_stalling" if "bound_stalling" in met else met[0]


def _is_met(rule: StoppingRule, bounds: Sequence[float], seconds: float) -> bool:
    if rule.kind == "iteration_limit":
        return len(bounds) >= rule.limit
    if rule.kind == "time_limit":
        return seconds >= rule.seconds
    if len(bounds) < rule.window:
        return False
    now = bounds[-1]
    return abs(now - bounds[-rule.window]) / max(1.0, abs(now)) < rule.tolerance
