#!/bin/bash
# Slurm and munge, for the tests that need a real cluster; Debian or Ubuntu, as root or with sudo. Elsewhere it says
# loudly what is left out, and the tests skip themselves.
set -u
PATH=$PATH:/usr/sbin:/sbin
available() { command -v munged >/dev/null && command -v slurmctld >/dev/null && command -v slurmd >/dev/null; }
available && exit 0
as_root=()
[ "$(id -u)" = 0 ] || as_root=(sudo --non-interactive)
"${as_root[@]}" apt-get update -qq
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge
available && exit 0
cat >&2 <<'END'
****************************************************************************************
* Slurm could not be installed: THE TESTS THAT RUN THE BATCH SCRIPTS ARE BEING SKIPPED. *
* They need munge and slurm-wlm (apt), or another package of Slurm 22.05 or newer.     *
****************************************************************************************
END
