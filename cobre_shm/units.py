"""Numbers of bytes as people read them."""

from __future__ import annotations

__all__ = ["bytes_text"]


def bytes_text(nbytes: float | None) -> str:
    """Return a number of bytes in the unit that fits."""
    if nbytes is None:
        return "unknown"
    unit = "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if nbytes < 1024:
            break
        nbytes, unit = nbytes / 1024, larger
    return f"{nbytes:.4g} {unit}"
