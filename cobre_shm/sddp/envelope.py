"""The JSON object that every command of the workload answers with.

Its fields are those of the Cobre project's structured output protocol,
https://github.com/cobre-rs/cobre-docs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from cobre_shm import __version__
from cobre_shm.errors import CobreError

_SCHEMA = "urn:cobre:response:v1"
# Kind of a warning about an input that is read and has no influence on any result.
NO_EFFECT = "NoEffect"


def envelope(
    command: str,
    exit_code: int,
    *,
    errors: Iterable[CobreError] = (),
    warnings: Iterable[str] = (),
    data: dict[str, Any] | None = None,
    summary: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the answer of ``command`` as JSON values; it succeeded if the exit code is 0."""
    return {
        "$schema": _SCHEMA,
        "command": command,
        "success": exit_code == 0,
        "exit_code": exit_code,
        "cobre_version": __version__,
        "errors": [error.to_dict() for error in errors],
        "warnings": [
            {"kind": NO_EFFECT, "message": text, "context": {}, "suggestion": None}
            for text in warnings
        ],
        "data": data,
        "summary": summary,
    }
