"""GPUs, and how much of their printed rates training reaches: `hardware.yaml` and `efficiency.yaml`, or a calibration.

A calibration is a YAML or JSON file with any of the fields of either file, measured on the cluster that is planned for;
what it names replaces what is known here.
"""

from __future__ import annotations

import difflib
import re
import subprocess
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

PRECISIONS = ("bfloat16", "float8", "float4")


@dataclass(frozen=True)
class GPU:
    """Printed rates of one GPU: FLOP/s (dense) by precision, bytes, bytes/s one way.

    Attributes:
        link: bytes/s to another GPU of the same NVLink domain, which has `link_gpus`.
        network: bytes/s of each GPU's share of the network cards.

    `link` and `network` of a calibrated machine with one rank or one node are not known, 0.
    """

    name: str
    generation: str
    flops: dict[str, float]
    memory: float
    memory_bandwidth: float
    link: float = 0.0
    link_gpus: int = 1
    network: float = 0.0


@dataclass(frozen=True)
class Efficiency:
    """Constants of a GPU generation that were fitted to published runs.

    Attributes:
        gemm: share of the peak that large matrix products reach, by precision.
        gemm_width: output columns at which a product reaches half of that, narrower ones being slower.
        attention: share of the bfloat16 peak that flash attention's forward pass reaches; its backward pass reaches
            `cost.ATTENTION_BACKWARD` of that.
        memory: share of the memory bandwidth, of elementwise kernels.
        casts: bytes a weighted input costs more where products are narrower than bfloat16, in units of its own size.
        link, network: share of the bandwidth, of large collectives.
        layer_seconds: that one layer's forward pass takes beyond its arithmetic: launches, tails of kernels.
        expert_width: width of an expert at which its product takes twice as long for being grouped.
        expert_seconds: that routing adds to one layer's forward pass.
        reserve_bytes, reserve_share: memory beyond what tensors hold: CUDA, NCCL and kernels' workspaces; and what the
            allocator loses to fragmentation, in units of what they hold.

    What has a default is not measured by a calibration, or only where there is more than one rank or node.
    """

    gemm: dict[str, float]
    gemm_width: float
    attention: float
    memory: float
    layer_seconds: float
    reserve_bytes: float
    casts: float = 0.0
    link: float = 1.0
    network: float = 1.0
    expert_width: float = 0.0
    expert_seconds: float = 0.0
    reserve_share: float = 0.0


@dataclass(frozen=True)
class Software:
    """What a training code does with the hardware.

    Attributes:
        attention: `flash`, `flash1` (its first version), or scores in memory: `fused` softmax or `unfused`.
        fused_norms: one kernel a norm and no copies between elementwise operations.
        tensor_exposed, context_exposed, expert_exposed: share of that communication that arithmetic does not hide.
        data_overlap: share of one micro-batch's backward pass behind which gradients travel.
        node_network: bytes/s that the network cards of a whole node have for one kind of collective; None: the GPUs'.
        gradient_bytes, gather_bytes: an element, as gradients are reduced and updated parameters gathered.
        chunked_head: logits are recomputed in backward instead of kept.
        logit_bytes: kept for each logit if not; `whole_logits`: on every tensor-parallel rank.
        step_seconds: an update takes beyond everything else.
        straggling: share that a step grows with each doubling of the nodes.
    """

    attention: str = "flash"
    fused_norms: bool = True
    tensor_exposed: float = 1.0
    context_exposed: float = 0.3
    expert_exposed: float = 1.0
    data_overlap: float = 0.0
    node_network: float | None = None
    gradient_bytes: float = 4.0
    gather_bytes: float = 2.0
    chunked_head: bool = True
    logit_bytes: float = 10.0
    whole_logits: bool = False
    step_seconds: float = 0.05
    straggling: float = 0.003


