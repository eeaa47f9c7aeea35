"""Which part of a run over several machines is started here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cobre_shm.spawn.errors import InvalidArguments

__all__ = ["Network"]


@dataclass(frozen=True)
class Network:
    """Where the ranks of a run are.

    Attributes:
        nnodes: Number of nodes, each with a launcher and as many ranks as the others.
        node_rank: Which of them this is.
        coordinator: ``host:port`` of node 0, or None for a run on this machine alone.
    """

    nnodes: int = 1
    node_rank: int = 0
    coordinator: str | None = None

    def check(self, env: Mapping[str, str]) -> None:
        """Refuse what cannot work.

        Args:
            env: Where the secret of a run over several nodes is looked for.

        Raises:
            InvalidArguments: The options contradict each other, or the run would need a secret.
        """
        if not 0 <= self.node_rank < self.nnodes:
            raise InvalidArguments(
                f"--node-rank {self.node_rank} is not one of {self.nnodes} nodes",
                suggestion=f"Nodes are numbered 0..{self.nnodes - 1}",
            )
        if self.coordinator is None:
            if self.nnodes > 1:
                raise InvalidArguments(
                    "Several nodes need --coordinator HOST:PORT, the same on all of them",
                    suggestion="HOST is that of node 0, PORT one that is free there",
                )
            return
        names = ("COBRE_TCP_SECRET", "COBRE_TCP_SECRET_FILE")
        trusts_all = env.get("COBRE_TCP_INSECURE", "") not in ("", "0")
        if not trusts_all and not any(env.get(name) for name in names):
            raise InvalidArguments(
                "Nodes that meet at a coordinator need a secret, the same on all of them",
                suggestion="Set COBRE_TCP_SECRET_FILE to a file with mode 0600, or, where "
                "everybody on the network is trusted, COBRE_TCP_INSECURE=1",
            )
