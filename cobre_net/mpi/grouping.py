"""From a configuration to the way in which the ranks talk: flat, one node, or two levels."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from cobre_net.mpi.flat import Flat
from cobre_net.mpi.library import MPI, returning_errors
from cobre_net.mpi.nodes import find_nodes
from cobre_shm.communicator import Communicator
from cobre_shm.errors import CobreError, InitializationFailed
from cobre_shm.segment.handover import new_unnamed_segment
from cobre_shm.segment.refusal import system_error
from cobre_shm.segment.segment import Segment
from cobre_shm.selection.kinds import MpiConfig, ShmConfig

if TYPE_CHECKING:
    from cobre_net.mpi.levels import TwoLevel
    from cobre_shm.shm import ShmCommunicator

__all__ = ["Grouping"]

# What ranks tell each other of a reason.
_TEXT_BYTES = 1024


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
            self.free()
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
        why = ""
        # Nobody leaves the block by an exception: that would count as a failure of this rank.
        with self._split() as node:
            try:
                self._group = self._form_group(node, several=len(firsts) > 1)
            except CobreError as error:
                why = error.message
        why = _first_text(self._flat.comm, why)
        if why and self._group is not None:
            self._group.close()
            self._group = None
        return f"a node could not form a group: {why}" if why else ""

    def _form_group(self, node: Communicator, *, several: bool) -> ShmCommunicator:
        from cobre_shm.shm import ShmCommunicator

        slot_bytes = ShmConfig.slot_bytes
        with new_unnamed_segment(node, slot_bytes) as name:
            segment, why = None, ""
            try:
                # As MPI waits: a leader may be in a collective of the leaders for any time.
                config = ShmConfig(
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
                segment = Segment.inherit(name)
            except CobreError as error:
                why = error.message
            except OSError as error:
                why = system_error(name, error).message
            # Those that join would wait for ever for one that cannot.
            why = _first_text(self.node, why)
            if segment is None or why:
                if segment is not None:
                    segment.close()
                raise InitializationFailed("mpi", why)
            return ShmCommunicator(config, made=segment)

    def _two_levels(self, firsts: list[int]) -> TwoLevel:
        from cobre_net.mpi.levels import TwoLevel

        assert self._group is not None
        colour = 0 if self.is_leader else MPI.UNDEFINED
        comm = self._flat.comm.Split(colour, self._flat.rank)
        leaders = None
        if self.is_leader:
            self._leaders = returning_errors(comm)
            leaders = Flat(comm, deterministic=self._config.deterministic)
        return TwoLevel(self._flat, self._group, leaders, firsts)

    def _split(self) -> Communicator:
        """Return a flat communicator of the ranks of this node."""
        from cobre_net.mpi.communicator import MpiCommunicator

        # What is checked again must not fail on one rank alone, as a file may.
        config = replace(self._config, comm=self.node, hierarchical=False, node=None, tuning=None)
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

    def tell_peers(self, error: BaseException) -> None:
        """Fail the group of this node for an exception of this rank's program."""
        if self._group is not None:
            self._group._tell_peers(error)

    def close(self) -> None:
        """Release the group and the communicators.

        Raises:
            InvalidCommunicator: A thread is inside a collective of the group; nothing is released.
        """
        if self._group is not None:
            self._group.close()

    def free(self) -> None:
        """Release the communicators of MPI."""
        if not MPI.Is_finalized():
            for comm in (self._leaders, self.node):
                if comm is not None:
                    comm.Free()
        self._leaders = None


def _first_text(comm: Any, text: str) -> str:
    """Return the text of the first rank of ``comm`` that has one, or nothing. Collective.

    Args:
        comm: Of mpi4py. By its buffers: its objects are pickled.
        text: Of this rank.
    """
    rank, size = comm.Get_rank(), comm.Get_size()
    first = np.array([rank if text else size], np.int64)
    comm.Allreduce(MPI.IN_PLACE, first, MPI.MIN)
    if first[0] == size:
        return ""
    told = bytearray(text.encode("utf-8", "replace")[:_TEXT_BYTES].ljust(_TEXT_BYTES))
    comm.Bcast([told, MPI.BYTE], int(first[0]))
    return told.rstrip().decode("utf-8", "ignore")
