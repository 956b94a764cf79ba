"""Reading, checking and writing the configuration."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_fipo.config import Config, load_config, to_yaml, validate

REQUIRED = {"model": {"hf_path": "model"}, "data": {"train": "train.parquet"}}
EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.yaml"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A config that sets only what must be set."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(REQUIRED))
    return path


def _problems(error: pytest.ExceptionInfo[ValueError]) -> list[str]:
    first, *problems = str(error.value).splitlines()
    assert first == "illegal configuration:"
    return [p.removeprefix("  - ") for p in problems]


def _refused(file: Path, *overrides: str) -> list[str]:
    with pytest.raises(ValueError, match="illegal configuration") as error:
        load_config(file, overrides)
    return _problems(error)


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
    with pytest.raises(ValueError, match=r"unknown config key 'qqqq'; known sections: run, model, parallel"):
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
        "model.dtype=float16",
    ],
)
def test_wrong_type_names_the_key(file: Path, override: str) -> None:
    """One line that starts with the key."""
    key = override.split("=")[0]
    with pytest.raises(ValueError, match=f"^{key}") as error:
        load_config(file, [override])
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("override", ["optimizer.betas=[0.9]", "algorithm.influence_clip=[1.0,1.1,1.2]"])
def test_pairs_have_two_numbers(file: Path, override: str) -> None:
    """Neither one nor three."""
    with pytest.raises(ValueError, match=override.split("=")[0]):
        load_config(file, [override])


@pytest.mark.parametrize("content", ["run: [1", "run:\n\t- a", "- 1\n- 2\n", "\x00"])
def test_unreadable_file_is_named(file: Path, content: str) -> None:
    """Broken YAML, or YAML that is no map of sections."""
    file.write_text(content)
    with pytest.raises(ValueError, match=r"config\.yaml"):
        load_config(file)


def test_empty_file(file: Path) -> None:
    """Lacks what must be set, and says so."""
    file.write_text("")
    assert _refused(file) == ["model.hf_path must be set", "data.train must be set"]


def test_layout_arithmetic(file: Path) -> None:
    """The product, the ranks, and the nearest numbers of ranks that would do."""
    layout = ["parallel.tensor=4", "parallel.pipeline=2", "parallel.context=2"]
    assert _refused(file, *layout, "parallel.world_size=24") == [
        "tp 4 x pp 2 x cp 2 = 16 does not divide the 24 ranks; use 16 or 32 ranks, or another layout"
    ]
    assert _refused(file, *layout, "parallel.world_size=8") == [
        "tp 4 x pp 2 x cp 2 = 16 does not divide the 8 ranks; use 16 ranks, or another layout"
    ]
    assert load_config(file, [*layout, "parallel.world_size=48"]).parallel.data == 3


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["parallel.tensor=0"], "parallel.tensor = 0 must be at least 1"),
        (["parallel.world_size=-1"], "parallel.world_size = -1 must be at least 1"),
        (["parallel.sequence=true"], "parallel.sequence needs parallel.tensor > 1"),
        (["parallel.virtual_pipeline=2"], "parallel.virtual_pipeline > 1 needs parallel.pipeline > 1"),
        (
            ["parallel.last_stage_layers=2"],
            "parallel.first_stage_layers and last_stage_layers need parallel.pipeline > 1",
        ),
    ],
)
def test_layout_that_contradicts_itself(file: Path, overrides: list[str], says: str) -> None:
    """What one axis demands of another."""
    assert _refused(file, *overrides) == [says]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ["rollout.prompts_per_step=100"],
            "rollout.prompts_per_step 100 is not a multiple of trainer.mini_batch_prompts 64",
        ),
        (["rollout.group_size=1"], "rollout.group_size 1: a group-relative advantage needs at least 2 responses"),
        (
            ["trainer.tokens_per_micro_batch=22527"],
            "data.max_prompt_tokens 2048 + rollout.max_response_tokens 20480 = 22528 tokens do not fit "
            "trainer.tokens_per_micro_batch 22527",
        ),
        (
            ["reward.overlong_buffer_tokens=20480"],
            "reward.overlong_buffer_tokens 20480 must be below rollout.max_response_tokens 20480",
        ),
        (["rollout.top_p=0"], "rollout.top_p = 0.0 must be in (0, 1]"),
        (["eval.top_p=1.5"], "eval.top_p = 1.5 must be in (0, 1]"),
        (["rollout.temperature=0"], "rollout.temperature = 0.0 must be positive"),
        (["optimizer.lr=-1e-6"], "optimizer.lr = -1e-06 must not be negative"),
        (["trainer.mini_batch_prompts=0"], "trainer.mini_batch_prompts = 0 must be positive"),
    ],
)
def test_illegal_value_shows_its_arithmetic(file: Path, overrides: list[str], says: str) -> None:
    """One problem, one line."""
    assert _refused(file, *overrides) == [says]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["rollout.max_staleness=1"], "need rollout.engine=vllm: the hf engine draws in the ranks themselves"),
        (["rollout.engine=vllm", "rollout.max_staleness=2"], "max_staleness = 2: one batch is drawn ahead"),
        (["rollout.engine=vllm", "rollout.max_staleness=-1"], "max_staleness = -1 must not be negative"),
        (
            ["rollout.engine=vllm", "rollout.partial=true"],
            "rollout.max_staleness >= 2 with rollout.placement=local, not 0",
        ),
        (
            ["rollout.engine=vllm", "rollout.partial=true", "rollout.max_staleness=1"],
            "rollout.max_staleness >= 2 with rollout.placement=local, not 1",
        ),
        (["rollout.engine=vllm", "rollout.surplus_groups=keep"], "rollout.surplus_groups=keep is for the hf engine"),
        (
            [
                *("rollout.engine=vllm", "rollout.placement=colocated", "optimizer.offload_state=true"),
                "rollout.max_staleness=1",
            ],
            "rollout.placement=colocated cannot draw while it trains",
        ),
    ],
)
def test_staleness_that_cannot_be(file: Path, overrides: list[str], says: str) -> None:
    """What an engine, a placement or the scheme of one batch ahead does not allow is refused with a way out."""
    (problem,) = _refused(file, *overrides)
    assert says in problem


@pytest.mark.parametrize(
    ("overrides", "overlaps", "level"),
    [
        ([], False, "none"),
        (["rollout.max_staleness=1"], True, "token"),
        (["rollout.max_staleness=1", "rollout.importance_sampling=sequence"], True, "sequence"),
        (["rollout.max_staleness=2", "rollout.partial=true"], True, "token"),
        (
            [
                *("rollout.max_staleness=1", "rollout.partial=true", "rollout.placement=colocated"),
                "optimizer.offload_state=true",
            ],
            False,
            "token",
        ),
    ],
)
def test_staleness(file: Path, overrides: list[str], overlaps: bool, level: str) -> None:
    """Batches are drawn during training unless ranks and servers take turns; older weights are corrected for by
    default."""
    rollout = load_config(file, ["rollout.engine=vllm", *overrides]).rollout
    assert (rollout.overlaps, rollout.importance_sampling_level) == (overlaps, level)


@pytest.mark.parametrize(
    "override",
    [
        *("rollout.prompts_per_round=0", "parallel.threads_per_rank=0", "parallel.timeout_minutes=0"),
        "parallel.nccl_timeout_minutes=0",
        *("optimizer.lr=nan", "eval.max_problems=0", "optimizer.eps=-1", "optimizer.betas=[0.9,1.0]"),
    ],
)
def test_illegal_value_is_named(file: Path, override: str) -> None:
    """Values that would only fail, or do harm, once the ranks run."""
    (problem,) = _refused(file, override)
    assert problem.startswith(override.split("=")[0])


def test_verification_ends_before_the_collective(file: Path) -> None:
    """The other ranks wait in a collective for a replica that verifies; only the `math` verifier takes time."""
    limits = ["reward.batch_seconds=55", "parallel.timeout_minutes=1"]
    load_config(file, limits)
    load_config(file, [*limits, "reward.function=math", "reward.timeout_seconds=4"])
    (problem,) = _refused(file, *limits, "reward.function=math", "reward.timeout_seconds=5")
    assert problem == (
        "reward.batch_seconds 55 + reward.timeout_seconds 5 = 60 s must be less than parallel.timeout_minutes 1 (60 s)"
    )


def test_micro_batch_holds_the_longest_sequence_after_alignment(file: Path) -> None:
    """With context parallelism the longest sequence is padded, and it is the padded one that must fit."""
    lengths = ["data.max_prompt_tokens=10", "rollout.max_response_tokens=20", "reward.overlong_buffer_tokens=0"]
    context = ["parallel.context=8", "parallel.world_size=8"]
    load_config(file, [*lengths, *context, "trainer.tokens_per_micro_batch=32"])
    load_config(file, [*lengths, "trainer.tokens_per_micro_batch=30"])
    (problem,) = _refused(file, *lengths, *context, "trainer.tokens_per_micro_batch=30")
    assert "32" in problem
    assert "trainer.tokens_per_micro_batch 30" in problem


def test_all_problems_are_listed_at_once(file: Path) -> None:
    """Of every kind, in the order of the sections that check them."""
    file.write_text(
        yaml.safe_dump(
            {
                "parallel": {"tensor": 3, "world_size": 4},
                "rollout": {"group_size": 1, "temperature": -1.0},
                "eval": {"top_p": 0.0},
            }
        )
    )
    assert [p.split()[0] for p in _refused(file)] == [
        *("model.hf_path", "data.train", "tp", "rollout.group_size", "rollout.temperature", "eval.top_p")
    ]


@pytest.mark.parametrize("path", [None, *EXAMPLES], ids=lambda p: p.name if p else "all kinds of values")
def test_yaml_round_trip(path: Path | None, file: Path, tmp_path: Path) -> None:
    """What a run saves loads as the configuration it ran with."""
    overrides = ["algorithm.influence_clip=null", "model.overrides.max_position_embeddings=4096", "run.name='1'"]
    config = load_config(path) if path else load_config(file, overrides)
    saved = tmp_path / "saved.yaml"
    saved.write_text(to_yaml(config))
    assert load_config(saved) == config


def test_updates_per_step(file: Path) -> None:
    """Mini-batches of a step times the passes over them."""
    sizes = ["rollout.prompts_per_step=32", "trainer.mini_batch_prompts=8", "trainer.epochs_per_batch=3"]
    assert load_config(file, sizes).updates_per_step == 12


def test_run_directory(file: Path) -> None:
    """`runs/NAME`, unless a directory is given."""
    assert load_config(file, ["run.name=x"]).run_directory == Path("runs/x")
    assert load_config(file, ["run.name=x", "run.directory=/there"]).run_directory == Path("/there")


def test_config_is_frozen() -> None:
    """Nothing changes it after it was checked."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().trainer.max_steps = 3  # type: ignore[misc]


