"""Which ranks share a node, and whether two levels can keep the order of the ranks.

Ranks are *placed node by node* when those of each node are consecutive: 0 1 2 3 | 4 5 6 7. Then a
reduction in rank order is one over the first node followed by one over the second, so the nodes
can be taken one after the other. Placed otherwise (round robin: 0 2 4 6 | 1 3 5 7) the order goes
back and forth between the nodes, nothing can be added up within one of them, and the communicator
stays flat.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cobre_net.mpi.library import MPI, returning_errors

__all__ = ["Nodes", "find_nodes"]


@dataclass(frozen=True)
class Nodes:
    """Where the ranks of a communicator are.

    Attributes:
        comm: mpi4py communicator of the ranks of this node, in rank order.
        leaders: For each rank, the rank of its node's leader: the lowest of the node.
    """

    comm: Any
    leaders: tuple[int, ...]

    @property
    def is_placed_by_node(self) -> bool:
        """Whether the ranks of every node are consecutive."""
        return all(a <= b for a, b in zip(self.leaders, self.leaders[1:], strict=False))

    @property
    def firsts(self) -> list[int]:
        """The leaders, ascending: where ranks are placed by node, each node's first rank."""
        return sorted(set(self.leaders))


def find_nodes(comm: Any, node: int | None) -> Nodes:
    """Find the ranks that share memory. Collective.

    Args:
        comm: Of mpi4py.
        node: Divides the machines further, see :class:`MpiConfig`.
    """
    rank = comm.Get_rank()
    local = comm.Split_type(MPI.COMM_TYPE_SHARED, rank)
    is_divided = np.array([node is not None], np.int32)
    comm.Allreduce(MPI.IN_PLACE, is_divided, MPI.MAX)
    if is_divided[0]:
        # A rank without a number is in a group of those without.
        machine, local = local, local.Split(0 if node is None else node + 1, rank)
        machine.Free()
    leader = np.array([rank], np.int64)
    local.Bcast(leader, 0)
    leaders = np.empty(comm.Get_size(), np.int64)
    comm.Allgather(leader, leaders)
    return Nodes(returning_errors(local), tuple(leaders.tolist()))
