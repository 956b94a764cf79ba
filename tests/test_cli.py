"""The command: exit code 2 and a sentence for what the user can mend, and then nothing is written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from megatron_fipo import cli, launch
from megatron_fipo.config import Config
from megatron_fipo.run_log import RunLog, clear
from tests.support.policies import make_task


class Outcome(NamedTuple):
    code: Any
    stdout: str
    stderr: str


Command = Callable[..., Outcome]


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory to run in, with `base/` and `config.yaml`; starting a rank would fail the test."""
    base = make_task(tmp_path / "base")
    config = {
        "run": {"directory": "run"},
        "model": {"hf_path": "base", "dtype": "float32"},
        "data": {"train": "base/train.parquet", "validation": "base/validation.parquet", "max_prompt_tokens": 16},
        "rollout": {"prompts_per_step": 4, "group_size": 2, "max_response_tokens": 32},
        "reward": {"overlong_buffer_tokens": 0},
        "trainer": {"mini_batch_prompts": 2, "tokens_per_micro_batch": 256},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "run", lambda *args, **kwargs: pytest.fail("ranks were started"))
    assert base.is_dir()
    return tmp_path


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run `megatron-fipo ARGUMENTS` in this process."""

    def run(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["megatron-fipo", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        return Outcome(exit_.value.code or 0, *capsys.readouterr())

    return run


def _tree(directory: Path) -> dict[str, int]:
    return {str(f.relative_to(directory)): f.stat().st_mtime_ns for f in directory.rglob("*")}


def _edit_model(task: Path, **changes: Any) -> None:
    file = task / "base" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


Prepare = Callable[[Path], Any]
BAD_INPUT: dict[str, tuple[Prepare, list[str], str]] = {
    "missing config": (lambda t: (t / "config.yaml").unlink(), [], "config file config.yaml does not exist"),
    "config that is no YAML": (lambda t: (t / "config.yaml").write_text("run: [1"), [], "cannot read config.yaml"),
    "unknown key": (lambda t: 0, ["rollout.groupsize=4"], "did you mean 'rollout.group_size'?"),
    "unknown key in the file": (
        lambda t: (t / "config.yaml").write_text("trainer: {max_step: 1}"),
        [],
        "unknown config key 'trainer.max_step'; did you mean 'trainer.max_steps'?",
    ),
    "override without a value": (lambda t: 0, ["run.seed"], "override 'run.seed' must have the form"),
    "wrong layout": (
        lambda t: 0,
        ["parallel.world_size=6", "parallel.tensor=4"],
        "tp 4 x pp 1 x cp 1 = 4 does not divide the 6 ranks; use 4 or 8 ranks",
    ),
    "missing data file": (
        lambda t: (t / "base" / "train.parquet").unlink(),
        [],
        "data file base/train.parquet does not exist",
    ),
    "broken parquet": (
        lambda t: (t / "base" / "validation.parquet").write_bytes(b"PAR1 and no more"),
        [],
        "base/validation.parquet is not a parquet file",
    ),
    "model directory without config.json": (
        lambda t: (t / "base" / "config.json").unlink(),
        [],
        "model.hf_path 'base' has no config.json",
    ),
    "tokenizer with more tokens than rows": (
        lambda t: _edit_model(t, vocab_size=20),
        [],
        "has 30 tokens, but the model's embedding only 20 rows",
    ),
    "heads not divisible by tp": (
        lambda t: 0,
        ["parallel.tensor=3", "parallel.world_size=3"],
        "2 key/value heads cannot be split over parallel.tensor 3: must be one of [1, 2, 4]",
    ),
    "layers not divisible by pp": (
        lambda t: 0,
        ["parallel.pipeline=4", "parallel.world_size=4"],
        "2 layers = 2 over 4 pipeline stages",
    ),
    "two ends without a stage between, interleaved": (
        lambda t: _edit_model(t, num_hidden_layers=8, layer_types=["full_attention"] * 8),
        [
            *("parallel.pipeline=2", "parallel.world_size=2", "parallel.virtual_pipeline=2"),
            *("parallel.first_stage_layers=2", "parallel.last_stage_layers=6"),
        ],
        "parallel.first_stage_layers 2 and last_stage_layers 6 leave no stage between them",
    ),
    "old config of llama3's rope, incomplete": (
        lambda t: _edit_model(t, rope_parameters=None, rope_scaling={"rope_type": "llama3", "factor": 8.0}),
        [],
        "lacks high_freq_factor and low_freq_factor",
    ),
    "yarn": (
        lambda t: _edit_model(t, rope_parameters=None, rope_scaling={"rope_type": "yarn", "factor": 8.0}),
        [],
        "rope type 'yarn' is not supported",
    ),
    "override that is no number": (
        lambda t: 0,
        ["model.overrides.rope_theta=many"],
        "model.overrides.rope_theta is 'many'; expected a positive number",
    ),
    "truncated generation config": (
        lambda t: (t / "base" / "generation_config.json").write_text('{"eos_token_id": [1,'),
        [],
        "generation_config.json cannot be read",
    ),
    "index that names absent shards": (
        lambda t: (t / "base" / "model.safetensors.index.json").write_text(
            '{"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}'
        ),
        [],
        "names model-00002-of-00002.safetensors, which does not exist",
    ),
    "tied output layer that differs": (
        lambda t: _edit_model(t, tie_word_embeddings=True),
        [],
        "has tie_word_embeddings=true in config.json, but lm_head.weight differs",
    ),
    "longer than the model's positions": (
        lambda t: _edit_model(t, max_position_embeddings=40),
        [],
        "16 + rollout.max_response_tokens 32 = 48 exceeds the model's max_position_embeddings 40",
    ),
    "unknown reward": (
        lambda t: 0,
        ["reward.function=dappo"],
        "reward.function 'dappo' must be one of dapo, math, exact",
    ),
    "FIPO as a no-op, strictly": (
        lambda t: 0,
        ["trainer.strict=true", "trainer.mini_batch_prompts=4"],
        "FIPO is exactly DAPO",
    ),
}


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_refused(case: str, dry_run: bool, task: Path, command: Command) -> None:
    """Exit code 2, one error that says what is wrong, no traceback, and no file made or changed."""
    prepare, overrides, says = BAD_INPUT[case]
    prepare(task)
    before = _tree(task)
    outcome = command("train", "config.yaml", *["--dry-run"][: int(dry_run)], *overrides)
    assert outcome.code == 2
    assert says in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert _tree(task) == before


@pytest.mark.parametrize(
    ("arguments", "config", "lr"),
    [
        ([], "recipe.yaml", 1e-6),
        (["optimizer.lr=3e-6"], "recipe.yaml", 3e-6),
        (["config.yaml"], "config.yaml", 1e-6),
        (["config.yaml", "optimizer.lr=3e-6"], "config.yaml", 3e-6),
    ],
)
def test_recipe_stands_in_for_a_config(
    arguments: list[str], config: str, lr: float, task: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`train --recipe FILE` as batch scripts say it: the recipe, unless the first argument is another config."""
    text = (task / "config.yaml").read_text()
    (task / "recipe.yaml").write_text(text + "resume: {max_requeues: 7}\n")
    started: list[Config] = []
    monkeypatch.setattr(launch, "run", lambda entry, parallel, args, **kwargs: started.append(args[0]))
    assert command("train", "--recipe", "recipe.yaml", "--dry-run", *arguments).code == 0
    assert (started[0].resume.max_requeues == 7, started[0].optimizer.lr) == (config == "recipe.yaml", lr)


