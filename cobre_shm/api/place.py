"""Where the ranks of a call are, as its arguments say.

    comm=...                             the communicator that was given
    num_workers=1                        this process alone: local
    num_workers=N                        N workers that this process starts: shm, or tcp
    coordinator=..., rank=..., size=...  this process is one rank of a tcp group
    backend="mpi", or a registered name  this process is one rank of a group, started elsewhere

The environment chooses nothing, with one exception: for several workers, ``"auto"`` means tcp where
``COBRE_TCP_COORDINATOR`` is set, and not by our launcher, for its own ranks. How a group meets and
works, once its backend was chosen, is its to say: the secret, the address that listens, time
limits, tuning.
"""

from __future__ import annotations

import multiprocessing
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from cobre_shm.communicator import Communicator
from cobre_shm.errors import IncompatibleSettings
from cobre_shm.selection.factory import choose, create_communicator
from cobre_shm.selection.kinds import BackendKind, LocalConfig, MpiConfig, ShmConfig, TcpConfig
from cobre_shm.selection.registry import read_registry
from cobre_shm.selection.values import join_address
from cobre_shm.spawn.calls import check_size
from cobre_shm.spawn.meeting import Meeting, ShmMeeting
from cobre_shm.spawn.network import Network
from cobre_shm.spawn.tcp import TcpMeeting

__all__ = ["Place", "find_place"]

_COORDINATOR = "COBRE_TCP_COORDINATOR"
_PORT = "COBRE_TCP_PORT"
# Loaded with the first process, lock, queue, pool or shared value.
_SETS_START_METHOD = {
    f"multiprocessing.{name}"
    for name in ("popen_fork", "synchronize", "queues", "pool", "sharedctypes")
}


@dataclass(frozen=True)
class Place:
    """Where the ranks are.

    Attributes:
        workers: Number of worker processes to start; 0 when this process is a rank itself.
        backend: Name of the workers' backend.
        coordinator: Address at which tcp workers meet; None for one of this machine.
        comm: The communicator that was given, which stays open.
        config: Configuration or name of the one to make.
    """

    workers: int = 0
    backend: str = ""
    coordinator: str | None = None
    comm: Communicator | None = None
    config: Any = None

    @contextmanager
    def communicator(self) -> Iterator[Communicator]:
        """Give this process's communicator; one that was made here is closed afterwards."""
        if self.comm is not None:
            yield self.comm
        else:
            with create_communicator(self.config) as comm:
                yield comm

    def meeting(self) -> Meeting:
        """Return how the workers will find each other."""
        if self.backend == "shm":
            return ShmMeeting.unnamed(self.workers)
        # All ranks are of this process, so a secret that nobody else knows costs nothing.
        env = dict(os.environ)
        env["COBRE_TCP_SECRET"] = env.get("COBRE_TCP_SECRET") or secrets.token_hex(32)
        return TcpMeeting(Network(coordinator=self.coordinator), self.workers, env)


def find_place(
    backend: str | BackendKind,
    num_workers: int,
    coordinator: str | None,
    rank: int | None,
    size: int | None,
    comm: Communicator | None,
) -> Place:
    """Return where the ranks are. Nothing is started.

    Raises:
        IncompatibleSettings: The arguments do not go together.
        InvalidArguments: ``num_workers`` is out of range.
        BackendError: The backend is not known, or not available.
    """
    name = backend.value if isinstance(backend, BackendKind) else backend
    if not isinstance(name, str):
        raise _refuse(f"backend={backend!r}: expected a name, such as 'shm', or 'auto'", "backend")
    name = name.strip().lower()
    workers = check_size(num_workers, "num_workers")
    member = {"coordinator": coordinator, "rank": rank, "size": size}
    given = [key for key, value in member.items() if value is not None]
    if comm is not None:
        if given or workers > 1 or name not in ("auto", comm.backend):
            raise _refuse("comm= is all that is needed: leave out the other arguments", "comm")
        return Place(comm=comm)
    if workers > 1:
        if rank is not None or size is not None:
            raise _refuse("rank= and size= are for a group that is started elsewhere", "rank")
        return _worker_place(name, workers, coordinator)
    if given:
        if name not in ("auto", "tcp"):
            raise _refuse(f"{', '.join(given)} are of backend 'tcp', not {backend!r}", "backend")
        missing = [key for key, value in member.items() if value is None]
        if coordinator is None or rank is None or size is None:
            raise _refuse(f"a rank of a tcp group also needs {', '.join(missing)}", missing[0])
        return Place(config=_rank_of_group(coordinator, rank, size))
    return Place(config=_single(name))


