"""What to launch, and how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cobre_shm.spawn.network import Network
from cobre_shm.spawn.program import Program

__all__ = ["Job"]


@dataclass(frozen=True)
class Job:
    """What to launch.

    Attributes:
        program: What each rank runs.
        size: Number of ranks that are started here.
        environment: What all ranks share of it.
        backend: In which the ranks meet, ``shm`` or ``tcp``.
        network: Which part of the group is started here.
        start_method: ``zygote`` or ``spawn``.
        preload: Modules that the zygote imports beside those that every rank needs, with commas;
            ``auto``: numba, where the program imports it.
        cpus: For each rank here those that it may run on; empty: no rank is bound.
        labels: Whether every line says which rank wrote it.
        timestamps: Whether every line says when it came.
        output_dir: Where each rank's output is written to files of its own, or None.
        tee: Whether it is shown nonetheless.
        monitor: Whether a table of what the ranks do is shown instead.
        shown_ranks: Whose output is shown; None: that of all ranks.
        grace: Seconds between SIGINT and SIGTERM, and between SIGTERM and SIGKILL.
        timeout: Seconds that the run may take, all attempts together, or None.
        max_restarts: How often the group is started again after a failure.
        json_errors: Whether a failure is reported as JSON.
        events: A file for events, or None.
        json_events: Whether events go to standard error.
    """

    program: Program
    size: int
    environment: Mapping[str, str]
    backend: str = "shm"
    network: Network = field(default_factory=Network)
    start_method: str = "zygote"
    preload: str = "auto"
    cpus: Sequence[Sequence[int]] = field(default=())
    labels: bool = False
    timestamps: bool = False
    output_dir: Path | None = None
    tee: bool = False
    monitor: bool = False
    shown_ranks: frozenset[int] | None = None
    grace: float = 5.0
    timeout: float | None = None
    max_restarts: int = 0
    json_errors: bool = False
    events: Path | None = None
    json_events: bool = False

    @property
    def ranks(self) -> range:
        """The ranks that are started here."""
        first = self.network.node_rank * self.size
        return range(first, first + self.size)

    @property
    def group_size(self) -> int:
        """Number of ranks on all nodes."""
        return self.network.nnodes * self.size

    def cpus_of(self, rank: int) -> Sequence[int]:
        """Return where a rank is bound to, or nothing."""
        return self.cpus[self.ranks.index(rank) % len(self.cpus)] if self.cpus else ()

    def shows(self, rank: int) -> bool:
        """Whether a rank's output is shown."""
        if self.output_dir is not None and not self.tee:
            return False
        return self.shown_ranks is None or rank in self.shown_ranks
