"""A whole run of a mixture of experts with a real vLLM server on the CPU that replays what the server chose."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.families import make_checkpoint
from tests.support.policies import make_task

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1800)]  # a server whose kernels are interpreted

ROOT = Path(__file__).parents[3]
STEPS = 3
SETTINGS = (
    *("parallel.world_size=2", "parallel.tensor=1", "parallel.pipeline=1", "parallel.expert=2"),
    *(f"trainer.max_steps={STEPS}", "trainer.mini_batch_prompts=2", "trainer.export_policy=false"),
    *("trainer.tensorboard=false", "eval.every=0", "eval.samples=1", "data.validation=null"),
    *("moe.routing_replay=rollout", "moe.aux_loss=0.01", "reward.function=tests.support.continued_runs:parity"),
    *("rollout.engine=vllm", "rollout.prompts_per_step=4", "rollout.max_response_tokens=24", "rollout.max_rounds=0"),
    *("rollout.max_staleness=2", "rollout.partial=true"),
    *("rollout.server.kv_cache_gb=0.01", "rollout.server.max_num_seqs=16", "rollout.server.verify_weights=1"),
)


def test_trains_on_what_the_server_chose(tmp_path: Path) -> None:
    """Responses that go on under newer weights included. The first batch, of the very weights that it trains, has the
    trainer's own choice and log-probabilities; every first update has log-ratio 0."""
    base, run = make_task(tmp_path / "base"), tmp_path / "run"
    shape = {"num_hidden_layers": 2, "head_dim": 32, "moe_intermediate_size": 64, "max_position_embeddings": 512}
    special = {"vocab_size": 30, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    make_checkpoint(base, "qwen3_moe", **shape, **special)
    command = [sys.executable, "-m", "megatron_fipo.cli", "train", str(ROOT / "examples" / "quickstart.yaml")]
    command += [f"run.directory={run}", f"model.hf_path={base}", *SETTINGS]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500, check=False)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[0]["moe/rollout_changed"] < 0.01
    assert rows[0]["mismatch/abs_max"] < 1e-4
    assert max(row["batch/staleness_max"] for row in rows) >= 1
    assert max(row["moe/rollout_changed"] for row in rows[1:]) < 0.5
