#!/bin/bash
# Compare FIPO with DAPO and ablations on the quickstart's task, with several seeds each, in one report.
#
#   examples/compare_fipo_dapo.sh [-s SEEDS] [-v VARIANT,...] [-o DIRECTORY] [KEY=VALUE ...]
#
# SEEDS: default 3; VARIANT: default all below; KEY=VALUE: settings of all runs. A run takes about two minutes on two
# cores. Finished runs are skipped, so the same command continues after an interruption.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"

seeds=3 out=runs/compare
variants=fipo,dapo,placebo,half_life_8,half_life_128,half_life_256,clip_0.8_1.2,clip_1.0_1.4,no_clip,no_filter,no_overlong_penalty,mini_batch_4,mini_batch_16
while getopts "s:v:o:" option; do
  case $option in
    s) seeds=$OPTARG ;;
    v) variants=$OPTARG ;;
    o) out=$OPTARG ;;
    *) exit 2 ;;
  esac
done
shift $((OPTIND - 1))

settings_of() { # settings of a variant, one per line
  case $1 in
    fipo) ;;
    dapo) echo algorithm.loss=grpo ;;
    placebo) echo algorithm.influence=placebo ;; # FIPO's weights on other tokens
    half_life_*) echo "algorithm.half_life=${1##*_}" ;;
    clip_*_*) local bounds=${1#clip_} && echo "algorithm.influence_clip=[${bounds/_/,}]" ;;
    no_clip) echo algorithm.influence_clip=null ;;
    no_filter) printf '%s\n' algorithm.dual_clip=1e8 algorithm.max_dual_clipped_tokens=null ;; # no ratio is above it
    no_overlong_penalty) echo reward.overlong_buffer_tokens=0 ;;
    mini_batch_*) echo "trainer.mini_batch_prompts=${1##*_}" ;;
    *) echo "error: no variant $1; there are $variants, and half_life_N, clip_LOW_HIGH, mini_batch_N" >&2 && return 2 ;;
  esac
}

IFS=, read -ra names <<<"$variants"
for name in "${names[@]}"; do settings_of "$name" >/dev/null; done
[[ $seeds =~ ^[1-9][0-9]*$ ]] || { echo "error: -s $seeds is no number of seeds" >&2 && exit 2; }

[[ -f runs/quickstart-base/config.json ]] || python examples/quickstart/make_task.py --out runs/quickstart-base
runs=()
for seed in $(seq "$seeds"); do
  for name in "${names[@]}"; do
    mapfile -t settings < <(settings_of "$name")
    run=$out/$name-seed$seed
    echo "== $run: ${settings[*]:-the defaults}"
    megatron-fipo train examples/quickstart.yaml run.name="$name-seed$seed" run.directory="$run" run.seed="$seed" \
      parallel.world_size=2 parallel.tensor=1 parallel.pipeline=1 reward.overlong_buffer_tokens=32 \
      eval.every=20 eval.samples=32 checkpoint.keep_last=1 trainer.export_policy=false "$@" "${settings[@]}"
    runs+=("$run")
  done
done
megatron-fipo report "${runs[@]}" --out "$out/report.html"
