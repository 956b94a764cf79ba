#!/bin/bash
# Install the package and vLLM into NVIDIA's PyTorch image, whose torch, CUDA, NCCL and Transformer Engine are kept.
# Runs inside the image, as root; with enroot, from the repository's root on a machine that reaches the internet:
#
#   enroot import -o pytorch.sqsh docker://nvcr.io#nvidia/pytorch:26.05-py3
#   enroot create -n megatron_fipo pytorch.sqsh
#   enroot start --root --rw --mount "$PWD:/checkout" megatron_fipo bash /checkout/slurm/container/build.sh
#   enroot export -o "$HOME/megatron_fipo.sqsh" megatron_fipo
#
# Then choose the container in slurm/site.env. Another release of the image: torch 2.11 or later.
set -euo pipefail
checkout=$(cd "$(dirname "$0")/../.." && pwd)
vllm=${VLLM_HOME:-/opt/vllm}
vllm_version=$(sed -n 's/^VLLM_VERSION := //p' "$checkout/Makefile")

versions() {  # of the image's packages that must not be replaced
  python -c 'from importlib.metadata import version
for name in ("torch", "transformer-engine"):
    print(name, version(name))'
}

before=$(versions)
source=$(mktemp -d)  # the build leaves files beside its sources
trap 'rm -rf "$source"' EXIT
cp -r "$checkout"/{csrc,megatron_fipo,setup.py,pyproject.toml,README.md,LICENSE} "$source"
rm -f "$source"/megatron_fipo/ops/_extension*.so
# Without this constraint, beside the image's own (PIP_CONSTRAINT), pip would install another torch from its index.
printf 'torch==%s\n' "$(python -c 'import torch; print(torch.__version__)')" > "$source/torch.txt"
MEGATRON_FIPO_CUDA=1 python -m pip install --no-cache-dir -c "$source/torch.txt" "$source[aligner]"
after=$(versions)
if [ "$before" != "$after" ]; then
  printf 'error: the image had\n%s\nand has now\n%s\n' "$before" "$after" >&2
  exit 1
fi

# vLLM pins its own torch. Its interpreter must not find the image's torch libraries first.
python -m venv --clear "$vllm"
env -u PIP_CONSTRAINT "$vllm/bin/python" -m pip install --no-cache-dir "vllm==$vllm_version"
cat > "$vllm/bin/python-alone" <<END
#!/bin/bash
LD_LIBRARY_PATH=\$(tr : '\n' <<< "\${LD_LIBRARY_PATH:-}" | grep -v /torch | paste -sd:) exec "$vllm/bin/python" "\$@"
END
chmod +x "$vllm/bin/python-alone"
printf 'done, with\n%s\n' "$after"
