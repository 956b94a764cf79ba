# Sourced by the batch scripts: requeues the job on the host after srun, if the ranks asked for it but could not do so
# themselves, since a container has no scontrol. The ranks' supervisors decide (megatron_fipo/launch/requeue.py).
export MEGATRON_FIPO_REQUEUE="$PWD/.requeue-${SLURM_JOB_ID:-none}"  # a path that containers see as well
rm -f "$MEGATRON_FIPO_REQUEUE"  # left by an attempt that was killed
# Slurm before 23.02 does not set the end of a job, and containers have no squeue.
end=$([ -n "${SLURM_JOB_END_TIME:-}" ] || squeue --noheader --jobs="${SLURM_JOB_ID:-0}" --format=%e 2>/dev/null || true)
[[ $end != *-*T* ]] || export SLURM_JOB_END_TIME="$(date --date="$end" +%s)"

# `srun ... || requeue_if_asked $?`: ends with the exit code of srun, unless Slurm ends the script first.
requeue_if_asked() {
  [ -e "$MEGATRON_FIPO_REQUEUE" ] || exit "$1"
  rm -f "$MEGATRON_FIPO_REQUEUE"
  for name in ${SLURM_ARRAY_TASK_ID:+"${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"} "$SLURM_JOB_ID"; do
    # Slurm prints all tasks of an array; a cancelled job, which is no longer RUNNING, stays cancelled.
    record=$(scontrol show job "$name" --oneliner | grep "^JobId=$SLURM_JOB_ID ") || continue
    case "$record" in
      *" JobState=RUNNING "* | *" Reason=TimeLimit "*) scontrol requeue "$name" ;;
    esac
    break
  done
  exit "$1"
}
