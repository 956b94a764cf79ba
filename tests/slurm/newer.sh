#!/bin/bash
# A second Slurm, Debian 13's 24.11, in DIR: newer.sh DIR. Needs Debian's apt, its keys, and patchelf.
#
# Its packages are unpacked, not installed, with the C library that they want, and its programs are told to look for that
# and for each other's libraries in DIR.
set -euo pipefail
dir=$(realpath -m "$1")
[ -e "$dir/complete" ] && exit 0
rm -rf "$dir"
mkdir -p "$dir/lists/partial" "$dir/archives/partial"
cat >"$dir/trixie.sources" <<END
Types: deb
URIs: http://deb.debian.org/debian
Suites: trixie
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
END
options=(-qq -o "Dir::Etc::SourceList=$dir/trixie.sources" -o Dir::Etc::SourceParts=/dev/null
  -o "Dir::State::Lists=$dir/lists" -o "Dir::Cache=$dir" -o APT::Sandbox::User=root)
packages=(slurmctld slurmd slurm-client slurm-wlm-basic-plugins libc6 libhwloc15 libjwt2 libjson-c5 libyaml-0-2
  liblua5.1-0 libmunge2)
apt-get "${options[@]}" update
(cd "$dir/archives" && apt-get "${options[@]}" download "${packages[@]}")
for package in "$dir"/archives/*.deb; do dpkg-deb -x "$package" "$dir"; done
rm -rf "$dir/archives" "$dir/lists"
libraries=$(dirname "$(find "$dir/usr/lib" -name libhwloc.so.15)")
ln -s "$libraries/slurm-wlm" "$dir/plugins"
rm "$dir"/plugins/mpi_pmix*.so  # no MPI here
for name in slurmctld slurmd slurmstepd; do ln -s "$name-wlm" "$dir/usr/sbin/$name"; done
loader=$(basename "$(patchelf --print-interpreter "$dir/usr/sbin/slurmd")")
for file in "$dir"/usr/sbin/* "$dir"/usr/bin/* "$libraries"/slurm-wlm/*.so*; do
  [ ! -L "$file" ] && [ "$(head -c 4 "$file" | tail -c 3)" = ELF ] || continue
  patchelf --force-rpath --set-rpath "$libraries/slurm-wlm:$libraries" "$file"
  [[ $file = *.so* ]] || patchelf --set-interpreter "$(find "$dir/usr" -name "$loader" | head -1)" "$file"
done
"$dir/usr/sbin/slurmd" -V | grep -q 'slurm' && touch "$dir/complete"
