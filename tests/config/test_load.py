"""Loading and saving of the configuration."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_fipo.config import Config, load_config, to_yaml
from tests.config.refusals import REQUIRED, refused

EXAMPLES = sorted(
    f for f in (Path(__file__).parents[2] / "examples").glob("*.yaml") if not f.name.startswith("compare_")
)


def test_defaults_are_legal(file: Path) -> None:
    """A model and a data file are all that has to be named."""
    config = load_config(file)
    assert config == dataclasses.replace(
        Config(),
        model=dataclasses.replace(Config().model, hf_path="model"),
        data=dataclasses.replace(Config().data, train="train.parquet"),
    )


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_examples_load(path: Path) -> None:
    """Every example is legal as it stands."""
    config = load_config(path)
    assert config.parallel.world_size % config.parallel.data == 0


def test_overrides_win_over_the_file(file: Path) -> None:
    """With the types that the fields have: numbers, booleans, None, lists, maps and texts."""
    file.write_text(yaml.safe_dump({**REQUIRED, "optimizer": {"lr": 1e-5, "warmup": 3}}))
    config = load_config(
        file,
        [
            *("optimizer.lr=2e-6", "run.overwrite=true", "algorithm.influence_clip=null", "optimizer.betas=[0.9,0.95]"),
            *("model.overrides.max_position_embeddings=4096", "run.name=a=b", "parallel.first_stage_layers=null"),
        ],
    )
    assert (config.optimizer.lr, config.optimizer.warmup) == (2e-6, 3)
    assert (config.run.overwrite, config.run.name) == (True, "a=b")
    assert config.algorithm.influence_clip is None
    assert tuple(config.optimizer.betas) == (0.9, 0.95)
    assert config.model.overrides == {"max_position_embeddings": 4096}


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("rollout.groupsize", "rollout.group_size"),
        ("trainer.max_step", "trainer.max_steps"),
        ("algorithm.halflife", "algorithm.half_life"),
        ("rollout.lr", "optimizer.lr"),  # the right name in the wrong section
        ("max_response_tokens", "rollout.max_response_tokens"),
        ("rollout.server.kv_cache_gib", "rollout.server.kv_cache_gb"),  # in a nested section
        ("rollout.tensor_parallel_size", "rollout.server.tensor_parallel_size"),  # not in it
    ],
)
@pytest.mark.parametrize("place", ["file", "override"])
def test_unknown_key_names_the_nearest(file: Path, key: str, nearest: str, place: str) -> None:
    """In the file or on the command line, in a known section or none."""
    overrides = [f"{key}=1"]
    if place == "file":
        content: Any = 1
        for part in reversed(key.split(".")):
            content = {part: content}
        file.write_text(yaml.safe_dump(content))
        overrides = []
    with pytest.raises(ValueError, match=rf"unknown config key '{key}'; did you mean '{nearest}'\?"):
        load_config(file, overrides)


def test_unknown_section_names_the_nearest(file: Path) -> None:
    """A section that does not exist is what the message is about, not the key in it."""
    with pytest.raises(ValueError, match=r"unknown config key 'paralel'; did you mean 'parallel'\?"):
        load_config(file, ["paralel.tensor=2"])


def test_unknown_key_like_no_other(file: Path) -> None:
    """Where nothing is near, the sections are named."""
    with pytest.raises(ValueError, match=r"unknown config key 'qqqq'; known sections: run, model, moe, parallel"):
        load_config(file, ["qqqq=1"])


@pytest.mark.parametrize(
    "override",
    [
        "trainer.max_steps=many",
        "trainer.max_steps=1.5",
        "optimizer.lr=fast",
        "run.overwrite=maybe",
        "algorithm.loss=ppo",
        "optimizer.betas=0.9",
        "algorithm.influence_clip=[1.0,high]",
        "algorithm.influence_clip=1.2",
        "algorithm.influence_clip=[{1.0: 2},1.2]",
        "eval.pass_k=[[1]]",
        "parallel=4",
        "rollout.server=4",
        "rollout.server.urls=[[a]]",
        "rollout.group_size=null",
        "model.dtype=float16",
    ],
)
def test_wrong_type_names_the_key(file: Path, override: str) -> None:
    """One line that starts with the key."""
    key = override.split("=")[0]
    with pytest.raises(ValueError, match=f"^{key}") as error:
        load_config(file, [override])
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("trainer.max_steps=many", "trainer.max_steps: expected integer >= 1, got 'many'"),
        ("algorithm.loss=ppo", "algorithm.loss: expected fipo or grpo, got 'ppo'"),
        ("trainer.mini_batch_order=random", "trainer.mini_batch_order: expected mixed or groups, got 'random'"),
        ("algorithm.influence=null", "algorithm.influence: expected fipo or placebo, got null"),
        ("optimizer.betas=[0.9]", "optimizer.betas: expected two numbers in [0, 1), got [0.9]"),
        ("rollout.server=4", "rollout.server: expected a mapping of settings, got 4"),
        ("run.name=null", "run.name: expected text, got null"),
        ("run.name=${a.b}", "run.name: Interpolation key 'a.b' not found"),
    ],
)
def test_wrong_type_says_what_is_allowed(file: Path, override: str, says: str) -> None:
    """The setting, its type and range, and the value."""
    with pytest.raises(ValueError, match=says.partition(":")[0]) as error:
        load_config(file, [override])
    assert str(error.value) == says


@pytest.mark.parametrize("override", ["optimizer.betas=[0.9]", "algorithm.influence_clip=[1.0,1.1,1.2]"])
def test_pairs_have_two_numbers(file: Path, override: str) -> None:
    """Neither one nor three."""
    with pytest.raises(ValueError, match=override.split("=")[0]):
        load_config(file, [override])


def test_list_in_place_of_a_section(file: Path) -> None:
    """One line that says so."""
    with pytest.raises(ValueError, match=r"cannot apply the overrides to .*config\.yaml: Cannot merge incompatible"):
        load_config(file, ["data=[]"])


@pytest.mark.parametrize("override", ["run.name", "run.name=${", "optimizer.betas=[0.9"])
def test_unreadable_override_is_named(file: Path, override: str) -> None:
    """Without a value, or with one that is no YAML, in one line."""
    with pytest.raises(ValueError, match="override") as error:
        load_config(file, ["run.seed=2", override])
    assert repr(override) in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("content", ["run: [1", "run:\n\t- a", "- 1\n- 2\n", "\x00"])
def test_unreadable_file_is_named(file: Path, content: str) -> None:
    """Broken YAML, or YAML that is no map of sections."""
    file.write_text(content)
    with pytest.raises(ValueError, match=r"config\.yaml"):
        load_config(file)


def test_empty_file(file: Path) -> None:
    """Lacks what must be set, and says so."""
    file.write_text("")
    assert refused(file) == ["model.hf_path must be set", "data.train must be set"]


@pytest.mark.parametrize("path", [None, *EXAMPLES], ids=lambda p: p.name if p else "all kinds of values")
def test_yaml_round_trip(path: Path | None, file: Path, tmp_path: Path) -> None:
    """The saved config of a run loads as the configuration it ran with."""
    overrides = ["algorithm.influence_clip=null", "model.overrides.max_position_embeddings=4096", "run.name='1'"]
    config = load_config(path) if path else load_config(file, overrides)
    saved = tmp_path / "saved.yaml"
    saved.write_text(to_yaml(config))
    assert load_config(saved) == config


def test_run_directory(file: Path) -> None:
    """`runs/NAME`, unless a directory is given."""
    assert load_config(file, ["run.name=x"]).run_directory == Path("runs/x")
    assert load_config(file, ["run.name=x", "run.directory=/there"]).run_directory == Path("/there")


def test_config_is_frozen() -> None:
    """Nothing changes it after it was checked."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().trainer.max_steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("given", "benchmarks"),
    [
        ("null", {}),
        ("d/v.parquet", {"v": "d/v.parquet"}),
        ("[d/v.parquet,d/aime-2024.parquet]", {"v": "d/v.parquet", "aime-2024": "d/aime-2024.parquet"}),
        ("{a: d/v.parquet, b: e/v.parquet}", {"a": "d/v.parquet", "b": "e/v.parquet"}),
    ],
)
def test_benchmarks(file: Path, given: str, benchmarks: dict[str, str]) -> None:
    """One file, several, or several with names; they survive being written and read."""
    config = load_config(file, [f"data.validation={given}"])
    assert config.data.benchmarks == benchmarks
    file.write_text(to_yaml(config))
    assert load_config(file) == config


