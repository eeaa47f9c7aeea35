"""Launching over tcp: what the ranks of one node inherit to find the others.

    listening socket   rank 0's, bound here, so that its port is known before any rank runs and
                       nobody else can take it: ``COBRE_TCP_BIND_ADDR=fd:N``
    secret             of the run, in memory without a name: ``COBRE_TCP_SECRET_FILE=fd:N``. With
                       several nodes it is the user's, the same on all of them.
    report             a pipe to which a rank says what the group's first failure was, as its
                       connections told it: ``COBRE_TCP_REPORT=fd:N``

Nothing of this is on a command line, or in a file that others could open.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import socket
import tempfile
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from cobre_shm.descriptors import above_standard, socket_above_standard
from cobre_shm.errors import InitializationFailed
from cobre_shm.selection.kinds import TcpConfig
from cobre_shm.selection.values import is_loopback, names_loopback
from cobre_shm.spawn.environment import rank_variables
from cobre_shm.spawn.meeting import Progress
from cobre_shm.spawn.network import Network

__all__ = ["TcpMeeting"]

_SECRET_BYTES = 32
_REPORT_BYTES = 1 << 16


class TcpMeeting:
    """The part of a group over tcp that is on this node.

    Args:
        network: Where they are.
        size: Number of ranks on this node.
        env: Where the secret is looked for.

    Raises:
        InitializationFailed: The coordinator's address cannot be had.
    """

    backend = "tcp"

    def __init__(self, network: Network, size: int, env: Mapping[str, str]) -> None:
        self._first_rank = network.node_rank * size
        self._size = network.nnodes * size
        self._local_size = size
        with contextlib.ExitStack() as stack:
            self._listener: socket.socket | None = None
            coordinator = network.coordinator
            if network.node_rank == 0:
                self._listener = stack.enter_context(socket_above_standard(_listen(coordinator)))
                coordinator = coordinator or f"127.0.0.1:{self._listener.getsockname()[1]}"
            assert coordinator is not None
            self._coordinator = coordinator
            self._secret: int | None = None
            key = env.get("COBRE_TCP_SECRET", "")
            if not key and network.coordinator is None:
                key = secrets.token_hex(_SECRET_BYTES)
            if key:
                self._secret = _hidden(key)
                stack.callback(os.close, self._secret)
            ends = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            self._report, self._report_end = map(above_standard, ends)
            stack.callback(os.close, self._report)
            stack.callback(os.close, self._report_end)
            self._told = b""
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def variables(self, rank: int) -> dict[str, str]:
        """See :meth:`Meeting.variables`."""
        own = {
            "COBRE_TCP_COORDINATOR": self._coordinator,
            "COBRE_TCP_REPORT": f"fd:{self._report_end}",
        }
        if self._secret is not None:
            own["COBRE_TCP_SECRET_FILE"] = f"fd:{self._secret}"
        if rank == 0 and self._listener is not None:
            own["COBRE_TCP_BIND_ADDR"] = f"fd:{self._listener.fileno()}"
        local = {"local_rank": rank - self._first_rank, "local_size": self._local_size}
        return {**rank_variables(self.backend, rank, self._size, **local), **own}

    def descriptors(self, rank: int) -> list[int]:
        """See :meth:`Meeting.descriptors`."""
        inherited = [self._report_end]
        if self._secret is not None:
            inherited.append(self._secret)
        if rank == 0 and self._listener is not None:
            inherited.append(self._listener.fileno())
        return inherited

    def report_exit(self, rank: int, *, exit_code: int | None, signal: int | None) -> None:
        """Nothing to do: the connections of a rank tell the others."""

    def interrupt(self, signal: int) -> None:
        """Nothing to do: compiled code calls no collective over tcp."""

    def stop(self, signal: int) -> None:
        """Nothing to do: the signal itself reaches every rank of this node."""

    def first_failed(self) -> int | None:
        """The rank of this node that the group's first failure names, or None."""
        failure = self._first_failure()
        rank: int = failure.get("rank", -1)
        return rank if 0 <= rank - self._first_rank < self._local_size else None

    def abort_code(self) -> int | None:
        """The code of a rank's ``abort(code)``, when that was the group's first failure."""
        failure = self._first_failure()
        return failure["value"] if failure.get("kind") == "aborted" else None

    def progress(self) -> Progress | None:
        """None: a rank's connections are its own."""
        return None

    def unlink(self) -> None:
        """Nothing to do: sockets and memory without a name end with those that have them."""

    def _first_failure(self) -> dict[str, Any]:
        with contextlib.suppress(BlockingIOError):
            while not self._told.endswith(b"\n"):
                self._told += os.read(self._report, _REPORT_BYTES)
        # The ranks have agreed on one failure, so the first line is as good as any.
        with contextlib.suppress(ValueError):
            told = json.loads(self._told.partition(b"\n")[0])
            if isinstance(told, dict) and isinstance(told.get("rank"), int):
                return {"value": 1, **told}
        return {}


def _listen(coordinator: str | None) -> socket.socket:
    if coordinator is None:
        return socket.create_server(("127.0.0.1", 0))
    # It says what an address is, and what is wrong with one.
    config = TcpConfig(coordinator, rank=0, size=1)
    host, port = config.coordinator, config.port
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, _, _, _, address = found[0]
        # The address by which the others come is one of this node, or forwarded to it. Debian gives
        # a node's own name an address of loopback, on that node alone.
        if not names_loopback(host) and is_loopback(str(address[0])):
            return socket.create_server(("", port), family=family)
        try:
            return socket.create_server(address[:2], family=family)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise
            return socket.create_server(("", port), family=family)
    except OSError as error:
        raise InitializationFailed(
            "tcp",
            f"The coordinator cannot listen on {coordinator}: {error.strerror or error}",
            operation="listen",
            source=error,
            context={"coordinator": coordinator},
            suggestion="Give --coordinator an address of node 0 and a port that is free there.",
        ) from error


def _hidden(key: str) -> int:
    """Return a descriptor of memory without a name that holds ``key``."""
    try:
        descriptor = above_standard(os.memfd_create("cobre-secret", os.MFD_CLOEXEC))
    except OSError:
        # The kernel refuses it; a file that never had a name is as private.
        with tempfile.TemporaryFile() as file:
            descriptor = above_standard(os.dup(file.fileno()))
    os.pwrite(descriptor, key.encode("utf-8", "surrogateescape"), 0)
    return descriptor
