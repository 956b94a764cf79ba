"""`doctor CONFIG` and `train` on the same question: could this start here? Installations are stand-ins on sys.path."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml

from megatron_fipo import cli, doctor, launch
from megatron_fipo.machine.space import Room
from tests.support.installations import VERSION, install_transformer_engine
from tests.support.policies import make_task

ROOT = Path(__file__).parents[1]
NEEDS_GPU = "model.transformer_engine=on needs a GPU: torch"

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="judges a machine without a GPU")


class Outcome(NamedTuple):
    code: int
    stdout: str
    stderr: str


Command = Callable[..., Outcome]


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory to run in, with `base/`, `config.yaml` and `site/`; starting a rank would fail the test."""
    make_task(tmp_path / "base")
    config = {
        "model": {"hf_path": "base", "dtype": "float32"},
        "data": {"train": "base/train.parquet", "validation": "base/validation.parquet", "max_prompt_tokens": 16},
        "rollout": {"prompts_per_step": 4, "group_size": 2, "max_response_tokens": 32},
        "reward": {"overlong_buffer_tokens": 0},
        "trainer": {"mini_batch_prompts": 2, "tokens_per_micro_batch": 256},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "site").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "run", lambda *args, **kwargs: pytest.fail("ranks were started"))
    return tmp_path


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    def run(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["megatron-fipo", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        return Outcome(int(exit_.value.code or 0), *capsys.readouterr())

    return run


def test_ready(task: Path, command: Command) -> None:
    """A configuration that needs no GPU starts on a machine without one: exit code 0."""
    outcome = command("doctor", "config.yaml")
    assert outcome.code == 0
    assert outcome.stdout.splitlines()[-1] == "config.yaml: ready on this machine"


def test_a_cluster_s_limits(task: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too few open files and too little room for checkpoints are said at once, with what limits them."""
    monkeypatch.setattr("megatron_fipo.machine.limits.most_open_files", lambda: 64)
    room = Room(1000, "the user quota of /home")
    monkeypatch.setattr("megatron_fipo.scaling.planner.checkpoint_space.room", lambda path: room)
    outcome = command("doctor", "config.yaml")
    assert outcome.code == 1
    assert "has 0.0 GB left by the user quota of /home: at least two checkpoints must fit" in outcome.stdout
    assert (
        "the limit of open files is 64 (`ulimit -Hn`), but a rank of this configuration opens up to" in outcome.stdout
    )


def test_without_a_config(task: Path, command: Command) -> None:
    """The table alone, which judges nothing: exit code 0."""
    outcome = command("doctor")
    assert outcome.code == 0
    assert "ready" not in outcome.stdout


def test_everything_that_is_missing(task: Path, command: Command) -> None:
    """Not the first problem alone: files, model and kernels, each with what to run; exit code 1."""
    (task / "base" / "train.parquet").unlink()
    overrides = ("model.hf_path=models/none", "model.transformer_engine=on", "rollout.engine=vllm")
    outcome = command("doctor", "config.yaml", *overrides, "rollout.server.python=nowhere/python")
    assert outcome.code == 1
    judged = outcome.stdout.partition("config.yaml: not ready on this machine")[2]
    for what, remedy in (
        ("Transformer Engine is not installed", "make install GPU=yes"),
        (NEEDS_GPU, "Run it on a GPU node"),
        ("model.hf_path 'models/none' has no config.json", "hf download ORGANIZATION/NAME --local-dir models/none"),
        ("there is no nowhere/python", "make vllm-env"),
        ("data file base/train.parquet does not exist", "megatron-fipo data prepare SOURCE base/train.parquet"),
    ):
        line = next(line for line in judged.splitlines() if what in line)
        assert remedy in line


def test_a_wrong_setting_is_bad_input(task: Path, command: Command) -> None:
    """Exit code 2, as of every command."""
    assert command("doctor", "config.yaml", "model.transformer_engine=maybe").code == 2
    assert command("doctor", "nowhere.yaml").code == 2


def test_a_login_node(task: Path, command: Command) -> None:
    """An installation that imports is ready for GPU nodes, and not ready on this machine."""
    install_transformer_engine(task / "site")
    outcome = command("doctor", "config.yaml", "model.transformer_engine=on", "--login-node")
    assert outcome.code == 0
    assert "config.yaml: ready for GPU nodes, in this environment" in outcome.stdout
    assert "srun --gpus=1 megatron-fipo doctor config.yaml" in outcome.stdout
    outcome = command("doctor", "config.yaml", "model.transformer_engine=on")
    assert outcome.code == 1
    assert NEEDS_GPU in outcome.stdout
    assert "not installed" not in outcome.stdout.partition("config.yaml: not ready")[2]


@pytest.mark.parametrize("error", ["RuntimeError", pytest.param("OSError", marks=pytest.mark.slow)])
def test_a_broken_transformer_engine(task: Path, command: Command, error: str) -> None:
    """Named with what it raises by the table and the verdict, on a login node as well; never a traceback."""
    install_transformer_engine(task / "site", error)
    outcome = command("doctor", "config.yaml", "model.transformer_engine=on", "--login-node")
    assert outcome.code == 1
    told = f"Transformer Engine {VERSION} is installed but cannot be imported ({error}: "
    assert told in outcome.stdout.partition("config.yaml: not ready")[2]
    assert f"{VERSION}, which cannot" in outcome.stdout.partition("config.yaml: not ready")[0]
    assert "Traceback" not in outcome.stdout + outcome.stderr


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["train"], "RuntimeError"),
        # Each tries the import in an interpreter of its own.
        pytest.param(["train"], "OSError", marks=pytest.mark.slow),
        pytest.param(["train", "--dry-run"], "ImportError", marks=pytest.mark.slow),
        pytest.param(["eval"], "OSError", marks=pytest.mark.slow),
    ],
)
def test_train_says_the_same_before_ranks_start(task: Path, command: Command, arguments: list[str], error: str) -> None:
    """Exit code 2 and the same sentence; a rank that was started would fail this test."""
    install_transformer_engine(task / "site", error)
    outcome = command(arguments[0], "config.yaml", *arguments[1:], "model.transformer_engine=on")
    assert outcome.code == 2
    told = f"Transformer Engine {VERSION} is installed but cannot be imported ({error}: "
    assert told in outcome.stderr
    assert "Traceback" not in outcome.stderr


def test_train_needs_the_gpu_that_is_asked_for(task: Path, command: Command) -> None:
    """With a working installation the GPU is what is missing, before any rank starts."""
    install_transformer_engine(task / "site")
    outcome = command("train", "config.yaml", "model.transformer_engine=on")
    assert outcome.code == 2
    assert NEEDS_GPU in outcome.stderr


def test_a_dry_run_on_a_login_node(task: Path, command: Command) -> None:
    """Checks that need no GPU are made, no rank is started, and the last line says that no update was run."""
    install_transformer_engine(task / "site")
    outcome = command("train", "config.yaml", "--dry-run", "model.transformer_engine=on")
    assert outcome.code == 0
    assert "everything that needs no GPU passed; no update was run, since" in outcome.stdout
    outcome = command("train", "config.yaml", "--dry-run", "model.transformer_engine=on", "data.train=elsewhere")
    assert outcome.code == 2
    assert "data file elsewhere does not exist" in outcome.stderr


def test_a_torch_that_does_not_import(task: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is named by the verdict, and nothing that imports it is tried."""

    def broken() -> str:
        raise ImportError("libtorch_cuda.so: undefined symbol: ncclCommResume")

    components = [c._replace(probe=broken) if c.name == "PyTorch" else c for c in doctor.COMPONENTS]
    monkeypatch.setattr(doctor, "COMPONENTS", components)
    monkeypatch.setattr(doctor, "_run_problems", lambda *args: pytest.fail("it was tried"))
    outcome = command("doctor", "config.yaml", "--login-node")
    assert outcome.code == 1
    judged = outcome.stdout.partition("config.yaml: not ready")[2]
    assert (
        "PyTorch: broken: ImportError: libtorch_cuda.so: undefined symbol: ncclCommResume; run `make install`" in judged
    )
    assert "note:" not in judged


def test_a_published_recipe(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a fresh checkout `doctor examples/fipo_32b.yaml` lists model, data, vLLM, kernels and GPU."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("MEGATRON_FIPO_VLLM_PYTHON", "nowhere/python")
    outcome = command("doctor", "examples/fipo_32b.yaml", "model.hf_path=nowhere", "data.train=no.parquet")
    assert outcome.code == 1
    judged = outcome.stdout.partition("examples/fipo_32b.yaml: not ready")[2]
    for what in ("Transformer Engine", "needs a GPU", "nowhere/python", "model.hf_path 'nowhere'", "no.parquet"):
        assert what in judged
