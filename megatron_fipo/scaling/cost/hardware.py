"""GPU data sheets and achieved efficiencies, from `hardware.yaml` and `efficiency.yaml`, or a calibration.

A calibration is a YAML or JSON file with any of the fields of either file, measured on the target cluster; its fields
override the packaged ones.
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
    """Data-sheet rates of one GPU: dense FLOP/s by precision, bytes, bytes/s one way.

    Attributes:
        link: bytes/s to another GPU of the same NVLink domain, which has `link_gpus`.
        network: bytes/s of each GPU's share of the network cards.

    `link` and `network` are 0 (unknown) for a machine calibrated with one rank or one node.
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
    """Efficiency constants of a GPU generation, fitted to published runs.

    Attributes:
        gemm: share of the peak that large matmuls reach, by precision.
        gemm_width: output columns at which a matmul reaches half of that; narrower ones are slower.
        attention: share of the bfloat16 peak that flash attention's forward pass reaches; its backward pass reaches
            `cost.ATTENTION_BACKWARD` of that.
        memory: share of the memory bandwidth that elementwise kernels reach.
        casts: extra bytes per weighted input for matmuls narrower than bfloat16, in units of the input's size.
        link, network: share of the bandwidth that large collectives reach.
        layer_seconds: overhead of one layer's forward pass beyond its arithmetic: launches, tails of kernels.
        expert_tokens: tokens of one expert at which a grouped matmul takes twice as long as an ungrouped one: its
            weights are streamed from memory, whatever the tokens.
        reserve_bytes, reserve_share: memory beyond tensors: CUDA, NCCL and kernel workspaces; and allocator
            fragmentation, relative to the tensors' bytes.

    Fields with a default are not measured by a calibration, or only with more than one rank or node.
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
    expert_tokens: float = 0.0
    reserve_share: float = 0.0


@dataclass(frozen=True)
class Software:
    """Properties of a training code.

    Attributes:
        attention: `flash`, `flash1` (first version), or materialized scores: `fused` softmax or `unfused`.
        fused_norms: one kernel per norm, and no copies between elementwise operations.
        tensor_exposed, context_exposed: share of that communication that is not overlapped.
        data_overlap: share of one micro-batch's backward pass that overlaps gradient communication.
        node_network: bytes/s of a whole node's network cards for one kind of collective; None: the GPUs' sum.
        gradient_bytes, gather_bytes: per element, of reduced gradients and gathered parameters.
        chunked_head: logits are recomputed in backward instead of kept.
        logit_bytes: bytes kept per logit otherwise; `whole_logits`: on every tensor-parallel rank.
        step_seconds: fixed overhead of an update.
        straggling: share by which a step grows with each doubling of the nodes.
        release: year and month (YY.MM) of the release; selects the constants of layers with experts.
        per_node_since: release from which a token crosses the network once to each node that has experts for it,
            instead of once to each expert (DeepEP, HybridEP); None: no release.
    """

    attention: str = "flash"
    fused_norms: bool = True
    tensor_exposed: float = 1.0
    context_exposed: float = 0.3
    data_overlap: float = 0.0
    node_network: float | None = None
    gradient_bytes: float = 4.0
    gather_bytes: float = 2.0
    chunked_head: bool = True
    logit_bytes: float = 10.0
    whole_logits: bool = False
    step_seconds: float = 0.05
    straggling: float = 0.003
    release: str = ""
    per_node_since: str | None = None


@dataclass(frozen=True)
class Mixture:
    """Costs of layers with experts beside matmuls, in one generation of training codes.

    Attributes:
        seconds: overhead of one layer's forward pass: launches, and waits of the host for the tokens of each expert.
        passes: times that the hidden vector of each token's copy for an expert is read or written, each way:
            permutation, padding, and back.
        exposed: share of the all-to-all that computation does not overlap.
        per_node: see `Software.per_node_since`.
    """

    seconds: float = 0.0
    passes: float = 4.0
    exposed: float = 1.0
    per_node: bool = False

    @staticmethod
    def of(constants: dict[str, Any], software: Software, release: str | None = None) -> Mixture:
        """Return the costs in the generation of a release: the newest that is not newer, or the first.

        Args:
            constants: `mixtures` of efficiency.yaml. `seconds`, `passes` and `exposed` are multiplied by the number of
                the generation in `generations`, which are named by their first release.
            release: YY.MM; None: the software's own.

        Raises:
            ValueError: the release is not of this format.
        """
        release = release or software.release
        if not re.fullmatch(r"(\d\d\.\d\d(\.\d+)?)?", str(release)) or not isinstance(release, str):
            raise ValueError(f"release {release!r} of a training code: must be year and month in quotes, e.g. '26.06'")
        factor = constants["generations"][generation_of(constants, release)]
        return Mixture(
            seconds=constants["seconds"] * factor,
            passes=constants["passes"] * factor,
            exposed=min(1.0, constants["exposed"] * factor),
            per_node=software.per_node_since is not None and release >= software.per_node_since,
        )


def generation_of(constants: dict[str, Any], release: str) -> str:
    """Return the name of a release's generation."""
    started = [first for first in constants["generations"] if first <= release]
    return max(started, default=min(constants["generations"]))


