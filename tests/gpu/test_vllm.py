"""On a GPU with vLLM: a run whose rank and server take turns on it, weights through CUDA IPC."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_fipo.vllm_environment import installed, interpreter
from tests.gpu.world import GPUS, needs_gpu, needs_two_gpus

ROOT = Path(__file__).parents[2]
STEPS = 3


def _has_vllm() -> bool:
    try:
        return bool(GPUS) and installed(interpreter(None)).distribution == "vllm"
    except ValueError:
        return False


pytestmark = [
    pytest.mark.gpu,
    needs_gpu[1],
    pytest.mark.skipif(not _has_vllm(), reason="needs vLLM (make vllm-env)"),
    pytest.mark.timeout(900),
]
VARIANTS = {
    "colocated": (
        "rollout.server.placement=colocated",
        "optimizer.offload_state=true",
        "rollout.server.gpu_memory_utilization=0.3",
    ),
    "nccl": ("rollout.server.weight_transport=nccl", "rollout.server.gpu_memory_utilization=0.3"),
    "split": ("rollout.server.tensor_parallel_size=2", "rollout.server.gpu_memory_utilization=0.3"),
}
needs_three_gpus = pytest.mark.skipif(GPUS < 3, reason="needs three CUDA devices")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's base model and task: heads of 64 dimensions, as vLLM's kernels want them."""
    out = tmp_path_factory.mktemp("quickstart") / "base"
    make = [sys.executable, str(ROOT / "examples" / "quickstart" / "make_task.py"), "--out", str(out)]
    subprocess.run([*make, "--validation-problems", "16"], check=True, capture_output=True, timeout=600)
    return out


@pytest.mark.parametrize(
    "variant",
    ["colocated", pytest.param("nccl", marks=needs_two_gpus[1]), pytest.param("split", marks=needs_three_gpus)],
)
def test_trains(variant: str, base: Path, tmp_path: Path) -> None:
    """Three updates: checksums prove that all weights arrived, and engine and trainer agree on what was drawn."""
    settings = (
        *(f"run.directory={tmp_path}/run", f"model.hf_path={base}", f"data.train={base}/train.parquet"),
        *("data.validation=null", "parallel.world_size=1", "parallel.tensor=1", "parallel.pipeline=1"),
        *(
            "rollout.engine=vllm",
            "rollout.server.verify_weights=1",
            f"trainer.max_steps={STEPS}",
            "rollout.surplus_groups=drop",
        ),
        *("rollout.prompts_per_step=16", "trainer.mini_batch_prompts=4", "trainer.export_policy=false"),
    )
    command = [sys.executable, "-m", "megatron_fipo.cli", "train", str(ROOT / "examples" / "quickstart.yaml")]
    ended = subprocess.run(
        [*command, *settings, *VARIANTS[variant]], capture_output=True, text=True, timeout=850, check=False, cwd=ROOT
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["policy/first_log_ratio_abs_max"] == 0 for row in rows)
    assert all(row["mismatch/abs_mean"] < 0.05 for row in rows)
