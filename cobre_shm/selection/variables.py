"""Every ``COBRE_*`` variable: the one table.

A variable is named after its backend and the field of that backend's configuration:
``COBRE_SHM_RANK`` fills ``ShmConfig.rank``. ``env.py`` reads them.
"""

from __future__ import annotations

from dataclasses import dataclass

from cobre_shm import failpoints, layout
from cobre_shm.selection.values import (
    BackendName,
    BindAddress,
    Coordinator,
    Descriptor,
    Failpoint,
    Flag,
    Integer,
    Seconds,
    Secret,
    SecretFile,
    SegmentName,
    TuningFile,
    ValueType,
    Word,
)

__all__ = [
    "BACKEND_VARIABLE",
    "PREFIX",
    "VARIABLES",
    "Variable",
    "markdown_table",
    "variables_of",
]

PREFIX = "COBRE_"
BACKEND_VARIABLE = "COBRE_COMM_BACKEND"

# Ranks travel as 32-bit integers over TCP.
MAX_TCP_RANKS = 2**31 - 1
# What poll() takes: a signed 32-bit number of milliseconds.
MAX_MILLISECONDS = 2**31 - 1


@dataclass(frozen=True)
class Variable:
    """One environment variable.

    Attributes:
        name: ``COBRE_<BACKEND>_<WHAT>[_<UNIT>]``.
        backend: The backend it configures, or ``"comm"`` for the selection itself.
        type: What it may hold.
        help: One line for the table of the documentation.
        default: Text of the value that stands when it is unset; None when the backend decides.
        example: A valid value, for suggestions that can be pasted.
        required: Whether the backend cannot start without it.
        unit: Unit of the value, or the empty string.
    """

    name: str
    backend: str
    type: ValueType
    help: str
    default: str | None
    example: str
    required: bool = False
    unit: str = ""

    @property
    def field(self) -> str:
        """Name of the configuration's field that the variable fills."""
        return self.name.removeprefix(f"{PREFIX}{self.backend.upper()}_").lower()


