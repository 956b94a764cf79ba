"""`megatron-fipo mismatch` from its arguments to its report."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import megatron_fipo.mismatch.rank
from megatron_fipo import cli, launch
from megatron_fipo.config import Config, to_yaml
from megatron_fipo.mismatch.options import Options
from megatron_fipo.model.policy import PolicyModel
from megatron_fipo.rollout import HFEngine
from tests.support.policies import make_config, make_task
from tests.support.ranks import run_ranks
from tests.support.streaming import BackgroundHF
from tests.support.waiting import PATIENCE

ROOT = Path(__file__).parents[2]
COUNT, TOKENS = 3, 10


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random policy of 2 layers and problems."""
    return make_task(tmp_path_factory.mktemp("task") / "base")


def task_config(task: Path, **sections: dict[str, Any]) -> Config:
    changed: dict[str, dict[str, Any]] = {
        "data": {"train": f"{task}/train.parquet", "max_prompt_tokens": 16},
        "rollout": {"max_response_tokens": 12, "group_size": 2},
    }
    merged = {name: {**changed.get(name, {}), **sections.get(name, {})} for name in {*changed, *sections}}
    return make_config(task, **merged)


def run_command(*arguments: str, seconds: float = PATIENCE) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of the whole command; its ranks end with it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "megatron_fipo.cli", "mismatch", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=seconds)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, stdout, stderr


@pytest.mark.distributed
def test_whole_command(task: Path, tmp_path: Path) -> None:
    """On two ranks, TP 2: progress, a table of at most 80 columns with a row for each component, a conclusion, and the
    same numbers as JSON, with what each response was and how its tokens were sampled."""
    file, out = tmp_path / "config.yaml", tmp_path / "mismatch.json"
    file.write_text(to_yaml(task_config(task)))
    layout = ["parallel.world_size=2", "parallel.tensor=2", "parallel.sequence_chunks=2"]
    code, stdout, stderr = run_command(str(file), *layout, f"--responses={COUNT}", f"--tokens={TOKENS}", f"--out={out}")
    assert code == 0, stderr
    assert f"generating {COUNT} responses of up to {TOKENS} tokens" in stderr
    assert f"{COUNT} of {COUNT} responses compared" in stderr
    lines = stdout.splitlines()
    assert max(map(len, lines)) <= 80
    report = json.loads(out.read_text())
    names = [c["name"] for c in report["components"]]
    assert names == ["embedding", "layer 0", "layer 1", "final norm", "log-probs"]
    for name in names:
        assert sum(line.startswith(f"{name} ") for line in lines) == 1
    assert report["first"] is None
    assert (report["engine"], report["dtype"], report["layout"]) == ("hf", "float32", "tp 2, pp 1, cp 1, dp 1, ep 1")
    assert "No component differs by more than rounding" in stdout
    assert "mismatch/abs_*" in stdout
    tokens = sum(len(r["log_probs"]["engine"]) for r in report["responses"])
    assert f"{COUNT} responses, {tokens} response tokens" in lines
    assert "hf engine, float32, tp 2, pp 1, cp 1, dp 1, ep 1" in lines
    assert all(d["abs_mean"] <= d["abs_max"] < 1e-4 for d in report["distances"])
    for response in report["responses"]:
        sampled = response["tokens"][response["prompt_tokens"] :]
        assert 1 <= len(sampled) <= TOKENS
        assert len(response["texts"]) == len(response["tokens"])
        assert {len(values) for values in response["log_probs"].values()} == {len(sampled)}


def _run_with_fault(config: Config, out: Path, engine: str) -> str:
    """The rank's part, with a fault in the trainer's second layer that the engine does not get; what is printed."""
    hf_engine = HFEngine

    def make_engine(config: Config, hf_config: Any, topology: Any) -> Any:
        made = hf_engine(hf_config, torch.float32, topology.device, config.rollout.batch_size)
        return made if engine == "hf" else BackgroundHF(made, group_size=1)

    def forward(self: PolicyModel, *args: Any) -> torch.Tensor:
        if not hasattr(self, "is_faulty"):
            self.is_faulty = True
            with torch.no_grad():
                self.decoder.layers[1].mlp.linear_fc2.weight.mul_(1.5)
        return original(self, *args)

    original, printed = PolicyModel.forward, io.StringIO()
    megatron_fipo.mismatch.rank.make_engine = make_engine
    PolicyModel.forward = forward  # type: ignore[method-assign]
    try:
        with contextlib.redirect_stdout(printed):
            megatron_fipo.mismatch.rank.run(config, Options(COUNT, TOKENS, out))
    finally:
        PolicyModel.forward = original  # type: ignore[method-assign]
    return printed.getvalue()


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ["hf", "vllm"])
def test_a_fault_in_the_trainer(engine: str, task: Path, tmp_path: Path) -> None:
    """Named with layer and token, for the hf engine and beside one whose layers are not visible, where the report says
    which model's are compared. The engine agrees with the model, so the trainer is the one that differs."""
    out = tmp_path / "out.json"
    config = task_config(task, rollout={"engine": engine})
    (text,) = run_ranks(_run_with_fault, 1, config, out, engine)
    report = json.loads(out.read_text())
    assert report["engine"] == engine
    assert report["first"] == "layer 1"
    assert [c["name"] for c in report["components"] if c["beyond_rounding"]] == ["layer 1"]
    layer = report["components"][2]
    printed = " ".join(text.split())
    response = report["responses"][layer["worst"]["response"]]
    position = layer["worst"]["position"]
    assert f"<< First in layer 1: its difference is {layer['times']:.3g} times the rounding error" in printed
    assert f"Worst token: response {layer['worst']['response']}, position {position} (" in printed
    assert f"text {response['texts'][position]!r}" in printed
    assert ("A server's own layers are not visible" in printed) == (engine == "vllm")
    whole, engine_model, model_trainer, packing = (d["abs_mean"] for d in report["distances"])
    assert max(engine_model, packing) < 1e-5 < 1e-2 < model_trainer
    assert whole == pytest.approx(model_trainer, rel=1e-3)


BAD_INPUT = {
    "tokens": (["--tokens", "13"], "--tokens 13 must be at most rollout.max_response_tokens, which is 12"),
    "directory": (["--out", "."], "--out . is a directory, but must be a file"),
    "no directory": (["--out", "none/x.json"], "--out none/x.json is in a directory that does not exist"),
    "checkpoint": (["checkpoint=none"], "checkpoint=none is not a directory"),
    "layout": (["parallel.tensor=3", "parallel.world_size=3"], "2 key/value heads cannot be split"),
    "data": (["data.train=none.parquet"], "data file none.parquet does not exist"),
    "responses": (["--responses", "0"], "Invalid value for '--responses'"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(
    case: str, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2 and what is wrong, before any rank starts, and no file."""
    arguments, says = BAD_INPUT[case]
    (tmp_path / "config.yaml").write_text(to_yaml(task_config(task)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "run", lambda *args, **kwargs: pytest.fail("ranks were started"))
    monkeypatch.setattr(sys, "argv", ["megatron-fipo", "mismatch", "config.yaml", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert says in " ".join(capsys.readouterr().err.split())
    assert [f.name for f in tmp_path.iterdir()] == ["config.yaml"]


def test_default_length() -> None:
    """256 tokens, or the run's if its responses are shorter."""
    config = Config()
    assert Options(4, None, None).response_tokens(config) == 256
    short = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, max_response_tokens=100))
    assert Options(4, None, None).response_tokens(short) == 100
    assert Options(4, 7, None).response_tokens(short) == 7
