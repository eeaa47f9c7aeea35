#!/usr/bin/env bash
#PBS -N cobre
#PBS -l select=2:ncpus=8:mpiprocs=8
#PBS -l walltime=01:00:00
# Pure MPI: every message goes through the MPI library.
set -eu
cd "$PBS_O_WORKDIR"
export COBRE_MPI_HIERARCHICAL=0
exec mpiexec -n "$(wc -l <"$PBS_NODEFILE")" python -m cobre_shm.sddp "$@"
