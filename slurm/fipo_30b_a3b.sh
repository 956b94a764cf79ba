#!/bin/bash
# Train Qwen3-30B-A3B-Base, a mixture of experts, with FIPO on 32 GPUs.
#
#   sbatch slurm/fipo_30b_a3b.sh [CONFIG.yaml] [key=value ...]     without CONFIG: examples/fipo_30b_a3b.yaml
#
# Resources can be changed on sbatch's command line, e.g. --nodes=2 --ntasks-per-node=4; one task is one rank, and
# parallel.world_size must be their number. Slurm signals the job 20 minutes before its time limit: it shuts down
# cleanly with a checkpoint and requeues itself, a minute before the limit at the latest. After a node failure it
# resumes as well. Nodes with 64 cores: --cpus-per-task=8.
#
#   sbatch --nodes=8 slurm/fipo_30b_a3b.sh parallel.world_size=64     the same on 8 nodes
#   sbatch --array=1-4 slurm/fipo_30b_a3b.sh     one run per seed: run.seed is the task's number, -seed1 ends its name
#
# In arguments, %a stands for the number of the array's task, as in sbatch's own --output.
#
#SBATCH --job-name=fipo-30b-a3b
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@1200
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -eo pipefail
source "${FIPO_SITE:-slurm/site.env}"  # without -u: what it sources, such as module scripts, may use unset variables
source slurm/requeue.sh
set -u
# --cpu-bind=none: rollout servers may use all cores of a node, not only those of the task that starts them.
# --wait=0: tasks may end at different times, whatever the site's WaitTime is; a failed task ends all others.
srun --export=ALL --kill-on-bad-exit=1 --wait=0 --cpu-bind=none \
  --cpus-per-task="$SLURM_CPUS_PER_TASK" "${FIPO_SRUN[@]}" \
  megatron-fipo train --recipe examples/fipo_30b_a3b.yaml "${@//%a/${SLURM_ARRAY_TASK_ID-%a}}" \
  ${SLURM_ARRAY_TASK_ID:+--seed="$SLURM_ARRAY_TASK_ID"} || requeue_if_asked $?
