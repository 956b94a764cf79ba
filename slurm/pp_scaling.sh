#!/bin/bash
# Measure the layouts of a plan, and report all rows measured so far.
#
#   megatron-fipo scaling plan CONFIG.yaml --gpus 16,32,64 --csv plan.csv         choose lines, delete the others
#   sbatch --array=1-6 slurm/pp_scaling.sh CONFIG.yaml plan.csv [options of `scaling sweep`] [key=value ...]
#   sbatch slurm/pp_scaling.sh CONFIG.yaml plan.csv                               all lines in one job
#
# A line gets as many tasks as its layout has ranks; ask for the nodes of the largest, e.g. --nodes=8. Rows are written
# to FIPO_OUT, or runs/scaling-PLAN. Submit the same job again to measure rows that failed or are missing.
#
#SBATCH --job-name=pp-scaling
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=02:00:00
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -eo pipefail
source "${FIPO_SITE:-slurm/site.env}"  # without -u: what it sources, such as module scripts, may use unset variables
set -u
out="${FIPO_OUT:-runs/scaling-$(basename "${2%.csv}")}"
megatron-fipo scaling sweep "$@" --out "$out" "${FIPO_SRUN[@]/#/--srun=}"
megatron-fipo scaling report "$out"
