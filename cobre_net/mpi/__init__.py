"""The mpi backend: the ranks that an MPI launcher started, by mpi4py."""

from __future__ import annotations

from cobre_net.mpi.communicator import MpiCommunicator
from cobre_net.mpi.region import MpiRegion

__all__ = ["MpiCommunicator", "MpiRegion"]
