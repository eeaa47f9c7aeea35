"""Which backend, and how it is configured, as values of a program.

A configuration is complete and valid once it exists: ``__post_init__`` checks every field and
puts it in its normal form. ``from_env`` reads the same fields from variables.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Protocol, Self, TypeVar

from cobre_shm import layout
from cobre_shm.errors import InitializationFailed
from cobre_shm.selection.env import check_value, read_settings
from cobre_shm.selection.values import Integer, split_address
from cobre_shm.selection.variables import Variable, variables_of

__all__ = [
    "BackendConfig",
    "BackendKind",
    "LocalConfig",
    "MpiConfig",
    "ShmConfig",
    "TcpConfig",
]

DEFAULT_TCP_PORT = 29500


class BackendConfig(Protocol):
    """Any backend's configuration: it says which backend it is for."""

    backend: ClassVar[str]


_Config = TypeVar("_Config", bound=BackendConfig)


class BackendKind(enum.Enum):
    """The built-in backends, for programs that choose by themselves.

    TCP and SHM are used with a configuration, ``BackendKind.SHM(ShmConfig(...))``, which is the
    same as the configuration alone. AUTO looks at the environment for what was launched, and not
    at ``COBRE_COMM_BACKEND``.
    """

    AUTO = "auto"
    LOCAL = "local"
    MPI = "mpi"
    TCP = "tcp"
    SHM = "shm"

    def __call__(self, config: _Config) -> _Config:
        """Return ``config``.

        Raises:
            TypeError: It configures another backend.
        """
        if getattr(config, "backend", None) != self.value:
            raise TypeError(f"{self} takes a configuration of {self.value}, not {config!r}")
        return config


@dataclass(frozen=True)
class LocalConfig:
    """One process. There is nothing to configure."""

    backend: ClassVar[str] = "local"

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Self:  # noqa: ARG003 - nothing to read
        """Return the configuration; no variable bears on it."""
        return cls()


# What an MPI group takes for the shared memory groups of its nodes.
_OF_NODES = ("hugepages", "numa_interleave", "tuning")
_MPI_VARIABLES = {
    **{variable.field: variable for variable in variables_of("mpi")},
    **{variable.field: variable for variable in variables_of("shm") if variable.field in _OF_NODES},
}


@dataclass(frozen=True)
class MpiConfig:
    """A group of processes that an MPI launcher started; rank and size come from MPI.

    Attributes:
        comm: Any intracommunicator of mpi4py; None: ``MPI.COMM_WORLD``. It is duplicated, so
            that our messages never meet the program's.
        deterministic: Whether ``allreduce`` adds in rank order, so that its bits are those of
            every other backend. False: MPI's own reduction, where MPI has one. The same on all
            ranks.
        hierarchical: Whether the ranks of a node form a shared memory group, whose leaders talk
            MPI. ``"auto"``: where that is possible; True: it is an error where it is not. The same
            on all ranks.
        check: Whether every call is compared with those of all ranks first, at the cost of one
            small collective. The same on all ranks.
        node: Ranks of one machine that have equal numbers count as a node; None: all of them.
            To make one group for each NUMA domain, for example.
        hugepages: Of the shared memory groups, see :class:`ShmConfig`.
        numa_interleave: The same.
        tuning: The same.

    Raises:
        InitializationFailed: A field is out of range.
    """

    backend: ClassVar[str] = "mpi"

    comm: Any = None
    deterministic: bool = True
    hierarchical: bool | str = "auto"
    check: bool = False
    node: int | None = None
    hugepages: str = "auto"
    numa_interleave: bool = False
    tuning: str | None = None

    def __post_init__(self) -> None:
        for name, variable in _MPI_VARIABLES.items():
            value = getattr(self, name)
            if (name, value) != ("tuning", None):
                value = check_value(variable, value, f"MpiConfig.{name}", value)
                object.__setattr__(self, name, value)
        numbers = Integer(0, 2**31 - 1)
        if self.node is not None:
            try:
                object.__setattr__(self, "node", numbers.check(self.node))
            except ValueError:
                raise InitializationFailed(
                    "mpi",
                    f"MpiConfig.node={self.node!r} is not valid: expected {numbers.expected}",
                    operation="configure",
                    context={"setting": "MpiConfig.node", "value": str(self.node)},
                    suggestion="Example: node=0",
                ) from None

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Self:
        """Read ``COBRE_MPI_*``, and those ``COBRE_SHM_*`` that shape the groups of the nodes.

        Raises:
            InitializationFailed: A value is malformed.
        """
        settings = read_settings("mpi", _MPI_VARIABLES.values(), env)
        for setting, value in settings.items():
            name = _MPI_VARIABLES[setting].name
            check_value(_MPI_VARIABLES[setting], value, name, env[name])
        return cls(**settings)