def _rank_of_group(coordinator: str, rank: int, size: int) -> TcpConfig:
    """Configuration of one rank of a tcp group; what is no argument is the environment's."""
    # Checked by itself first, so that a mistake in an argument is not blamed on a variable.
    given = TcpConfig(coordinator, rank, size)
    assert given.port is not None
    arguments = {
        _COORDINATOR: join_address(given.coordinator, given.port),
        _PORT: "",
        "COBRE_TCP_RANK": str(given.rank),
        "COBRE_TCP_SIZE": str(given.size),
    }
    return TcpConfig.from_env({**os.environ, **arguments})


def _single(name: str) -> Any:
    """Configuration of a process that is not told of any other."""
    if name in ("auto", "local"):
        return LocalConfig()
    if name == "shm":
        return ShmConfig(f"/cobre-{secrets.token_hex(12)}", rank=0, size=1)
    if name == "mpi":
        return MpiConfig()
    if name == "tcp":
        raise _refuse(
            "backend 'tcp' needs coordinator=, rank= and size=, or num_workers= above 1", "backend"
        )
    return name


def _worker_place(name: str, workers: int, coordinator: str | None) -> Place:
    _check_start_method()
    if name in ("auto", "tcp") and coordinator is None:
        coordinator = _coordinator_of_environment()
    if name == "auto":
        name = "shm" if coordinator is None else "tcp"
    # Says so if it is not known or not installed.
    choose(read_registry(), name, {})
    if name not in ("shm", "tcp"):
        raise _refuse(f"workers meet over 'shm' or 'tcp', not over {name!r}", "backend")
    if name != "tcp" and coordinator is not None:
        raise _refuse(f"coordinator= is of backend 'tcp', not {name!r}", "coordinator")
    return Place(workers=workers, backend=name, coordinator=coordinator)


def _coordinator_of_environment() -> str | None:
    if os.environ.get("COBRE_TCP_REPORT"):
        # This process is a rank of a launcher, and that address its group's.
        return None
    address = {name: os.environ.get(name, "") for name in (_COORDINATOR, _PORT)}
    if not address[_COORDINATOR]:
        return None
    # It says what an address is, and what is wrong with one.
    config = TcpConfig.from_env({**address, "COBRE_TCP_RANK": "0", "COBRE_TCP_SIZE": "1"})
    return join_address(config.coordinator, config.port)


def _check_start_method() -> None:
    """Refuse a process whose user has chosen fork: what it then expects is not what happens."""
    if _has_chosen_fork():
        raise IncompatibleSettings(
            "The start method of multiprocessing is 'fork', which workers cannot use: threads and "
            "locks of this process would be copied in any state",
            context={"setting": "multiprocessing.set_start_method", "requested_value": "fork"},
            suggestion="Call multiprocessing.set_start_method('spawn', force=True) first",
        )


def _has_chosen_fork() -> bool:
    """Whether the user has called ``set_start_method("fork")``, as far as that can be told.

    Where fork is the default (Linux before Python 3.14), the first process, lock or queue that
    anybody makes sets the global method to it, whatever context it is of: a process of a context
    of its own tells the child the global method, and asking for it sets it. Nothing tells such a
    "fork" from a chosen one. So it counts only while no such thing was made, which is known from
    the modules of multiprocessing that are loaded for it. Workers are safe in any case: nothing
    of ours is forked.
    """
    # Without allow_none, asking would set it.
    if multiprocessing.get_start_method(allow_none=True) != "fork":
        return False
    is_default = multiprocessing.get_all_start_methods()[0] == "fork"
    return not (is_default and sys.modules.keys() & _SETS_START_METHOD)


def _refuse(message: str, setting: str) -> IncompatibleSettings:
    return IncompatibleSettings(
        message,
        context={"setting": setting},
        suggestion="See: help(cobre_shm.train)",
    )
