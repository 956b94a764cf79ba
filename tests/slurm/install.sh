#!/bin/bash
# Slurm and munge, for the tests that need a real cluster, and a second, newer Slurm in build/; Debian or Ubuntu, as root or
# with sudo. Elsewhere it says loudly what is left out, and the tests skip themselves.
set -u
cd "$(dirname "$0")/../.."
PATH=$PATH:/usr/sbin:/sbin
missing() { for name in munged slurmctld slurmd ip nsenter patchelf; do command -v "$name" >/dev/null || echo "$name"; done; }
if [ -n "$(missing)" ]; then
  as_root=()
  [ "$(id -u)" = 0 ] || as_root=(sudo --non-interactive)
  "${as_root[@]}" apt-get update -qq
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
    slurm-wlm munge iproute2 util-linux patchelf
fi
if [ -n "$(missing)" ]; then
  cat >&2 <<'END'
****************************************************************************************
* Slurm could not be installed: THE TESTS THAT RUN THE BATCH SCRIPTS ARE BEING SKIPPED. *
* They need munge and slurm-wlm (apt), or another package of Slurm 22.05 or newer.     *
****************************************************************************************
END
elif ! mkdir -p build || ! tests/slurm/newer.sh build/newer-slurm >build/newer-slurm.log 2>&1; then
  tail -5 build/newer-slurm.log >&2
  cat >&2 <<'END'
****************************************************************************************
* Debian's newer Slurm could not be fetched: THE TESTS ON IT ARE BEING SKIPPED.         *
****************************************************************************************
END
fi