@pytest.mark.parametrize(
    ("given", "expected"),
    [("on", "on"), ("off", "off"), ("auto", "auto"), ("'on'", "on"), ("true", "on"), ("false", "off")],
)
def test_a_switch_needs_no_quotes(file: Path, given: str, expected: str) -> None:
    """YAML reads a bare `on` as true, in a file and on the command line; the setting's own words work in both."""
    assert load_config(file, [f"model.transformer_engine={given}"]).model.transformer_engine == expected
    file.write_text(yaml.safe_dump(REQUIRED).replace("hf_path", f"transformer_engine: {given}\n  hf_path"))
    config = load_config(file)
    assert config.model.transformer_engine == expected
    file.write_text(to_yaml(config))
    assert load_config(file) == config


@pytest.mark.parametrize("text", ["${oc.env:SECRET}", "${oc.env:SECRET,x}", "a ${oc.decode:${oc.env:SECRET}}"])
def test_secrets_stay_out_of_configs(file: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A config is kept and shown: only variables that say who and where a run is can be read."""
    monkeypatch.setenv("SECRET", "hf_0123456789")
    for override in (f"run.name={text}", f"trainer.wandb_project={text}"):
        with pytest.raises(ValueError, match="'SECRET' is not available to configs") as error:
            load_config(file, [override])
        assert "hf_0123456789" not in str(error.value)
    file.write_text(file.read_text() + f"run: {{name: '{text}'}}\n")
    with pytest.raises(ValueError, match="'SECRET' is not available to configs"):
        load_config(file)


def test_places_in_configs(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job's number, a user's name and the like are read, with a default where they are not set."""
    monkeypatch.setenv("SLURM_JOB_ID", "1234")
    monkeypatch.delenv("SCRATCH", raising=False)
    config = load_config(file, ["run.name=x-${oc.env:SLURM_JOB_ID}", "run.directory=${oc.env:SCRATCH,/tmp}/x"])
    assert (config.run.name, config.run.directory) == ("x-1234", "/tmp/x")
    with pytest.raises(ValueError, match="SCRATCH is not set; give a default"):
        load_config(file, ["run.directory=${oc.env:SCRATCH}/x"])
