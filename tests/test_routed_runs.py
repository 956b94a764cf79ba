"""Runs of a mixture of experts that replay its routing: interrupted or killed, they go on to the bit."""

from __future__ import annotations

import signal
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from megatron_fipo.metric_glossary import METRICS
from tests.support.continued_runs import assert_same_run, metric_rows, run_config, run_to_its_end
from tests.support.families import make_checkpoint
from tests.support.policies import make_task

pytestmark = pytest.mark.distributed

EXPERTS = 6
LAYOUT = {"world_size": 2, "expert": 2}


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quick start's problems and tokenizer, with a mixture of experts."""
    directory = make_task(tmp_path_factory.mktemp("task") / "base")
    special = {"vocab_size": 30, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return make_checkpoint(directory, "qwen3_moe", num_hidden_layers=2, max_position_embeddings=512, **special)


@pytest.mark.parametrize("replay", ["update", "rollout"])
def test_interrupted_run_goes_on_to_the_bit(replay: str, task: Path, tmp_path: Path) -> None:
    """Groups that are kept for the next batch have their routing in the checkpoint; metrics, responses and weights are
    those of a run that was left alone."""
    sections = {"parallel": LAYOUT, "moe": {"routing_replay": replay, "aux_loss": 0.01}}
    ended, expected = run_to_its_end(run_config(task, tmp_path / "alone", **sections))
    assert ended == "finished"
    config = run_config(task, tmp_path / "run", **sections)
    assert run_to_its_end(config, "update 3")[0] == "interrupted after step 3"
    ended, weights = run_to_its_end(config)
    assert ended == "finished"
    assert_same_run(tmp_path / "run", weights, (tmp_path / "alone", expected))
    config = run_config(task, tmp_path / "killed", **sections)
    with pytest.raises(RuntimeError):
        run_to_its_end(config, "update 4", signal.SIGKILL)
    assert len(metric_rows(tmp_path / "killed")) == 3
    ended, weights = run_to_its_end(config)
    assert ended == "finished"
    assert_same_run(tmp_path / "killed", weights, (tmp_path / "alone", expected))
    rows = metric_rows(tmp_path / "run")
    of_routing = {name for name in METRICS if name.startswith("moe/")}
    of_engine = {"moe/rollout_changed", "moe/rollout_changed_max"}
    assert {name for name in rows[0] if name.startswith("moe/")} == of_routing - (
        of_engine if replay == "update" else set()
    )
    assert any(row["sampling/surplus_groups"] for row in rows)
    for row in rows:
        layers = pq.read_table(tmp_path / "run" / "routing" / f"step_{row['step']}.parquet").to_pylist()
        assert [layer["layer"] for layer in layers] == [0, 1]
        assert [sum(layer["load"]) for layer in layers] == pytest.approx([EXPERTS] * 2)
        assert max(max(layer["load"]) for layer in layers) == row["moe/load_max"]
        assert min(layer["entropy"] for layer in layers) == row["moe/entropy_min"]
        assert max(layer["replayed_changed"] for layer in layers) == row["moe/replayed_changed_max"]
    moved = [row["moe/replayed_changed"] for row in rows]
    assert max(moved) > 0  # routers learn, so a later update would choose other experts
    if replay == "rollout":
        # Before the first update the policy chooses what the engine did, but for rounding.
        assert rows[0]["moe/rollout_changed"] < 0.01
        assert rows[0]["mismatch/abs_max"] < 1e-4
        assert rows[0]["policy/approx_kl"] == 0