@dataclass(frozen=True)
class Hardware:
    """A GPU with its efficiencies."""

    gpu: GPU
    efficiency: Efficiency
    software: Software
    mixture: Mixture = Mixture()

    @property
    def link_rate(self) -> float:
        """Achieved bytes/s of the link; raises ValueError if it was not measured."""
        return self._known("link", self.gpu.link) * self.efficiency.link

    @property
    def network_rate(self) -> float:
        """Achieved bytes/s of the network per GPU; raises ValueError if it was not measured."""
        return self._known("network", self.gpu.network) * self.efficiency.network

    def _known(self, name: str, rate: float) -> float:
        if rate <= 0:
            where = "two ranks of one node" if name == "link" else "two nodes"
            raise ValueError(f"the {name} of {self.gpu.name} was not measured: calibrate on {where} or more")
        return rate


def find_hardware(gpu: str, software: str = "megatron_fipo", calibration: str | Path | None = None) -> Hardware:
    """Return the hardware with this name, e.g. H100-80.

    Raises:
        ValueError: an unknown GPU or software, or a calibration that cannot be read or has unknown fields.
    """
    known = _known(str(calibration) if calibration is not None else None)
    name = {k.lower(): k for k in known["gpus"]}.get(gpu.lower())
    if name is None:
        near = difflib.get_close_matches(gpu.upper(), known["gpus"], n=3, cutoff=0.3)
        raise ValueError(
            f"GPU {gpu!r} is unknown: use one of {', '.join(near or known['gpus'])}, or give a calibration"
        )
    return build_hardware(known, name, software)


def local_hardware() -> Hardware | None:
    """Return this machine's first GPU; None without one, or if its model is unknown.

    Queries nvidia-smi, since CUDA would allocate device memory in this process.
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
    """Return the key in `hardware.yaml` of a device name such as "NVIDIA H100 80GB HBM3", or None.

    Of keys that differ only in memory, the nearest.
    """
    words = set(re.split(r"[ \-_]", device.upper()))
    gpus = hardware_files()["gpus"]
    alike = [key for key in gpus if key.split("-")[0] in words]
    return min(alike, key=lambda key: abs(gpus[key]["memory"] - memory), default=None)


def build_hardware(known: dict[str, Any], name: str, software: str, release: str | None = None) -> Hardware:
    """Build the hardware from the files' contents.

    Args:
        release: of the training code, YY.MM; None: the software's own.
    """
    fields = {k: v for k, v in known["gpus"][name].items() if k != "sources"}
    if software not in known["software"]:
        raise ValueError(f"software {software!r} is unknown: must be one of {', '.join(known['software'])}")
    try:
        gpu = GPU(name=name, **fields)
        efficiency = Efficiency(**known["efficiencies"][gpu.generation])
        code = Software(**known["software"][software])
        return Hardware(gpu, efficiency, code, Mixture.of(known["mixtures"], code, release))
    except (TypeError, KeyError) as error:
        raise ValueError(f"hardware of {name}: {error}") from None


@cache
def hardware_files() -> dict[str, Any]:
    """Return the contents of the packaged files."""
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
        raise ValueError(
            f"calibration {calibration}: unknown section {unknown[0]!r}; must be one of {', '.join(known)}"
        )
    merged = OmegaConf.to_container(OmegaConf.merge(known, given))
    assert isinstance(merged, dict)
    return {str(k): v for k, v in merged.items()}


def _read(file: Path) -> dict[str, Any]:
    try:
        content = OmegaConf.to_container(OmegaConf.load(file))
    except Exception as error:  # YAML's errors share no public base class with OmegaConf's
        raise ValueError(f"cannot read {file}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} must be a mapping with sections, e.g. gpus")
    return {str(k): v for k, v in content.items()}
