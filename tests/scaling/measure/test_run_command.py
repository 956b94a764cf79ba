"""`scaling run`: what a row says is what the actor did, and there is a row whatever happens to the ranks."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import typer
from transformers import AutoModelForCausalLM

from megatron_fipo.config import to_yaml
from megatron_fipo.exit_codes import NOT_MEASURED
from megatron_fipo.model.check import check_model
from megatron_fipo.parallel import topology as topologies
from megatron_fipo.scaling.cost.sequence_lengths import Sequences
from megatron_fipo.scaling.measure.actor import make_batch
from megatron_fipo.scaling.measure.rank import measure_rank
from megatron_fipo.scaling.measure.row_writer import prepare_notes, write_finished_row
from megatron_fipo.scaling.measure.run_command import measure
from megatron_fipo.scaling.measure.specification import Loss, Measurement, read_row
from tests.support.actors import actor_of
from tests.support.families import make_checkpoint
from tests.support.policies import make_config, make_qwen2
from tests.support.ranks import run_ranks
from tests.support.waiting import PATIENCE

pytestmark = pytest.mark.distributed
LENGTHS = Sequences((9, 60, 33, 120, 71, 14, 90, 45), response_share=0.8)
PARALLEL: dict[str, dict[str, Any]] = {
    "pp2": {"pipeline": 2, "world_size": 2, "threads_per_rank": 1},
    "pp2_vpp2": {"pipeline": 2, "virtual_pipeline": 2, "world_size": 2, "threads_per_rank": 1},
    "free": {
        "pipeline": 2,
        "virtual_pipeline": 2,
        "pipeline_layout": "E|t*3||tL",
        "world_size": 2,
        "threads_per_rank": 1,
    },
    "tp2": {"tensor": 2, "sequence": True, "world_size": 2, "threads_per_rank": 1},
}
CASES: list[tuple[str, Loss]] = [
    ("pp2", "fipo"),
    ("pp2_vpp2", "fipo"),
    ("free", "fipo"),
    ("tp2", "fipo"),
    ("pp2", "lm"),
    ("tp2", "lm"),
]


def _measurement(model: Path, directory: Path, layout: str = "pp2", loss: Loss = "fipo", **changes: Any) -> Measurement:
    config = make_config(model, parallel=PARALLEL[layout], trainer={"tokens_per_micro_batch": 200})
    return replace(Measurement(config, LENGTHS, loss, "cpu", None, directory, steps=3, warmup=1), **changes)


def _measure_all(measurements: list[Measurement]) -> list[tuple[dict[str, Any], float]]:
    """Rows, and the loss that a plain actor has on the same batch before any update."""
    found = []
    for measurement in measurements:
        if dist.get_rank() == 0:
            prepare_notes(measurement)
        dist.barrier()
        measure_rank(measurement)
        topologies.destroy()
        row = write_finished_row(measurement) if dist.get_rank() == 0 else {}
        dist.barrier()
        p = measurement.config.parallel
        changed = {"parallel": {f: getattr(p, f) for f in PARALLEL["tp2"] | PARALLEL["pp2_vpp2"]}}
        with actor_of(Path(measurement.config.model.hf_path), trainer={"tokens_per_micro_batch": 200}, **changed) as a:
            loss, _ = a.get_loss_and_metrics(make_batch(replace(measurement, loss="fipo"), a), forward_only=True)
        found.append((row, loss))
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen2(tmp_path_factory.mktemp("model"), layers=4)


@pytest.fixture(scope="module")
def rows(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[dict[str, Any], float]]:
    """One update, the first."""
    directory = tmp_path_factory.mktemp("first")
    asked = [_measurement(model, directory, *case, steps=1, warmup=0) for case in CASES]
    return dict(zip(CASES, run_ranks(_measure_all, 2, asked)[0], strict=True))


@pytest.mark.parametrize("case", [c for c in CASES if c[1] == "fipo"])
def test_loss_is_the_actor_s(case: tuple[str, Loss], rows: Any) -> None:
    """The measured update had the loss that the actor gives for the batch."""
    row, loss = rows[case]
    assert row["loss_value"] == pytest.approx(loss, rel=1e-6)
    assert abs(loss) > 1e-3


@pytest.mark.parametrize("case", [c for c in CASES if c[1] == "lm"])
def test_lm_loss_is_cross_entropy(case: tuple[str, Loss], rows: Any, model: Path, tmp_path: Path) -> None:
    """The lm loss is torch's cross-entropy of the response tokens under transformers' own model."""
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    total, count = 0.0, 0
    from megatron_fipo.scaling.measure.actor import _random_rollouts

    asked = _measurement(model, tmp_path)
    rollouts = _random_rollouts(asked, list(range(len(LENGTHS))), check_model(asked.config))
    prompts = rollouts.prompt_lengths.tolist()
    for tokens, prompt in zip(rollouts.tokens.split(rollouts.lengths.tolist()), prompts, strict=True):
        with torch.no_grad():
            logits = reference(tokens[None]).logits[0]
        losses = torch.nn.functional.cross_entropy(logits[prompt - 1 : -1], tokens[prompt:], reduction="sum")
        total, count = total + float(losses), count + len(tokens) - prompt
    assert rows[case][0]["loss_value"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_row_adds_up(case: tuple[str, Loss], rows: Any) -> None:
    """Each stage's passes and idle seconds make up the pipeline's part of the step; rates follow from the seconds."""
    row, _ = rows[case]
    stages = PARALLEL[case[0]].get("pipeline", 1)
    assert row["status"] == "ok"
    assert row["tokens"] == sum(LENGTHS.lengths)
    assert len(row["stages"]) == len(row["timeline"]["stages"]) == stages
    assert row["micro_batches"] == 1 + max(span[4] for span in row["timeline"]["stages"][0])
    for stage in row["stages"]:
        idle = sum(stage[cause] for cause in ("warm_up", "waiting", "drain", "communication"))
        assert stage["busy"] + idle == pytest.approx(row["pipeline_seconds"])
        assert stage["bubble_fraction"] == pytest.approx(idle / row["pipeline_seconds"])
        assert stage["peak_memory_bytes"] > 1e5
    assert sum(s["bubble_fraction"] for s in row["stages"]) / stages == pytest.approx(row["bubble_fraction"])
    assert row["pipeline_seconds"] < row["seconds"] == row["step_seconds"][0]
    assert row["tokens_per_second_per_gpu"] == pytest.approx(row["tokens"] / row["seconds"] / 2)
    m, v = row["micro_batches"], PARALLEL[case[0]].get("virtual_pipeline", 1)
    assert row["closed_form_bubble_fraction"] == pytest.approx((stages - 1) / (m * v + stages - 1))
    assert len(row["peak_memory_bytes"]) == 2
    assert row["predicted"] is row["mfu"] is None


def test_random_weights(model: Path, tmp_path: Path) -> None:
    """A model of config.json alone gets random weights, alike on every layout: nearly uniform predictions."""
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((model / "config.json").read_text())
    asked = [_measurement(bare, tmp_path / "out", "pp2", "lm", steps=1, warmup=0)]
    asked.append(replace(asked[0], config=make_config(bare, parallel=PARALLEL["pp2_vpp2"])))
    losses = run_ranks(_losses, 2, asked)[0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] == pytest.approx(5.52, abs=0.05)  # log 250


def _losses(measurements: list[Measurement]) -> list[float]:
    from megatron_fipo.scaling.measure.actor import MeasuredActor

    losses = []
    for measurement in measurements:
        topology = topologies.initialize(measurement.config.parallel, 1)
        actor = MeasuredActor(measurement, topology)
        losses.append(actor.get_loss_and_metrics(make_batch(measurement, actor), forward_only=True)[0])
        topologies.destroy()
    return losses


def test_experts_of_an_engine_are_replayed(model: Path, tmp_path: Path) -> None:
    """With moe.routing_replay=rollout there is no engine: experts are random, the same in every layout."""
    experts = make_checkpoint(tmp_path / "moe", "qwen3_moe", num_hidden_layers=2)
    asked = _measurement(model, tmp_path / "out", steps=1, warmup=0)
    layouts: list[dict[str, Any]] = [{"world_size": 2, "expert": 2}, {"world_size": 2, "pipeline": 2}]
    configs = [make_config(experts, parallel=p, moe={"routing_replay": "rollout"}) for p in layouts]
    losses = run_ranks(_losses, 2, [replace(asked, config=config) for config in configs])[0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_too_big_is_a_row(model: Path, tmp_path: Path) -> None:
    """A rank whose allocator is refused memory ends the run with code 3 and a row that says so, which stays."""
    long = make_config(model, parallel=PARALLEL["pp2"], trainer={"tokens_per_micro_batch": 8000})
    # Far more than the limit: some is there already, freed by what ran before.
    asked = _measurement(model, tmp_path, config=long, sequences=Sequences((250,) * 32, 0.8), memory_bytes=12e6)
    with pytest.raises(typer.Exit) as ended:
        measure(asked, lengths_given=True, planned=False, again=False)
    row = read_row(asked.row_path)
    assert row is not None
    assert ended.value.exit_code == NOT_MEASURED
    assert row["status"] == "out_of_memory"
    assert re.search("DefaultCPUAllocator|Cannot allocate memory|exit code 127", row["error"])
    assert row["seconds"] is row["timeline"] is None
    assert not asked.notes.exists()
    before = asked.row_path.stat().st_mtime_ns
    with pytest.raises(typer.Exit):
        measure(replace(asked, memory_bytes=None), lengths_given=True, planned=False, again=False)
    assert asked.row_path.stat().st_mtime_ns == before


@pytest.mark.slow
def test_killed_rank_leaves_a_row(model: Path, tmp_path: Path) -> None:
    """kill -9 of a rank: a failed row with the memory reached; the same command then measures, and only once."""
    asked = _measurement(model, tmp_path / "out", steps=10_000)
    config = tmp_path / "config.yaml"
    config.write_text(to_yaml(asked.config))
    lengths = ",".join(map(str, LENGTHS.lengths))
    command = [sys.executable, "-m", "megatron_fipo.cli", "scaling", "run", str(config), "--lengths", lengths]
    command += ["--out", str(asked.directory), "--steps", str(asked.steps)]
    log = tmp_path / "log"
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
        try:
            os.kill(_pid_of_rank(asked, 1, process), signal.SIGKILL)
            code = process.wait(timeout=PATIENCE)
        finally:
            process.kill()
    row = read_row(asked.row_path)
    assert row is not None, log.read_text()
    assert code == NOT_MEASURED
    assert row["status"] == "failed"
    assert "SIGKILL" in row["error"]
    assert min(row["peak_memory_bytes"]) > 1e5
    again = replace(asked, steps=1)
    measure(again, lengths_given=True, planned=False, again=False)
    measured = json.loads(again.row_path.read_text())
    assert measured["status"] == "ok"
    measure(again, lengths_given=True, planned=False, again=False)
    assert json.loads(again.row_path.read_text()) == measured
    with pytest.raises(ValueError, match="442 tokens per update, but this one has 10"):
        measure(replace(again, sequences=Sequences((10,))), lengths_given=True, planned=False, again=False)


def _pid_of_rank(asked: Measurement, rank: int, process: subprocess.Popen[bytes]) -> int:
    """Return the process ID of a rank, once it has finished a step."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        note = read_row(asked.notes / f"rank_{rank}.json")
        if note is not None and note["done"] > 0:
            return int(note["pid"])
        time.sleep(0.1)
    raise AssertionError(f"rank {rank} has not finished a step")