def test_config_is_asked_for(task: Path, command: Command) -> None:
    """Without a recipe a config file must be named."""
    outcome = command("train")
    assert (outcome.code, "train needs a config file" in outcome.stderr) == (2, True)


def _earlier_run(task: Path) -> None:
    (task / "run" / "rollouts").mkdir(parents=True)
    (task / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    (task / "run" / "began.json").write_text('{"began": "2026-01-01T00:00:00"}\n')
    (task / "run" / "rollouts" / "step_1.parquet").write_text("")
    (task / "run" / "notes.txt").write_text("mine")


def test_an_earlier_run_is_kept(task: Path, command: Command) -> None:
    """A directory with a run of unknown or other settings is refused, with the ways out, and stays as it is."""
    _earlier_run(task)
    before = _tree(task)
    outcome = command("train", "config.yaml")
    assert outcome.code == 2
    assert "cannot read the settings of the run in run: config file run/config.yaml does not exist" in outcome.stderr
    assert _tree(task) == before
    (task / "run" / "config.yaml").write_text((task / "config.yaml").read_text())
    outcome = command("train", "config.yaml", "optimizer.lr=2e-6")
    assert outcome.code == 2
    assert "optimizer.lr: 1e-06 -> 2e-06" in outcome.stderr
    assert "run.overwrite=true to start over" in outcome.stderr


def test_overwrite_replaces_an_earlier_run(task: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `run.overwrite=true` an earlier run is still there when ranks start; what they remove is what a run leaves,
    and nothing else."""
    _earlier_run(task)
    before = sorted(f.name for f in Path("run").iterdir())
    seen: list[list[str]] = []

    def start(entry: object, parallel: object, args: tuple[Config], **kwargs: object) -> None:
        seen.append(sorted(f.name for f in Path("run").iterdir()))
        clear(args[0].run_directory)
        log = RunLog(args[0], rank=0)
        log.open(step=0, seconds=0.0)
        log.close()
        seen.append(sorted(f.name for f in Path("run").iterdir()))

    monkeypatch.setattr(launch, "run", start)
    monkeypatch.setattr(cli, "_report", lambda run: None)
    assert command("train", "config.yaml", "run.overwrite=true").code == 0
    assert seen == [before, ["config.yaml", "metrics.jsonl", "notes.txt", "tensorboard"]]
    assert Path("run/metrics.jsonl").read_text() == ""


def test_no_op_is_warned_about(task: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """One update a step: a warning on stderr, and the run goes on."""
    monkeypatch.setattr(launch, "run", lambda *args, **kwargs: None)
    outcome = command("train", "config.yaml", "--dry-run", "trainer.mini_batch_prompts=4")
    assert outcome.code == 0
    assert "warning: with one update a step, FIPO is exactly DAPO" in outcome.stderr


def test_dry_run_writes_nothing(task: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even the run's directory, and an earlier run there is no obstacle."""
    _earlier_run(task)
    before = _tree(task)
    monkeypatch.setattr(launch, "run", lambda *args, **kwargs: None)
    assert command("train", "config.yaml", "--dry-run").code == 0
    assert _tree(task) == before


def test_a_failed_rank_is_shown_with_exit_code_1(task: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its traceback, and not the command's own."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise launch.RankFailure("rank 3 failed first: RuntimeError: boom\nits traceback")

    monkeypatch.setattr(launch, "run", fail)
    outcome = command("train", "config.yaml")
    assert outcome.code == 1
    assert outcome.stderr.splitlines()[-2:] == ["rank 3 failed first: RuntimeError: boom", "its traceback"]


def test_report_of_no_run(task: Path, command: Command) -> None:
    """A directory that is none is refused and not made."""
    before = _tree(task)
    outcome = command("report", "no-such-run")
    assert outcome.code == 2
    assert "no-such-run" in outcome.stderr
    assert _tree(task) == before


def test_the_installed_command(task: Path) -> None:
    """`megatron-fipo` itself, in a process of its own: code 2, the sentence, no traceback."""
    program = Path(sys.executable).with_name("megatron-fipo")
    done = subprocess.run([program, "train", "nowhere.yaml"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip() == "error: config file nowhere.yaml does not exist"


def test_signal_after_the_run_does_not_end_its_report(task: Path) -> None:
    """Slurm signals a job ahead of its time limit, also one that has trained already: it ends with exit code 0."""
    program = (
        "import os, signal, sys; from megatron_fipo import cli; sys.argv = ['megatron-fipo', 'report', '.'];"
        "cli._report = lambda *_: os.kill(os.getpid(), signal.SIGUSR1); cli.main()"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["checkpoint=nowhere"], "checkpoint=nowhere is not a directory"),
        (["data.validation=null"], "data.validation must name the problem file to evaluate on"),
        (["checkpoint=base", "model.hf_pth=x"], "did you mean 'model.hf_path'?"),
    ],
)
def test_eval_refuses(task: Path, command: Command, arguments: list[str], says: str) -> None:
    """Exit code 2 before any rank starts."""
    outcome = command("eval", "config.yaml", *arguments)
    assert outcome.code == 2
    assert says in outcome.stderr


LIGHT = """
import sys
from megatron_fipo.cli import app
app(sys.argv[1:], standalone_mode=False)
print({"torch", "megatron", "transformers"} & {*sys.modules})
"""


@pytest.mark.slow
def test_the_command_stays_light(task: Path) -> None:
    """Checks and ranks import the heavy packages in processes of their own. (Starts a server and a rank: slow.)"""
    arguments = ["train", "config.yaml", "--dry-run"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, *arguments], capture_output=True, text=True, check=False, env=environment
    )
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "set()"), done.stderr