def test_validate_is_what_load_config_calls() -> None:
    """A Config made in Python is checked the same way."""
    with pytest.raises(ValueError, match=r"model\.hf_path must be set"):
        validate(Config())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["servers=['http://a:1']", "engine=hf"], "rollout.servers needs rollout.engine=vllm"),
        (["servers=['a:1']"], "rollout.servers: 'a:1' is not of the form http://host:port"),
        (
            ["servers=['http://a:1']", "num_servers=2"],
            "leave rollout.placement and rollout.num_servers at their defaults",
        ),
        (
            ["placement=disaggregated", "weight_transport=file"],
            "rollout.weight_transport=file writes into this node's memory",
        ),
        (["nodes=[n1]"], "rollout.nodes needs rollout.placement=disaggregated"),
        (
            ["placement=disaggregated", "nodes=[n1]", "tensor_parallel=3"],
            "rollout.tensor_parallel 3 does not divide rollout.gpus_per_node 8",
        ),
        (["weight_transport=ipc"], "rollout.weight_transport=ipc works between processes on one GPU"),
        (["placement=colocated", "weight_transport=nccl"], "nccl cannot join a rank and a server on one GPU"),
        (["placement=colocated"], "rollout.placement=colocated needs optimizer.offload_state=true"),
        (["gpu_memory_utilization=1.5"], "rollout.gpu_memory_utilization = 1.5 must be in (0, 1]"),
        (["weight_bucket_mb=0"], "rollout.weight_bucket_mb = 0 must be positive"),
        (["verify_weights=-1"], "rollout.verify_weights = -1 must not be negative"),
    ],
)
def test_rollout_servers(file: Path, overrides: list[str], message: str) -> None:
    """What does not fit together about servers is refused, and says what to change."""
    problems = _refused(file, "rollout.engine=vllm", *(f"rollout.{o}" for o in overrides))
    assert any(message in problem for problem in problems)


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
    ("override", "says"),
    [
        ("data.validation=[a/v.parquet,b/v.parquet]", "two of a/v.parquet, b/v.parquet have the same name"),
        ("data.validation={a/b: v.parquet}", "the name 'a/b' has other characters"),
        ("data.validation=3", "data.validation = 3 is no file"),
        ("data.validation=[3]", "is no file, no list of files and no mapping"),
        ("data.validation={a: {b: c}}", "is no file, no list of files and no mapping"),
        ("eval.pass_k=[64]", r"eval.pass_k: [64] must be between 1 and eval.samples = 32"),
        ("eval.pass_k=[0,4]", r"eval.pass_k: [0] must be"),
    ],
)
def test_illegal_benchmarks(file: Path, override: str, says: str) -> None:
    """Each refused with what is wrong about it."""
    (problem,) = _refused(file, override)
    assert says in problem


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


def test_servers_on_this_machine(file: Path) -> None:
    """They may be named by the path of their Unix socket, from the root."""
    config = load_config(file, ["rollout.engine=vllm", "rollout.servers=['unix:/run/x/socket']"])
    assert config.rollout.servers == ("unix:/run/x/socket",)
    (problem,) = _refused(file, "rollout.engine=vllm", "rollout.servers=['unix:socket']")
    assert problem.endswith("is not of the form http://host:port or unix:/path/of/a/socket")
