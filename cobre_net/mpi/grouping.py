"""From a configuration to the way in which the ranks talk: flat, one node, or two levels."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cobre_net.mpi.flat import Flat
from cobre_net.mpi.library import MPI
from cobre_net.mpi.nodes import find_nodes
from cobre_shm.communicator import Communicator
from cobre_shm.errors import CobreError, InitializationFailed
from cobre_shm.segment.handover import new_unnamed_segment
from cobre_shm.selection.kinds import MpiConfig, ShmConfig

if TYPE_CHECKING:
    from cobre_net.mpi.levels import TwoLevel
    from cobre_shm.shm import ShmCommunicator

__all__ = ["Grouping"]


class Grouping:
    """The levels of a communicator. Construction is collective.

    Args:
        flat: All ranks.
        config: Of the communicator.

    Raises:
        InitializationFailed: Two levels were demanded and are not possible; on all ranks.

    Attributes:
        engine: What runs the collectives.
        whole: The shm group, where it has all ranks, which then does everything by itself.
        levels: In words.
        node: mpi4py communicator of the ranks of this node.
        is_leader: Whether this is local rank 0.
    """

    def __init__(self, flat: Flat, config: MpiConfig) -> None:
        self._flat, self._config = flat, config
        self.engine: Flat | TwoLevel = flat
        self.whole: ShmCommunicator | None = None
        self._group: ShmCommunicator | None = None
        self._leaders: Any = None
        nodes = find_nodes(flat.comm, config.node)
        self.node = nodes.comm
        self.is_leader = bool(nodes.comm.Get_rank() == 0)
        why_flat = self._why_flat(nodes.is_placed_by_node, nodes.firsts)
        if not why_flat:
            why_flat = self._form_groups(nodes.firsts)
        if why_flat and config.hierarchical is True and flat.size > 1:
            self.close()
            raise InitializationFailed(
                "mpi",
                f"Shared memory within the nodes was demanded, but {why_flat}",
                context={"setting": "hierarchical", "reason": why_flat},
                suggestion="Use hierarchical=auto (COBRE_MPI_HIERARCHICAL=auto), or place ranks "
                "node by node (mpiexec --map-by slot, srun --distribution=block)",
            )
        if why_flat:
            self.levels = f"flat: {why_flat}"
        elif len(nodes.firsts) == 1:
            self.whole = self._group
            self.levels = "one node"
        else:
            self.engine = self._two_levels(nodes.firsts)
            self.levels = f"{len(nodes.firsts)} nodes"

    def _why_flat(self, is_placed_by_node: bool, firsts: list[int]) -> str:
        """Return why two levels are out of the question, or the empty string."""
        size, config = self._flat.size, self._config
        if config.hierarchical is False:
            return "so configured"
        if size == 1:
            return "one rank"
        if not config.deterministic:
            return "MPI's own reduction was asked for"
        if not is_placed_by_node:
            return "the ranks are not placed node by node"
        return "every rank is alone on its node" if len(firsts) == size else ""

    def _form_groups(self, firsts: list[int]) -> str:
        """Form the shm group of this node; return why some node could not, or nothing."""
        error: CobreError | None = None
        try:
            self._group = self._form_group(several=len(firsts) > 1)
        except CobreError as refused:
            error = refused
        failures = [text for text in self._flat.comm.allgather(error and error.message) if text]
        if failures and self._group is not None:
            self._group.close()
            self._group = None
        return f"a node could not form a group: {failures[0]}" if failures else ""

    def _form_group(self, *, several: bool) -> ShmCommunicator:
        from cobre_shm.shm import ShmCommunicator

        slot_bytes = ShmConfig.slot_bytes
        with self._split() as node, new_unnamed_segment(node, slot_bytes) as name:
            # As MPI waits: a leader may be in a collective of the leaders for any time.
            return ShmCommunicator(
                ShmConfig(
                    name=name,
                    rank=node.rank,
                    size=node.size,
                    timeout_secs=math.inf,
                    slot_bytes=slot_bytes,
                    stall_warn_secs=math.inf if several else ShmConfig.stall_warn_secs,
                    hugepages=self._config.hugepages,
                    numa_interleave=self._config.numa_interleave,
                    tuning=self._config.tuning,
                )
            )

    def _two_levels(self, firsts: list[int]) -> TwoLevel:
        from cobre_net.mpi.levels import TwoLevel

        assert self._group is not None
        colour = 0 if self.is_leader else MPI.UNDEFINED
        comm = self._flat.comm.Split(colour, self._flat.rank)
        leaders = None
        if self.is_leader:
            self._leaders = comm
            leaders = Flat(comm, deterministic=self._config.deterministic)
        return TwoLevel(self._flat, self._group, leaders, firsts)

    def _split(self) -> Communicator:
        """Return a flat communicator of the ranks of this node."""
        from cobre_net.mpi.communicator import MpiCommunicator

        config = replace(self._config, comm=self.node, hierarchical=False, node=None)
        return MpiCommunicator(config)

    def split(self) -> Communicator:
        """Return a new communicator of the ranks of this node."""
        return self._split() if self._group is None else self._group.split_local()

    def abort(self, code: int) -> None:
        """Tell the ranks of this node that this one aborts the job.

        They learn it before MPI's launcher ends them, and would otherwise only see a death.
        """
        if self._group is not None:
            with suppress(SystemExit):
                self._group.abort(code)

    def close(self) -> None:
        """Release the group and the communicators."""
        if self._group is not None:
            self._group.close()
        if not MPI.Is_finalized():
            for comm in (self._leaders, self.node):
                if comm is not None:
                    comm.Free()
        self._leaders = None
