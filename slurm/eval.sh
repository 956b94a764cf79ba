#!/bin/bash
# Evaluate a checkpoint on one node: Avg@k, Cons@k and Pass@k of the config's validation problems.
#
#   sbatch slurm/eval.sh CONFIG.yaml [checkpoint=DIR] [--out DIR] [key=value ...]
#
# One task is one rank, and parallel.world_size must be their number. Finished samples are kept in --out: Slurm signals
# the job 3 minutes before its time limit, and it requeues itself and resumes; after a node failure as well.
#
#   sbatch --array=1-4 slurm/eval.sh CONFIG.yaml checkpoint=runs/fipo-7b-seed%a/policy     one checkpoint per task
#
# In arguments, %a stands for the number of the array's task, as in sbatch's own --output. It is also run.seed, the seed
# of sampling, and -seed1 is appended to the run's name, so that each task has its own directory.
#
#SBATCH --job-name=fipo-eval
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@180
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
  megatron-fipo eval "${@//%a/${SLURM_ARRAY_TASK_ID-%a}}" ${SLURM_ARRAY_TASK_ID:+--seed="$SLURM_ARRAY_TASK_ID"} \
  || requeue_if_asked $?
