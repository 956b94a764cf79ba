#!/bin/bash
# Train on PBS Professional (or OpenPBS): one MPI task is one rank. Not run on a cluster yet.
#
#   qsub -v CONFIG=examples/fipo_7b.yaml examples/pbs.sh
#
# parallel.world_size must be the number of tasks: here 4 nodes x 8. PBS sends SIGTERM before it ends the job
# (`qsub -l walltime`, kill_delay); the run then writes a checkpoint and exits with code 75, and the script resubmits
# itself.
#
#PBS -N fipo
#PBS -l select=4:ncpus=96:ngpus=8:mpiprocs=8
#PBS -l place=scatter:excl
#PBS -l walltime=24:00:00
#PBS -j oe
set -eo pipefail
cd "$PBS_O_WORKDIR"
source "${FIPO_SITE:-slurm/site.env}"
MASTER_ADDR=$(head -n 1 "$PBS_NODEFILE")  # the node with rank 0
export MASTER_ADDR
status=0
mpiexec megatron-fipo train "${CONFIG:-examples/fipo_7b.yaml}" || status=$?
[ "$status" -ne 75 ] || qsub -v CONFIG="${CONFIG:-examples/fipo_7b.yaml}" examples/pbs.sh
exit "$status"
