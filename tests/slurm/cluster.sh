#!/bin/bash
# The processes of an emulated cluster, inside a PID namespace: when the first process there ends, the kernel ends all
# others. It ends when standard input closes, so nothing outlives whoever holds the other end, however that one ends.
#
#   cluster.sh DIR up NODE...    DIR holds etc/; standard input takes `crash NODE` and `start NODE`; DIR goes in the end
set -u
dir=$1 role=$2
shift 2
in_namespaces=(--mount --pid --fork --kill-child=KILL --mount-proc)
export SLURM_CONF=$dir/etc/slurm.conf

start_node() {
  unshare "${in_namespaces[@]}" --uts bash "$0" "$dir" node "$1" >>"$dir/log/$1.out" 2>&1 &
  nodes[$1]=$!
}

case $role in
up)
  [ "$(id -u)" = 0 ] || in_namespaces+=(--user --map-current-user --keep-caps)
  unshare "${in_namespaces[@]}" bash "$0" "$dir" keep "$@"
  rm -rf "$dir"
  ;;
keep)
  exec 2>>"$dir/log/keep.out" # where bash says what was killed
  declare -A nodes
  munged --foreground --num-threads=2 --key-file="$dir/munge/key" --socket="$dir/munge/socket/s" \
    --pid-file="$dir/munge/pid" --seed-file="$dir/munge/seed" --log-file="$dir/log/munged.log" \
    >"$dir/log/munged.out" 2>&1 &
  slurmctld -D -i >"$dir/log/slurmctld.out" 2>&1 &
  for name in "$@"; do start_node "$name"; done
  while read -r verb name; do
    case $verb in
    crash) kill -KILL "${nodes[$name]}" ;; # its namespace goes with it, as in a power failure
    start) start_node "$name" ;;
    esac
  done
  ;;
node)
  mount --bind "$dir/etc/hosts" /etc/hosts && hostname "$1" || exit 1
  slurmd -D -N "$1" &
  while :; do wait -n || sleep 0.3; done # as the node's first process, it reaps what is left behind
  ;;
esac