@dataclass(frozen=True)
class ShmConfig:
    """A group of processes on one node that meet in a shared memory segment.

    Attributes:
        name: Of the segment, the same on all ranks; 1 to 250 bytes, no NUL, no slash but a
            leading one, which may be left out and is always there afterwards. Or ``fd:N``: the
            launcher's memfd, inherited as descriptor N.
        rank: Of this process, ``0 <= rank < size``.
        size: Number of ranks, 1 to 1024.
        timeout_secs: Seconds for which a collective may stand still; above 0, ``inf`` allowed.
        slot_bytes: Bytes that one rank moves per step of a collective; larger payloads go in
            several steps. A multiple of 4096, the page, up to 2**30. Rank 0's value holds for all.
        stall_warn_secs: Seconds after which the ranks that wait name a late one on stderr; above
            0, ``inf`` for never.
        hugepages: Whether to ask for huge pages for shared regions and arrays: ``auto`` where
            they are large and the system leaves it to programs, ``never``, ``always``.
        numa_interleave: Whether to spread regions over all memory nodes, rather than to have each
            rank's block on the node of that rank.
        tuning: File of switch points (``python -m cobre_shm.tune`` writes one), or ``auto`` for
            the one of this machine. None: the defaults. Rank 0's value holds for all.

    Raises:
        InitializationFailed: A field is out of range.
    """

    backend: ClassVar[str] = "shm"

    name: str
    rank: int
    size: int
    timeout_secs: float = 60.0
    slot_bytes: int = layout.DEFAULT_SLOT_BYTES
    stall_warn_secs: float = 10.0
    hugepages: str = "auto"
    numa_interleave: bool = False
    tuning: str | None = None

    def __post_init__(self) -> None:
        _store(self, _checked("shm", _values(self), _field_of(self)))
        slots = Integer(layout.PAGE_BYTES, layout.MAX_SLOT_BYTES)
        try:
            object.__setattr__(self, "slot_bytes", slots.check(self.slot_bytes))
            aligned = self.slot_bytes % layout.PAGE_BYTES == 0
        except ValueError:
            aligned = False
        if not aligned:
            raise InitializationFailed(
                "shm",
                f"ShmConfig.slot_bytes={self.slot_bytes!r} is not valid: expected "
                f"{slots.expected} that is a multiple of {layout.PAGE_BYTES}",
                operation="configure",
                suggestion=f"Example: slot_bytes={type(self).slot_bytes}",
            )

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Self:
        """Read ``COBRE_SHM_*``.

        Raises:
            MissingConfiguration: Required variables are not set; it lists all of them.
            InitializationFailed: A value is malformed or out of range.
        """
        settings = read_settings("shm", variables_of("shm"), env)
        return cls(**_checked("shm", settings, _variable_in(env)))


