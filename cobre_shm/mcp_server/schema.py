"""What ``config.json`` of a case may hold, as JSON Schema (draft 2020-12)."""

from __future__ import annotations

from typing import Any

__all__ = ["config_schema"]

_POSITIVE = {"type": "integer", "minimum": 1}
_SOURCE = {
    "type": "object",
    "description": "Where the random quantities come from",
    "properties": {
        name: {"type": "object", "properties": {"scheme": {"enum": ["in_sample"]}}}
        for name in ("inflow", "load", "ncs")
    },
}


def _rule(kind: str, description: str, **properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "description": description,
        "properties": {"type": {"const": kind}, **properties},
        "required": ["type", *properties],
    }


_RULES = (
    _rule("iteration_limit", "After so many iterations", limit=_POSITIVE),
    _rule(
        "time_limit",
        "After so many seconds of wall time",
        seconds={"type": "number", "exclusiveMinimum": 0},
    ),
    _rule(
        "bound_stalling",
        "When the lower bound has moved by less than a relative tolerance in so many iterations",
        iterations=_POSITIVE,
        tolerance={"type": "number", "exclusiveMinimum": 0},
    ),
)


def config_schema() -> dict[str, Any]:
    """Return the schema; keys that it does not name are read by other programs, or by nobody."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "config.json",
        "type": "object",
        "required": ["training"],
        "properties": {
            "training": {
                "type": "object",
                "required": ["forward_passes", "stopping_rules"],
                "properties": {
                    "enabled": {"const": True},
                    "forward_passes": {
                        **_POSITIVE,
                        "maximum": 2**31 - 1,
                        "description": "Trajectories per iteration, over all ranks",
                    },
                    "stopping_rules": {
                        "type": "array",
                        "items": {"oneOf": list(_RULES)},
                        "contains": {"properties": {"type": {"const": "iteration_limit"}}},
                    },
                    "stopping_mode": {"enum": ["any", "all"], "default": "any"},
                    "tree_seed": {"type": "integer", "default": 42},
                    "scenario_source": _SOURCE,
                },
            },
            "simulation": {
                "type": "object",
                "properties": {
                    "enabled": {"type": "boolean", "default": False},
                    "num_scenarios": {**_POSITIVE, "maximum": 2**31 - 1, "default": 2000},
                    "scenario_source": _SOURCE,
                },
            },
            "modeling": {
                "type": "object",
                "properties": {
                    "inflow_non_negativity": {
                        "type": "object",
                        "properties": {
                            "method": {
                                "enum": [
                                    "none",
                                    "penalty",
                                    "truncation",
                                    "truncation_with_penalty",
                                ],
                                "default": "penalty",
                            }
                        },
                    }
                },
            },
            "policy": {
                "type": "object",
                "description": "Where the training begins, and what it keeps on its way",
                "properties": {
                    "mode": {"enum": ["fresh", "warm_start", "resume"], "default": "fresh"},
                    "path": {
                        "type": "string",
                        "default": "policy",
                        "description": "Directory of the policy; relative to the output directory",
                    },
                    "checkpointing": {
                        "type": "object",
                        "properties": {
                            "enabled": {"type": "boolean", "default": False},
                            "interval_iterations": _POSITIVE,
                            "initial_iteration": _POSITIVE,
                        },
                        "if": {"properties": {"enabled": {"const": True}}, "required": ["enabled"]},
                        "then": {"required": ["interval_iterations"]},
                    },
                },
            },
            "exports": {
                "type": "object",
                "properties": {"stochastic": {"type": "boolean", "default": False}},
            },
        },
    }
