#!/bin/bash
# Train on Flux: one task is one rank. Not run on a cluster yet.
#
#   flux batch --nodes=4 --exclusive --time-limit=24h --signal=SIGUSR1@20m examples/flux.sh [CONFIG.yaml]
#
# parallel.world_size must be the number of tasks: here 4 nodes x 8. Twenty minutes before its time is up the run writes a
# checkpoint and ends with exit code 75, and the script submits itself again.
set -eo pipefail
source "${FIPO_SITE:-slurm/site.env}"
config=${1:-examples/fipo_7b.yaml}
nodes=$(flux resource list --no-header --states=all --format='{nnodes}' | head -n 1)
export MASTER_ADDR=$(flux hostlist --expand --delimiter=' ' instance | cut -d' ' -f1)  # the node with rank 0
status=0
flux run --nodes="$nodes" --tasks-per-node=8 --gpus-per-node=8 --exclusive -o cpu-affinity=off -o gpu-affinity=off \
  megatron-fipo train "$config" || status=$?
[ "$status" -ne 75 ] || flux --parent batch --nodes="$nodes" --exclusive --time-limit=24h --signal=SIGUSR1@20m \
  examples/flux.sh "$config"
exit "$status"
