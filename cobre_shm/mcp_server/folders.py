"""Which files a client may name.

Every path is resolved first, links and ``..`` included, and must then lie in a directory that was
named when the server was started. What a command reads or writes below that path is looked at in
the same way, so that a link inside an allowed directory leads nowhere else. Who can change the
directory while the server runs can still exchange a file for a link between the two; such a person
has the files already.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from cobre_shm.errors import CobreError
from cobre_shm.sddp.checkpoint import FILE_NAME
from cobre_shm.sddp.documents import OPTIONAL, REQUIRED

__all__ = ["Folders", "NotAllowed"]

_POLICY = ("cuts.parquet", "state.json", FILE_NAME)
_OUTPUT = ("training", "policy", "simulation", "stochastic", "failed", f"policy/{FILE_NAME}")


class NotAllowed(CobreError):
    """The server was not started with the permission that this needs."""

    kind = "NotAllowed"


class Folders:
    """The directories that clients may use.

    Args:
        allowed: Where files may be read.
        may_write: Whether files may be written there too.

    Raises:
        NotAllowed: One of them is not a directory.
    """

    def __init__(self, allowed: Sequence[str | Path], *, may_write: bool = False) -> None:
        self._allowed = [Path(os.path.realpath(folder)) for folder in allowed]
        self._may_write = may_write
        for given, folder in zip(allowed, self._allowed, strict=True):
            if not folder.is_dir():
                raise NotAllowed(
                    f"{str(given)!r} is not a directory",
                    context={"path": str(given)},
                    suggestion="--allow takes a directory that exists",
                )

    def case(self, path: str) -> Path:
        """Return a case directory that may be read.

        Raises:
            NotAllowed: It, or a file of it, lies elsewhere.
        """
        return self._with(path, (*REQUIRED, *OPTIONAL))

    def policy(self, path: str) -> Path:
        """Return the folder of a policy that may be read; also given as the output around it.

        Raises:
            NotAllowed: It lies elsewhere.
        """
        root = self._with(path, (*_POLICY, *(f"policy/{name}" for name in _POLICY)))
        return root / "policy" if (root / "policy").is_dir() else root

    def convergence(self, path: str) -> Path:
        """Return the convergence table of a training's output.

        Raises:
            NotAllowed: It lies elsewhere.
        """
        name = "training/convergence.parquet"
        return self._with(path, (name,)) / name

    def output(self, path: str) -> Path:
        """Return a directory that may be written.

        Raises:
            NotAllowed: It lies elsewhere, or nothing may be written.
        """
        if not self._may_write:
            raise NotAllowed(
                f"this server writes no files, and so not {path!r}",
                context={"path": path},
                suggestion="Start it with --allow-write",
            )
        return self._with(path, _OUTPUT)

    def _with(self, path: str, names: Iterable[str]) -> Path:
        root = self._resolved(path, path)
        for name in names:
            self._resolved(root / name, f"{path}/{name}")
        return root

    def _resolved(self, path: str | Path, given: str) -> Path:
        try:
            found = Path(os.path.realpath(path))
        except (ValueError, OSError) as error:
            raise NotAllowed(f"{given!r} is no path: {error}", context={"path": given}) from error
        if not any(found.is_relative_to(folder) for folder in self._allowed):
            raise NotAllowed(
                f"{given!r} is not in a directory that this server may use",
                context={"path": given, "allowed": [str(folder) for folder in self._allowed]},
                suggestion="Start it with --allow DIR",
            )
        return found