@dataclass(frozen=True)
class TcpConfig:
    """A group of processes on any hosts that meet at a coordinator, which is rank 0.

    Attributes:
        coordinator: Where rank 0 listens: ``host``, ``host:port`` or ``[v6]:port``; afterwards
            the host alone.
        rank: Of this process, ``0 <= rank < size``.
        size: Number of ranks.
        port: On which the coordinator listens, 1 to 65535. None: the one given in
            ``coordinator``, or 29500; afterwards never None. Given in both places, they agree.
        bind_addr: Local IP address that takes connections from peers; where it is a wildcard and
            the coordinator's address is loopback, that one. Or ``fd:N``: the launcher's listening
            socket, inherited as descriptor N.
        connect_timeout_ms: Milliseconds until all ranks must be connected; at least 1.
        timeout_secs: Seconds for which a collective may stand still; above 0, ``inf`` allowed.
        stall_warn_secs: Seconds after which a late rank is named on stderr; above 0, ``inf`` for
            never.
        secret: What the ranks of the group know and nobody else. None: the one in
            ``secret_file``, or none, which is enough on loopback only.
        secret_file: Path of a file with the secret, owned by this user and readable by nobody
            else; or ``fd:N``, inherited as descriptor N. None: ``secret`` counts.
        insecure: Whether to do without a secret on a network that is not loopback.
        report: ``fd:N``, the launcher's pipe for the group's first failure; None: there is none.

    Raises:
        InitializationFailed: A field is out of range, the two ports differ, or there are two
            secrets.
    """

    backend: ClassVar[str] = "tcp"

    coordinator: str
    rank: int
    size: int
    port: int | None = None
    bind_addr: str = "0.0.0.0"
    connect_timeout_ms: int = 30_000
    timeout_secs: float = 60.0
    stall_warn_secs: float = 10.0
    secret: str | None = field(default=None, repr=False)
    secret_file: str | None = None
    insecure: bool = False
    report: str | None = None

    def __post_init__(self) -> None:
        checked = _checked("tcp", _values(self), _field_of(self))
        host, port_inside = split_address(checked["coordinator"])
        port = checked.get("port", port_inside or DEFAULT_TCP_PORT)
        if port_inside not in (None, port):
            raise InitializationFailed(
                "tcp",
                f"The coordinator {self.coordinator} names another port than the port {port} "
                "that is set: expected the same port in both places, or in one",
                operation="configure",
                context={"coordinator": self.coordinator, "port": port},
                suggestion="Give the port once: unset COBRE_TCP_PORT, or leave the field port out",
            )
        if self.secret is not None and self.secret_file is not None:
            raise InitializationFailed(
                "tcp",
                "The secret is given twice, as itself and as a file: expected one of them",
                operation="configure",
                suggestion="Unset COBRE_TCP_SECRET, or leave the field secret out",
            )
        _store(self, {**checked, "coordinator": host, "port": port})

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Self:
        """Read ``COBRE_TCP_*``.

        Raises:
            MissingConfiguration: Required variables are not set; it lists all of them.
            InitializationFailed: A value is malformed or out of range.
        """
        settings = read_settings("tcp", variables_of("tcp"), env)
        return cls(**_checked("tcp", settings, _variable_in(env)))


# What a message says of a setting: what it is called, and the value that was given.
_Quote = Callable[[Variable], tuple[str, Any]]


def _checked(backend: str, values: Mapping[str, Any], quote: _Quote) -> dict[str, Any]:
    known = {variable.field: variable for variable in variables_of(backend)}
    # The size comes first: it bounds the rank.
    size = check_value(known["size"], values["size"], *quote(known["size"]))
    known["rank"] = replace(known["rank"], type=Integer(0, size - 1))
    return {
        name: check_value(variable, values[name], *quote(variable))
        for name, variable in known.items()
        if name in values
    }


def _variable_in(env: Mapping[str, str]) -> _Quote:
    return lambda variable: (variable.name, env[variable.name])


def _field_of(config: ShmConfig | TcpConfig) -> _Quote:
    return lambda variable: (
        f"{type(config).__name__}.{variable.field}",
        getattr(config, variable.field),
    )


def _values(config: ShmConfig | TcpConfig) -> dict[str, Any]:
    """The fields that are set. None means not set only where it is the default."""
    values = ((each, getattr(config, each.name)) for each in fields(config))
    return {
        each.name: value for each, value in values if value is not None or each.default is not None
    }


def _store(config: ShmConfig | TcpConfig, values: Mapping[str, Any]) -> None:
    # The way in which a frozen dataclass normalises its own fields.
    for name, value in values.items():
        object.__setattr__(config, name, value)
