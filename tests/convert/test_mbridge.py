"""The tables and transforms against `mbridge`, where it is installed (`pip install --no-deps mbridge einops`)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from megatron_fipo.config import Config
from megatron_fipo.convert import tables
from megatron_fipo.convert.conversion import read_architecture
from megatron_fipo.convert.huggingface import Checkpoint
from megatron_fipo.parallel import topology as topologies
from tests.support.families import FAMILIES, make_checkpoint
from tests.support.ranks import run_ranks

pytest.importorskip("mbridge")
pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def _differing(path: Path) -> tuple[int, list[str]]:
    """How many parameters were compared, and those of which mbridge makes something else."""
    from mbridge import AutoBridge

    topologies.initialize(Config().parallel, seed=1)
    bridge = AutoBridge.from_config(AutoConfig.from_pretrained(path))
    bridge.dtype = torch.float32  # it would round to bfloat16
    arch, checkpoint, tensors = read_architecture(path), Checkpoint(path), load_file(path / "model.safetensors")
    names = {r.checkpoint: r.model[-1] for r in tables.TABLES[arch.model_type]}  # mbridge knows Transformer Engine's
    differing, parameters = [], list(tables.parameters(arch))
    for parameter in parameters:
        name = names[parameter.checkpoint].format(**dict(zip(("layer", "expert"), parameter.index, strict=False)))
        sources = bridge._weight_name_mapping_mcore_to_hf(name)
        theirs = bridge._weight_to_mcore_format(name, [tensors[source] for source in sources])
        if parameter.is_vocabulary:
            theirs = theirs[: arch.vocab_size]
        ours = parameter.transform.whole([checkpoint.source(n) for n in parameter.huggingface], arch)
        if set(sources) != parameter.huggingface.keys() or not torch.equal(ours, theirs.view(ours.shape)):
            differing.append(name)
    return len(parameters), differing


# It does not know Mistral, and expects every Mixtral config to name its head_dim.
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "mistral"])
def test_mbridge_makes_the_same_parameters(family: str, tmp_path: Path) -> None:
    """Names, fused rows and their order, bit for bit."""
    path = make_checkpoint(tmp_path, family, **({"head_dim": 16} if family == "mixtral" else {}))
    ((count, differing),) = run_ranks(_differing, 1, path)  # its tables change in place: one process a model
    assert differing == []
    assert count > 20
