"""Work that rank 0 does for all, with one outcome on every rank."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np

from cobre_shm.communicator import Communicator
from cobre_shm.errors import CobreError
from cobre_shm.sddp.errors import SHARED_ERRORS


def share_bytes(data: bytes, comm: Communicator, root: int = 0) -> bytes:
    """Return ``root``'s ``data`` on every rank. Collective; other ranks' data are ignored."""
    length = np.array([len(data)], dtype=np.int64)
    comm.broadcast(length, root=root)
    if length[0] == 0:
        return b""
    buffer = np.zeros(int(length[0]), dtype=np.uint8)
    if comm.rank == root:
        buffer[:] = np.frombuffer(data, dtype=np.uint8)
    comm.broadcast(buffer, root=root)
    return buffer.tobytes()


def on_rank_zero(action: Callable[[], bytes | None], comm: Communicator) -> bytes:
    """Run ``action`` on rank 0 and give its result to every rank.

    Collective. No rank is left waiting if the action fails.

    Raises:
        CobreError: What the action raised, on every rank.
    """
    data = b""
    outcome: dict[str, Any] = {}
    if comm.rank == 0:
        try:
            data = action() or b""
        except CobreError as error:
            outcome = error.to_dict()
    share_failure(outcome, comm)
    return share_bytes(data, comm)


def share_failure(outcome: dict[str, Any], comm: Communicator, root: int = 0) -> None:
    """Raise on every rank the error that ``root`` describes, if it describes one.

    Collective.

    Args:
        outcome: On ``root`` an error as :meth:`CobreError.to_dict` gives it, or nothing.
        comm: The communicator.
        root: The rank that knows.
    """
    outcome = json.loads(share_bytes(json.dumps(outcome).encode(), comm, root))
    if outcome:
        cls = SHARED_ERRORS.get(outcome["kind"], CobreError)
        raise cls(outcome["message"], context=outcome["context"], suggestion=outcome["suggestion"])
