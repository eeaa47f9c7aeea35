#!/usr/bin/env bash
#PBS -N cobre
#PBS -l select=2:ncpus=8:mpiprocs=8
#PBS -l walltime=01:00:00
# Pure MPI: every message goes through the MPI library.
set -eu
cd "$PBS_O_WORKDIR"
# In the command: Open MPI's mpiexec passes no variable on to the other nodes by itself.
exec mpiexec -n "$(wc -l <"$PBS_NODEFILE")" \
    env COBRE_MPI_HIERARCHICAL=0 python -m cobre_shm.sddp "$@"
