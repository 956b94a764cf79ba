#!/bin/bash
# Train on Flux: one task is one rank. Not run on a cluster yet.
#
#   flux batch --nodes=4 --exclusive --time-limit=24h examples/flux.sh [CONFIG.yaml]
#
# parallel.world_size must be the number of tasks: here 4 nodes x 8. Twenty minutes before the time limit the run writes
# a checkpoint and exits with code 75, and the script resubmits itself.
set -eo pipefail
source "${FIPO_SITE:-slurm/site.env}"
config=${1:-examples/fipo_7b.yaml}
nodes=$(flux getattr size)
MASTER_ADDR=$(flux hostlist --expand --delimiter=' ' instance | cut -d' ' -f1)  # the node with rank 0
export MASTER_ADDR
status=0
# Affinity off: tasks see all GPUs of their node, and the servers they start use all of its cores.
flux run --nodes="$nodes" --tasks-per-node=8 --gpus-per-node=8 --exclusive --signal=SIGUSR1@20m \
  -o cpu-affinity=off -o gpu-affinity=off megatron-fipo train "$config" || status=$?
[ "$status" -ne 75 ] || flux --parent batch --nodes="$nodes" --exclusive --time-limit=24h examples/flux.sh "$config"
exit "$status"
