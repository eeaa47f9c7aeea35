"""The errors for a segment that cannot be used."""

from __future__ import annotations

from cobre_shm.errors import InitializationFailed
from cobre_shm.segment.posix import DIRECTORY
from cobre_shm.segment.unnamed import descriptor_of

__all__ = ["incompatible", "system_error"]


def system_error(name: str, error: OSError) -> InitializationFailed:
    """Return the error for a call of the operating system that was refused."""
    return InitializationFailed(
        "shm",
        f"Segment {name}: the operating system refused: {error}",
        operation="attach",
        source=error,
        context={"code": "SystemError", "segment": name},
    )


def incompatible(name: str, why: str) -> InitializationFailed:
    """Return the error for a segment that is not one of ours."""
    suggestion = (
        "Choose another COBRE_SHM_NAME, or remove the file if nothing uses it: "
        f"rm {DIRECTORY / name.lstrip('/')}"
    )
    if descriptor_of(name) is not None:
        suggestion = (
            "The form fd:N is what the launcher (python -m cobre_shm.spawn) gives to its ranks: "
            "use it there, with descriptor N left open, or set COBRE_SHM_NAME=/NAME"
        )
    return InitializationFailed(
        "shm",
        f"Segment {name} cannot be used: {why}",
        operation="attach",
        context={"code": "IncompatibleSegment", "segment": name},
        suggestion=suggestion,
    )
