#!/bin/bash
# The processes of an emulated cluster, inside a PID namespace: when the first process there ends, the kernel ends all
# others. It ends when standard input closes, so nothing outlives whoever holds the other end, however that one ends.
# The cluster has a network of its own, with the controller at 10.77.0.254; node K, a network stack of its own, is 10.77.0.K.
#
#   cluster.sh DIR up NODE...    DIR holds etc/ and goes in the end; standard input takes
#                                `crash NODE` and `start NODE [PATH]`, a node that lacks what is in the directory PATH
set -u
dir=$1 role=$2
shift 2
in_namespaces=(--mount --pid --fork --kill-child=KILL --mount-proc)
export SLURM_CONF=$dir/etc/slurm.conf

start_node() {
  unshare "${in_namespaces[@]}" --uts --net bash "$0" "$dir" node "$1" "${numbers[$1]}" "${@:2}" >>"$dir/log/$1.out" 2>&1 &
  nodes[$1]=$!
}

case $role in
up)
  unshare "${in_namespaces[@]}" bash "$0" "$dir" keep "$@"
  rm -rf "$dir"
  ;;
keep)
  exec 2>>"$dir/log/keep.out" # where bash says what was killed
  exec 9</proc/self/ns/net    # for the nodes to put the other end of their cable into
  ip link set lo up
  ip link add name switch type bridge && ip address add 10.77.0.254/24 dev switch && ip link set switch up || exit 1
  # A file system with little room, the same for all nodes.
  mkdir -p "$dir/small" && mount -t tmpfs -o size=160m,mode=1777 small "$dir/small" || exit 1
  declare -A nodes=() numbers=()
  munged --foreground --num-threads=2 --key-file="$dir/munge/key" --socket="$dir/munge/socket/s" \
    --pid-file="$dir/munge/pid" --seed-file="$dir/munge/seed" --log-file="$dir/log/munged.log" \
    >"$dir/log/munged.out" 2>&1 &
  slurmctld -D -i >"$dir/log/slurmctld.out" 2>&1 &
  for name in "$@"; do
    numbers[$name]=$((${#numbers[@]} + 1))
    start_node "$name"
  done
  while read -r verb name path; do
    case $verb in
    crash) kill -KILL "${nodes[$name]}" ;; # its namespaces go with it, as in a power failure
    start) start_node "$name" ${path:+"$path"} ;;
    esac
  done
  ;;
node)
  name=$1 number=$2
  [ $# -lt 3 ] || mount -t tmpfs lacking "$3" || exit 1
  in_cluster=(nsenter --net=/proc/self/fd/9)
  # Debian's way: the node's own name is a loopback address, which means something else on every other node.
  (echo "127.0.1.1 $name" && grep -v " $name\$" "$dir/etc/hosts") >"$dir/etc/hosts.$name"
  mount --bind "$dir/etc/hosts.$name" /etc/hosts && hostname "$name" || exit 1
  until ! "${in_cluster[@]}" ip link show "to-$name" >/dev/null 2>&1; do sleep 0.1; done # the cable of a crashed one
  ip link set lo up && ip link add name eth0 type veth peer name "to-$name" && ip link set "to-$name" netns /proc/self/fd/9 &&
    "${in_cluster[@]}" ip link set "to-$name" master switch up &&
    ip address add "10.77.0.$number/24" dev eth0 && ip link set eth0 up || exit 1
  exec 9<&-
  slurmd -D -N "$name" -d "$(command -v slurmstepd)" &
  while :; do wait -n || sleep 0.3; done # as the node's first process, it reaps what is left behind
  ;;
esac
