"""The one way to read ``COBRE_*`` variables, and to check the values of settings.

An empty value counts as unset, because a shell cannot easily unset a variable for one command.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from cobre_shm.errors import InitializationFailed, MissingConfiguration
from cobre_shm.selection.values import Explained, Secret
from cobre_shm.selection.variables import PREFIX, VARIABLES, Variable

__all__ = ["check_value", "read_settings", "unknown_variables"]


def check_value(variable: Variable, value: Any, setting: str, given: Any) -> Any:
    """Return ``value`` in its normal form.

    Args:
        variable: What the value is for.
        value: Not text, except where the setting itself is text.
        setting: What the message calls the setting: the variable, or a field.
        given: What the message quotes: the text of the variable, or the value.

    Raises:
        InitializationFailed: The value is not one that the setting takes.
    """
    try:
        return variable.type.check(value)
    except Explained as error:
        raise _refusal(variable, given, setting, str(error)) from None
    except ValueError:
        raise _refusal(variable, given, setting) from None


def read_settings(
    backend: str, variables: Iterable[Variable], env: Mapping[str, str]
) -> dict[str, Any]:
    """Read one backend's variables.

    Returns:
        What the text of every variable that is set stands for, by the name of the field that it
        fills. Ranges are left to the configuration, which knows how its fields bound each other.

    Raises:
        MissingConfiguration: Required variables are not set; it lists all of them.
        InitializationFailed: The text of a value is malformed.
    """
    variables = tuple(variables)
    missing = [
        variable for variable in variables if variable.required and not env.get(variable.name)
    ]
    if missing:
        raise _missing(backend, missing, variables, env)
    return {
        variable.field: _parse(variable, env[variable.name])
        for variable in variables
        if env.get(variable.name)
    }


def unknown_variables(env: Mapping[str, str], known: Iterable[str]) -> dict[str, str | None]:
    """Return each ``COBRE_*`` variable of ``env`` that is not ``known``, with the nearest known."""
    names = sorted(known)
    return {
        name: next(iter(difflib.get_close_matches(name, names, n=1, cutoff=0.8)), None)
        for name in sorted(env)
        if name.startswith(PREFIX) and name not in names
    }


def _parse(variable: Variable, text: str) -> Any:
    try:
        return variable.type.parse(text)
    except ValueError:
        raise _refusal(variable, text, variable.name) from None


def _refusal(
    variable: Variable, value: Any, setting: str, reason: str = ""
) -> InitializationFailed:
    expected = variable.type.expected
    # Bytes, say, tell it as well as a text does.
    is_secret = isinstance(variable.type, Secret)
    quoted, text = ("not shown",) * 2 if is_secret else (repr(value), str(value))
    pasted = f"export {variable.name}={variable.example}"
    if setting != variable.name:
        pasted = f"{variable.field}={variable.type.parse(variable.example)!r}"
    return InitializationFailed(
        variable.backend,
        f"{setting}={quoted} is not valid: {reason or f'expected {expected}'}",
        operation="configure",
        context={"setting": setting, "value": text, "expected": expected},
        suggestion=f"Example: {pasted}",
    )


def _missing(
    backend: str,
    missing: list[Variable],
    variables: tuple[Variable, ...],
    env: Mapping[str, str],
) -> MissingConfiguration:
    names = [variable.name for variable in missing]
    pasted = " ".join(f"{variable.name}={variable.example}" for variable in missing)
    suggestion = f"Set the required environment variables. Example: export {pasted}"
    known = [variable.name for variable in (*VARIABLES, *variables)]
    for name, nearest in unknown_variables(env, known).items():
        if nearest in names:
            suggestion = f"{name} is set: did you mean {nearest}? {suggestion}"
    return MissingConfiguration(backend, names, suggestion=suggestion)