@dataclass(frozen=True)
class Hardware:
    """One kind of GPU with its efficiencies."""

    gpu: GPU
    efficiency: Efficiency
    software: Software

    @property
    def link_rate(self) -> float:
        """Bytes/s reached. Raises ValueError: it is not known."""
        return self._known("link", self.gpu.link) * self.efficiency.link

    @property
    def network_rate(self) -> float:
        """Bytes/s reached, of each GPU. Raises ValueError: it is not known."""
        return self._known("network", self.gpu.network) * self.efficiency.network

    def _known(self, name: str, rate: float) -> float:
        if rate <= 0:
            where = "two ranks of one node" if name == "link" else "two nodes"
            raise ValueError(f"the {name} of {self.gpu.name} was not measured: calibrate on {where} or more")
        return rate


def find_hardware(gpu: str, software: str = "megatron_fipo", calibration: str | Path | None = None) -> Hardware:
    """By the GPU's name, e.g. H100-80.

    Raises:
        ValueError: an unknown GPU or software, or a calibration that cannot be read or has unknown fields.
    """
    known = _known(str(calibration) if calibration is not None else None)
    name = {k.lower(): k for k in known["gpus"]}.get(gpu.lower())
    if name is None:
        near = difflib.get_close_matches(gpu.upper(), known["gpus"], n=3, cutoff=0.3)
        raise ValueError(f"GPU {gpu!r} is not known; known: {', '.join(near or known['gpus'])}, or give a calibration")
    return build_hardware(known, name, software)


def local_hardware() -> Hardware | None:
    """This machine's first GPU; None without one, or if its kind is not known.

    Asked of nvidia-smi: CUDA would keep memory of the device for this process.
    """
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        device, mebibytes = found.splitlines()[0].rsplit(",", 1)
        memory = float(mebibytes) * 2**20
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        return None
    name = name_of(device, memory)
    if name is None:
        return None
    known = find_hardware(name)
    return replace(known, gpu=replace(known.gpu, memory=min(known.gpu.memory, memory)))


def name_of(device: str, memory: float) -> str | None:
    """The key in `hardware.yaml` of a device as its driver names it, e.g. "NVIDIA H100 80GB HBM3"; None if there is
    none. Of keys that differ in memory only, the nearest.
    """
    words = set(re.split(r"[ \-_]", device.upper()))
    gpus = hardware_files()["gpus"]
    alike = [key for key in gpus if key.split("-")[0] in words]
    return min(alike, key=lambda key: abs(gpus[key]["memory"] - memory), default=None)


def build_hardware(known: dict[str, Any], name: str, software: str) -> Hardware:
    """From the contents of the files."""
    fields = {k: v for k, v in known["gpus"][name].items() if k != "sources"}
    if software not in known["software"]:
        raise ValueError(f"software {software!r} is not known; known: {', '.join(known['software'])}")
    try:
        gpu = GPU(name=name, **fields)
        efficiency = Efficiency(**known["efficiencies"][gpu.generation])
        return Hardware(gpu, efficiency, Software(**known["software"][software]))
    except (TypeError, KeyError) as error:
        raise ValueError(f"hardware of {name}: {error}") from None


@cache
def hardware_files() -> dict[str, Any]:
    """Contents of the packaged files."""
    merged: dict[str, Any] = {}
    for file in ("hardware.yaml", "efficiency.yaml"):
        merged |= _read(Path(__file__).with_name(file))
    return merged


@cache
def _known(calibration: str | None) -> dict[str, Any]:
    known = hardware_files()
    if calibration is None:
        return known
    if not Path(calibration).is_file():
        raise ValueError(f"calibration {calibration} does not exist")
    given = _read(Path(calibration))
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"calibration {calibration}: unknown {unknown[0]!r}; known: {', '.join(known)}")
    merged = OmegaConf.to_container(OmegaConf.merge(known, given))
    assert isinstance(merged, dict)
    return {str(k): v for k, v in merged.items()}


def _read(file: Path) -> dict[str, Any]:
    try:
        content = OmegaConf.to_container(OmegaConf.load(file))
    except Exception as error:  # YAML's own error classes share no public base with OmegaConf's
        raise ValueError(f"cannot read {file}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} must have sections, e.g. gpus")
    return {str(k): v for k, v in content.items()}
