"""How a process sees that an MPI launcher started it. The launcher of ours reads this as well."""

from __future__ import annotations

__all__ = ["LAUNCHER_VARIABLES"]

# Set by: MPICH, Intel MPI and Cray MPI; the same; Open MPI; the same; Intel MPI; Slurm's srun.
LAUNCHER_VARIABLES = (
    "PMI_RANK",
    "PMI_SIZE",
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "MPI_LOCALRANKID",
    "SLURM_PROCID",
)
