"""What can be chosen here, what would be, and why: the facts behind a choice, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from cobre_shm.errors import BackendError
from cobre_shm.selection.env import unknown_variables
from cobre_shm.selection.factory import choose, detect, start_failure
from cobre_shm.selection.registry import BackendSpec, Registry, has_module, read_registry
from cobre_shm.selection.values import Secret
from cobre_shm.selection.variables import VARIABLES

__all__ = ["describe_selection"]


def describe_selection(env: Mapping[str, str]) -> tuple[dict[str, Any], BackendError | None]:
    """Describe every registered backend and the choice that ``env`` leads to. Nothing is started.

    Returns:
        A JSON-serialisable description, and the error that the choice would end in.
    """
    registry = read_registry()
    backends = [_describe(spec, env) for spec in registry.specs()]
    choice, error = _describe_choice(registry, env)
    automatic = detect(registry, env)
    variables = [*VARIABLES, *(v for spec in registry.specs() for v in spec.variables)]
    names = dict.fromkeys(variable.name for variable in variables)
    secrets = {variable.name for variable in variables if isinstance(variable.type, Secret)}
    return {
        "backends": backends,
        "failed_registrations": [asdict(failure) for failure in registry.failures],
        "auto": {"backend": automatic.spec.name, "reason": automatic.reason},
        "choice": choice,
        # Bug reports are public.
        "variables": {
            name: "set, not shown" if name in secrets and env[name] else env[name]
            for name in names
            if name in env
        },
        "unknown_variables": unknown_variables(env, names),
    }, error


def _describe(spec: BackendSpec, env: Mapping[str, str]) -> dict[str, Any]:
    missing = spec.missing()
    try:
        detected = spec.detect(env)
    except Exception as error:
        detected = f"detection failed: {type(error).__name__}: {error}"
    return {
        "name": spec.name,
        # The rule of the field build_features of errors.
        "feature": None if spec.name == "local" else spec.name,
        "priority": spec.priority,
        "available": not missing,
        "requirements": {module: has_module(module) for module in spec.requirements},
        "implemented": spec.implementation not in missing,
        "install": spec.install_hint or None,
        "detected": detected,
        "capabilities": asdict(spec.capabilities),
    }


def _describe_choice(
    registry: Registry, env: Mapping[str, str]
) -> tuple[dict[str, Any], BackendError | None]:
    try:
        choice = choose(registry, None, env)
    except BackendError as error:
        return {"error": error.to_dict()}, error
    try:
        choice.spec.configure(env)
    except BackendError as error:
        return {"error": error.to_dict()}, error
    except Exception as error:
        failure = start_failure(choice.spec, error)
        return {"error": failure.to_dict()}, failure
    return {"backend": choice.spec.name, "reason": choice.reason}, None
