#!/usr/bin/env bash
#PBS -N cobre
#PBS -l select=2:ncpus=8:mpiprocs=8
#PBS -l walltime=01:00:00
# Shared memory within the nodes, MPI between their leaders. PBS lists the nodes one after the
# other, so ranks are placed node by node.
set -eu
cd "$PBS_O_WORKDIR"
# In the command: Open MPI's mpiexec passes no variable on to the other nodes by itself.
exec mpiexec -n "$(wc -l <"$PBS_NODEFILE")" \
    env COBRE_MPI_HIERARCHICAL=1 python -m cobre_shm.sddp "$@"