VARIABLES: tuple[Variable, ...] = (
    Variable(
        BACKEND_VARIABLE,
        "comm",
        BackendName(),
        "Communication backend: `auto`, `mpi`, `tcp`, `shm`, `local`, or a registered name",
        default="auto",
        example="local",
    ),
    Variable(
        failpoints.VARIABLE,
        "comm",
        Failpoint(),
        "For tests: where a rank kills itself, `PHASE:kill@RANK,SEQUENCE`, or yields, "
        "`anywhere:yield@RANK,SEED`; `on`: nowhere yet",
        default=None,
        example="publish:kill@1,5",
    ),
    Variable(
        "COBRE_SHM_NAME",
        "shm",
        SegmentName(),
        "Name of the POSIX shared memory segment, the same on all ranks of the node; "
        "or `fd:N`, a memfd inherited from the launcher",
        default=None,
        example="/my-run",
        required=True,
    ),
    Variable(
        "COBRE_SHM_RANK",
        "shm",
        Integer(0, layout.MAX_RANKS - 1, "COBRE_SHM_SIZE - 1"),
        "Rank of this process, below `COBRE_SHM_SIZE`",
        default=None,
        example="0",
        required=True,
    ),
    Variable(
        "COBRE_SHM_SIZE",
        "shm",
        Integer(1, layout.MAX_RANKS),
        "Number of ranks that share the segment",
        default=None,
        example="4",
        required=True,
    ),
    Variable(
        "COBRE_SHM_TIMEOUT_SECS",
        "shm",
        Seconds(),
        "How long a collective may stand still before it fails; `inf` for no limit",
        default="60",
        example="60",
        unit="s",
    ),
    Variable(
        "COBRE_SHM_STALL_WARN_SECS",
        "shm",
        Seconds(),
        "After how long a late rank is named on stderr, and again every six times as long",
        default="10",
        example="10",
        unit="s",
    ),
    Variable(
        "COBRE_SHM_TUNING",
        "shm",
        TuningFile(),
        "Switch points of the algorithms: a file that `python -m cobre_shm.tune` wrote, or `auto` "
        "for the one of this machine",
        default=None,
        example="auto",
    ),
    Variable(
        "COBRE_SHM_HUGEPAGES",
        "shm",
        Word(("auto", "never", "always")),
        "Huge pages for shared regions and arrays: `auto` where they are large and the system "
        "leaves it to programs, `never`, `always`; where refused, the usual pages",
        default="auto",
        example="always",
    ),
    Variable(
        "COBRE_SHM_NUMA_INTERLEAVE",
        "shm",
        Flag(),
        "`1`: spread shared regions over all memory nodes; `0`: block r of equal blocks lies on "
        "the memory node of rank r",
        default="0",
        example="1",
    ),
    Variable(
        "COBRE_TCP_COORDINATOR",
        "tcp",
        Coordinator(),
        "Where rank 0 listens: `host`, `host:port` or `[v6]:port`",
        default=None,
        example="host",
        required=True,
    ),
    Variable(
        "COBRE_TCP_PORT",
        "tcp",
        Integer(1, 65535),
        "Port on which the coordinator listens, the same on all ranks",
        default="29500",
        example="29500",
    ),
    Variable(
        "COBRE_TCP_RANK",
        "tcp",
        Integer(0, MAX_TCP_RANKS - 1, "COBRE_TCP_SIZE - 1"),
        "Rank of this process, below `COBRE_TCP_SIZE`",
        default=None,
        example="0",
        required=True,
    ),
    Variable(
        "COBRE_TCP_SIZE",
        "tcp",
        Integer(1, MAX_TCP_RANKS),
        "Number of ranks",
        default=None,
        example="4",
        required=True,
    ),
    Variable(
        "COBRE_TCP_BIND_ADDR",
        "tcp",
        BindAddress(),
        "Local address that takes connections from peers; or `fd:N`, a listening socket "
        "inherited from the launcher",
        default="0.0.0.0",
        example="0.0.0.0",
    ),
    Variable(
        "COBRE_TCP_CONNECT_TIMEOUT_MS",
        "tcp",
        Integer(1, MAX_MILLISECONDS),
        "How long start-up may take until all ranks are connected",
        default="30000",
        example="30000",
        unit="ms",
    ),
    Variable(
        "COBRE_TCP_TIMEOUT_SECS",
        "tcp",
        Seconds(),
        "How long a collective may stand still before it fails; `inf` for no limit",
        default="60",
        example="60",
        unit="s",
    ),
    Variable(
        "COBRE_TCP_STALL_WARN_SECS",
        "tcp",
        Seconds(),
        "After how long a late rank is named on stderr, and again every six times as long",
        default="10",
        example="10",
        unit="s",
    ),
    Variable(
        "COBRE_TCP_REPORT",
        "tcp",
        Descriptor(),
        "Pipe to the launcher, which sets this, for the group's first failure: `fd:N`",
        default=None,
        example="fd:5",
    ),
    Variable(
        "COBRE_TCP_SECRET",
        "tcp",
        Secret(),
        "What the ranks of the group know and nobody else; a file is better, for others see it",
        default=None,
        example="'a long random text'",
    ),
    Variable(
        "COBRE_TCP_SECRET_FILE",
        "tcp",
        SecretFile(),
        "File with the secret, owned by this user and readable by nobody else; "
        "or `fd:N`, inherited from the launcher",
        default=None,
        example="secret.txt",
    ),
    Variable(
        "COBRE_TCP_INSECURE",
        "tcp",
        Flag(),
        "`1` allows a network that is not loopback without a secret: "
        "then whoever reaches the port can join",
        default="0",
        example="1",
    ),
    Variable(
        "COBRE_MPI_HIERARCHICAL",
        "mpi",
        Flag(or_auto=True),
        "Ranks of one node meet in shared memory and their leaders talk MPI: `auto` where that "
        "is possible, `1` or it is an error, `0` never",
        default="auto",
        example="auto",
    ),
    Variable(
        "COBRE_MPI_CHECK",
        "mpi",
        Flag(),
        "`1`: compare every call with those of all ranks first, one small collective more",
        default="0",
        example="1",
    ),
)


def variables_of(backend: str) -> tuple[Variable, ...]:
    """Return the variables that configure ``backend``, in the order of the table."""
    return tuple(variable for variable in VARIABLES if variable.backend == backend)


def markdown_table() -> str:
    """Return the table of all variables as the documentation shows it."""
    lines = [
        "| Variable | Backend | Required | Default | Meaning |",
        "| --- | --- | --- | --- | --- |",
    ]
    for variable in VARIABLES:
        default = "" if variable.default is None else f"`{variable.default}`"
        if variable.unit and default:
            default = f"{default} {variable.unit}"
        backend = "" if variable.backend == "comm" else variable.backend
        required = "yes" if variable.required else "no"
        lines.append(
            f"| `{variable.name}` | {backend} | {required} | {default} | {variable.help} |"
        )
    return "\n".join(lines) + "\n"
