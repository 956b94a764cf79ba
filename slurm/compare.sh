#!/bin/bash
# Train the runs of a comparison, one arm and seed for each task of an array.
#
#   megatron-fipo compare SPEC.yaml --slurm     prepares the runs and prints the sbatch command of the unfinished ones:
#   sbatch --array=1-40 slurm/compare.sh OUT/configs [key=value ...]
#   megatron-fipo compare SPEC.yaml --report-only
#
# The array's task I trains OUT/configs/I.yaml. One task of a job is one rank; the printed command asks for as many as
# parallel.world_size. As in the recipes' scripts, a job that is stopped writes a checkpoint, requeues itself and resumes.
#
#SBATCH --job-name=compare
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@1200
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.log
set -eo pipefail
source "${FIPO_SITE:-slurm/site.env}"  # without -u: what it sources, such as module scripts, may use unset variables
source slurm/requeue.sh
set -u
# --cpu-bind=none: rollout servers may use all cores of a node, not only those of the task that starts them.
# --wait=0: tasks may end at different times, whatever the site's WaitTime is; a failed task ends all others.
srun --export=ALL --kill-on-bad-exit=1 --wait=0 --cpu-bind=none \
  --cpus-per-task="$SLURM_CPUS_PER_TASK" "${FIPO_SRUN[@]}" \
  megatron-fipo train "$1/$SLURM_ARRAY_TASK_ID.yaml" "${@:2}" || requeue_if_asked $?
