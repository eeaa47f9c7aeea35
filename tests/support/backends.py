"""The backends that the suite runs on, and how a test process joins a group of each.

A new backend is one more line in ``BACKENDS``.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cobre_shm.communicator import Communicator
from cobre_shm.local import LocalCommunicator
from cobre_shm.selection.registry import read_registry

Connect = Callable[[], Communicator]

# Of a collective that stands still. Above what eight ranks on two busy cores ever need, below the
# deadline of a group, so that the error that names the missing rank comes first.
COLLECTIVE_TIMEOUT_SECS = 30.0


@dataclass(frozen=True)
class Backend:
    """How to make groups of one backend.

    Attributes:
        sizes: Numbers of ranks that the conformance suite runs.
        make_group: Takes the number of ranks and the seconds that a collective may stand still;
            returns one picklable callable per rank, which joins the group.
        in_process: Whether the only rank is the test process itself.
    """

    sizes: tuple[int, ...]
    make_group: Callable[[int, float], list[Connect]]
    in_process: bool = False


@dataclass(frozen=True)
class _JoinShm:
    name: str
    rank: int
    size: int
    timeout: float

    def __call__(self) -> Communicator:
        from cobre_shm.selection.kinds import ShmConfig
        from cobre_shm.shm import ShmCommunicator

        return ShmCommunicator(
            ShmConfig(name=self.name, rank=self.rank, size=self.size, timeout_secs=self.timeout)
        )


def _make_shm_group(size: int, timeout: float) -> list[Connect]:
    name = f"/cobre-test-{secrets.token_hex(8)}"
    return [_JoinShm(name, rank, size, timeout) for rank in range(size)]


@dataclass(frozen=True)
class _JoinShmByMethods(_JoinShm):
    """Joins with the Python methods, as where the fast road cannot be taken."""

    def __call__(self) -> Communicator:
        from cobre_shm import fastcall
        from cobre_shm.shm import ShmCommunicator

        fastcall.remove(ShmCommunicator)
        return super().__call__()


def _make_shm_group_by_methods(size: int, timeout: float) -> list[Connect]:
    name = f"/cobre-test-{secrets.token_hex(8)}"
    return [_JoinShmByMethods(name, rank, size, timeout) for rank in range(size)]


@dataclass(frozen=True)
class _JoinTcp:
    port: int
    secret: str
    rank: int
    size: int
    timeout: float

    def __call__(self) -> Communicator:
        from cobre_net.tcp import TcpCommunicator
        from cobre_shm.selection.kinds import TcpConfig

        return TcpCommunicator(
            TcpConfig(
                "127.0.0.1",
                self.rank,
                self.size,
                port=self.port,
                secret=self.secret,
                timeout_secs=self.timeout,
            )
        )


def free_port() -> int:
    """Return a port that nobody listens on now, if possible none that the kernel would choose.

    It would give those to whoever leaves the choice to it, also before ours is used.
    """
    text = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii")
    first, last = map(int, text.split())
    others = [port for port in range(10_000, 1 << 16) if not first <= port <= last]
    while others:
        port = secrets.choice(others)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _make_tcp_group(size: int, timeout: float) -> list[Connect]:
    port, secret = free_port(), secrets.token_hex(16)
    return [_JoinTcp(port, secret, rank, size, timeout) for rank in range(size)]


def _make_local_group(size: int, _timeout: float) -> list[Connect]:
    if size != 1:
        raise ValueError(f"a local group has 1 rank, not {size}")
    return [LocalCommunicator]


BACKENDS = {
    "local": Backend((1,), _make_local_group, in_process=True),
    "shm": Backend((1, 2, 3, 4, 8), _make_shm_group),
    "shm-by-methods": Backend((2, 3), _make_shm_group_by_methods),
    "tcp": Backend((1, 2, 3, 4, 8), _make_tcp_group),
}


def why_missing(name: str) -> str | None:
    """Return why the backend is not available in this installation, or None."""
    name = name.partition("-")[0]
    spec = read_registry().find(name)
    if spec is None:
        return f"backend {name} is not registered"
    missing = spec.missing()
    return f"backend {name} needs {', '.join(missing)}: {spec.install_hint}" if missing else None
