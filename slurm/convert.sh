#!/bin/bash
# Convert or verify a checkpoint on one CPU node, no GPU; the arguments are those of `megatron-fipo convert`:
#
#   sbatch slurm/convert.sh to-megatron --hf DIR --out DIR
#   sbatch slurm/convert.sh to-hf --megatron DIR --out DIR
#   sbatch --array=1-4 slurm/convert.sh to-hf --megatron runs/x-seed%a/checkpoints/step_100 --config DIR --out seed%a
#
# In arguments, %a stands for the number of the array's task, as in sbatch's own --output.
#
#SBATCH --job-name=fipo-convert
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=8G
#SBATCH --time=02:00:00
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -eo pipefail
source "${FIPO_SITE:-slurm/site.env}"  # without -u: what it sources, such as module scripts, may use unset variables
set -u
srun --export=ALL --cpus-per-task="$SLURM_CPUS_PER_TASK" "${FIPO_SRUN[@]}" megatron-fipo convert \
  "${@//%a/${SLURM_ARRAY_TASK_ID-%a}}"
