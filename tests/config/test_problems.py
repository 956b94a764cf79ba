"""Rules of validation: what is refused, with its arithmetic and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megatron_fipo.config import Config, load_config, validate
from tests.config.refusals import refused


def test_layout_arithmetic(file: Path) -> None:
    """The product, the ranks, and the nearest numbers of ranks that would do."""
    layout = ["parallel.tensor=4", "parallel.pipeline=2", "parallel.context=2"]
    assert refused(file, *layout, "parallel.world_size=24") == [
        "tp 4 x pp 2 x cp 2 = 16 does not divide the 24 ranks; use 16 or 32 ranks, or another layout"
    ]
    assert refused(file, *layout, "parallel.world_size=8") == [
        "tp 4 x pp 2 x cp 2 = 16 does not divide the 8 ranks; use 16 ranks, or another layout"
    ]
    assert load_config(file, [*layout, "parallel.world_size=48"]).parallel.data == 3


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["parallel.tensor=0"], "parallel.tensor = 0 must be at least 1"),
        (["parallel.world_size=-1"], "parallel.world_size = -1 must be at least 1"),
        (["parallel.sequence=true"], "parallel.sequence=true requires parallel.tensor > 1"),
        (["parallel.virtual_pipeline=2"], "parallel.virtual_pipeline > 1 requires parallel.pipeline > 1"),
        (
            [
                *("parallel.sequence_chunks=4", "parallel.virtual_pipeline=2", "parallel.pipeline=2"),
                "parallel.world_size=2",
            ],
            "parallel.sequence_chunks 4 cannot be combined with parallel.virtual_pipeline 2: set one of them to 1",
        ),
        (
            ["parallel.sequence_chunks=4", "parallel.context=2", "parallel.world_size=2"],
            "parallel.sequence_chunks 4 cannot be combined with parallel.context 2, whose ranks hold a piece from each "
            "end of a sequence: set one of them to 1",
        ),
        (
            ["parallel.last_stage_layers=2"],
            "parallel.first_stage_layers and last_stage_layers require parallel.pipeline > 1",
        ),
        (
            [
                *("parallel.pipeline=2", "parallel.world_size=2", "parallel.first_stage_layers=2"),
                "parallel.pipeline_layout=Et*2|t*2L",
            ],
            "parallel.pipeline_layout has the layers of every stage: set first_stage_layers and last_stage_layers to "
            "null",
        ),
    ],
)
def test_layout_that_contradicts_itself(file: Path, overrides: list[str], says: str) -> None:
    """Each parallel axis constrains others."""
    assert refused(file, *overrides) == [says]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ["rollout.prompts_per_step=100"],
            "rollout.prompts_per_step 100 must be a multiple of trainer.mini_batch_prompts 64",
        ),
        (["rollout.group_size=1"], "rollout.group_size = 1 must be at least 2"),
        (
            ["trainer.tokens_per_micro_batch=22527"],
            "data.max_prompt_tokens 2048 + rollout.max_response_tokens 20480 = 22528 tokens do not fit "
            "trainer.tokens_per_micro_batch 22527; raise it, or lower the lengths",
        ),
        (
            ["reward.overlong_buffer_tokens=20480"],
            "reward.overlong_buffer_tokens 20480 must be less than rollout.max_response_tokens 20480",
        ),
        (["rollout.top_p=0"], "rollout.top_p = 0.0 must be greater than 0 and at most 1"),
        (["eval.top_p=1.5"], "eval.top_p = 1.5 must be greater than 0 and at most 1"),
        (["rollout.temperature=0"], "rollout.temperature = 0.0 must be greater than 0"),
        (["optimizer.lr=-1e-6"], "optimizer.lr = -1e-06 must be at least 0"),
        (["trainer.mini_batch_prompts=0"], "trainer.mini_batch_prompts = 0 must be at least 1"),
        (
            ["algorithm.influence=placebo", "algorithm.loss=grpo"],
            "algorithm.influence=placebo requires algorithm.loss=fipo, whose weights it permutes, not grpo",
        ),
    ],
)
def test_illegal_value_shows_its_arithmetic(file: Path, overrides: list[str], says: str) -> None:
    """One problem, one line."""
    assert refused(file, *overrides) == [says]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["rollout.max_staleness=1"], "require rollout.engine=vllm: the hf engine generates in the ranks themselves"),
        (["rollout.engine=vllm", "rollout.max_staleness=2"], "max_staleness = 2: one batch is generated ahead"),
        (["rollout.engine=vllm", "rollout.max_staleness=-1"], "max_staleness = -1 must be at least 0"),
        (
            ["rollout.engine=vllm", "rollout.partial=true"],
            "rollout.max_staleness >= 2 with rollout.server.placement=local, not 0",
        ),
        (
            ["rollout.engine=vllm", "rollout.partial=true", "rollout.max_staleness=1"],
            "rollout.max_staleness >= 2 with rollout.server.placement=local, not 1",
        ),
        (
            ["rollout.engine=vllm", "rollout.surplus_groups=keep"],
            "rollout.surplus_groups=keep requires rollout.engine=hf",
        ),
        (
            [
                *("rollout.engine=vllm", "rollout.server.placement=colocated", "optimizer.offload_state=true"),
                "rollout.max_staleness=1",
            ],
            "rollout.server.placement=colocated cannot generate while it trains",
        ),
    ],
)
def test_staleness_that_cannot_be(file: Path, overrides: list[str], says: str) -> None:
    """Settings that an engine, a placement or prefetching does not allow are refused with a way out."""
    (problem,) = refused(file, *overrides)
    assert says in problem


@pytest.mark.parametrize(
    ("overrides", "overlaps", "level"),
    [
        ([], False, "none"),
        (["rollout.max_staleness=1"], True, "token"),
        (["rollout.max_staleness=1", "rollout.correction.importance_sampling=sequence"], True, "sequence"),
        (["rollout.max_staleness=2", "rollout.partial=true"], True, "token"),
        (
            [
                *("rollout.max_staleness=1", "rollout.partial=true", "rollout.server.placement=colocated"),
                "optimizer.offload_state=true",
            ],
            False,
            "token",
        ),
    ],
)
def test_staleness(file: Path, overrides: list[str], overlaps: bool, level: str) -> None:
    """Batches are generated during training unless ranks and servers take turns; older weights are corrected for by
    default."""
    rollout = load_config(file, ["rollout.engine=vllm", *overrides]).rollout
    assert (rollout.overlaps, rollout.importance_sampling_level) == (overlaps, level)


@pytest.mark.parametrize(
    "override",
    [
        *("rollout.prompts_per_round=0", "parallel.threads_per_rank=0", "parallel.timeout_minutes=0"),
        "parallel.nccl_timeout_minutes=0",
        *(
            "optimizer.lr=.nan",
            "optimizer.lr=.inf",
            "run.seed=-1",
            "eval.max_problems=0",
            "optimizer.eps=-1",
            "optimizer.betas=[0.9,1.0]",
        ),
    ],
)
def test_illegal_value_is_named(file: Path, override: str) -> None:
    """Values that would only fail, or do harm, once the ranks run."""
    (problem,) = refused(file, override)
    assert problem.startswith(override.split("=")[0])


def test_verification_ends_before_the_collective(file: Path) -> None:
    """The other ranks wait in a collective for a replica that verifies; only the `math` verifier takes time."""
    limits = ["reward.batch_seconds=55", "parallel.timeout_minutes=1"]
    load_config(file, limits)
    load_config(file, [*limits, "reward.function=math", "reward.timeout_seconds=4"])
    (problem,) = refused(file, *limits, "reward.function=math", "reward.timeout_seconds=5")
    assert problem == (
        "reward.batch_seconds 55 + reward.timeout_seconds 5 = 60 s must be less than parallel.timeout_minutes 1 (60 s)"
    )


def test_micro_batch_holds_the_longest_sequence_after_alignment(file: Path) -> None:
    """With context parallelism the longest sequence is padded, and it is the padded one that must fit."""
    lengths = ["data.max_prompt_tokens=10", "rollout.max_response_tokens=20", "reward.overlong_buffer_tokens=0"]
    context = ["parallel.context=8", "parallel.world_size=8"]
    load_config(file, [*lengths, *context, "trainer.tokens_per_micro_batch=32"])
    load_config(file, [*lengths, "trainer.tokens_per_micro_batch=30"])
    (problem,) = refused(file, *lengths, *context, "trainer.tokens_per_micro_batch=30")
    assert "32" in problem
    assert "trainer.tokens_per_micro_batch 30" in problem


def test_all_problems_are_listed_at_once(file: Path) -> None:
    """Problems come in this order: settings that must be set, values out of range, contradictions."""
    file.write_text(
        yaml.safe_dump(
            {
                "parallel": {"tensor": 3, "world_size": 4},
                "rollout": {"group_size": 1, "temperature": -1.0},
                "eval": {"top_p": 0.0},
            }
        )
    )
    assert [p.split()[0] for p in refused(file)] == [
        *("model.hf_path", "data.train", "rollout.group_size", "rollout.temperature", "eval.top_p", "tp")
    ]


def test_updates_per_step(file: Path) -> None:
    """Mini-batches of a step times the passes over them."""
    sizes = ["rollout.prompts_per_step=32", "trainer.mini_batch_prompts=8", "trainer.epochs_per_batch=3"]
    assert load_config(file, sizes).updates_per_step == 12


def test_validate_is_what_load_config_calls() -> None:
    """A Config made in Python is checked the same way."""
    with pytest.raises(ValueError, match=r"model\.hf_path must be set"):
        validate(Config())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["urls=['a:1']"], "rollout.server.urls: 'a:1' must have the form http://host:port"),
        (
            ["urls=['http://a:1']", "count=2"],
            "leave rollout.server.placement and rollout.server.count at their defaults",
        ),
        (
            ["placement=disaggregated", "weight_transport=file"],
            "rollout.server.weight_transport=file writes into this node's memory",
        ),
        (["nodes=[n1]"], "rollout.server.nodes requires rollout.server.placement=disaggregated"),
        (
            ["placement=disaggregated", "nodes=[n1]", "tensor_parallel_size=3"],
            "rollout.server.tensor_parallel_size 3 does not divide rollout.server.gpus_per_node 8",
        ),
        (["weight_transport=ipc"], "rollout.server.weight_transport=ipc requires rollout.server.placement=colocated"),
        (["placement=colocated", "weight_transport=nccl"], "nccl cannot connect a rank and a server on one GPU"),
        (["placement=colocated"], "rollout.server.placement=colocated requires optimizer.offload_state=true"),
        (["gpu_memory_utilization=1.5"], "rollout.server.gpu_memory_utilization = 1.5 must be greater than 0 and at"),
        (["weight_bucket_mb=0"], "rollout.server.weight_bucket_mb = 0 must be at least 1"),
        (["verify_weights=-1"], "rollout.server.verify_weights = -1 must be at least 0"),
    ],
)
def test_rollout_servers(file: Path, overrides: list[str], message: str) -> None:
    """Server settings that do not fit together are refused, and the message says what to change."""
    problems = refused(file, "rollout.engine=vllm", *(f"rollout.server.{o}" for o in overrides))
    assert any(message in problem for problem in problems)


def test_experts_come_from_the_cache_of_prefixes(file: Path) -> None:
    """vLLM returns them from nowhere else."""
    without = ("rollout.server.enable_prefix_caching=false", "moe.routing_replay=rollout")
    (problem,) = refused(file, "rollout.engine=vllm", *without)
    assert problem.startswith("moe.routing_replay=rollout requires rollout.server.enable_prefix_caching=true")


def test_urls_need_the_vllm_engine(file: Path) -> None:
    """With the hf engine nothing would ask the servers."""
    problems = refused(file, "rollout.server.urls=['http://a:1']")
    assert problems == ["rollout.server.urls requires rollout.engine=vllm"]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data.validation=[a/v.parquet,b/v.parquet]", "two of a/v.parquet, b/v.parquet have the same name"),
        ("data.validation={a/b: v.parquet}", "the name 'a/b' must consist of letters"),
        ("data.validation=3", "data.validation = 3 must be a file, a list of files or a mapping of names to files"),
        ("data.validation=[3]", "must be a file, a list of files or a mapping"),
        ("data.validation={a: {b: c}}", "must be a file, a list of files or a mapping"),
        ("eval.pass_k=[64]", "eval.pass_k: [64] must be at most eval.samples = 32"),
        ("eval.pass_k=[0,4]", "eval.pass_k = [0, 4] must each be at least 1"),
    ],
)
def test_illegal_benchmarks(file: Path, override: str, says: str) -> None:
    """Each refused with what is wrong about it."""
    (problem,) = refused(file, override)
    assert says in problem


TWO = "data.validation={a: v.parquet, b: w.parquet}"


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ([], "checkpoint.best_on = 'b' must be the name of a benchmark, but data.validation is not set"),
        (["data.validation=[x/v.parquet, w.parquet]"], "must be the name of a benchmark, but data.validation has v, w"),
        (["data.validation={b: v.parquet}"], "checkpoint.best_on = 'b' is the only benchmark of data.validation"),
        ([TWO, "checkpoint.keep_best=false"], "checkpoint.best_on = 'b' requires checkpoint.keep_best=true"),
    ],
)
def test_selection_that_cannot_be(file: Path, overrides: list[str], says: str) -> None:
    """The best checkpoint is selected on a benchmark that there is, beside one that is reported."""
    (problem,) = refused(file, *overrides, "checkpoint.best_on=b")
    assert says in problem
    assert load_config(file, [TWO, "checkpoint.best_on=b"]).checkpoint.best_on == "b"


def test_servers_on_this_machine(file: Path) -> None:
    """They may be named by the path of their Unix socket, from the root."""
    config = load_config(file, ["rollout.engine=vllm", "rollout.server.urls=['unix:/run/x/socket']"])
    assert config.rollout.server.urls == ("unix:/run/x/socket",)
    (problem,) = refused(file, "rollout.engine=vllm", "rollout.server.urls=['unix:socket']")
    assert problem.endswith("must have the form http://host:port or unix:/path/of/a/socket")


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["algorithm.half_life=0"], "algorithm.half_life = 0.0 must be greater than 0"),
        (["algorithm.dual_clip=1.2"], "algorithm.dual_clip = 1.2 must be greater than 1 + clip_ratio_high = 1.28"),
        (["algorithm.influence_clip=[1.2,1]"], "algorithm.influence_clip = [1.2, 1.0] must be [low, high]"),
        (["algorithm.log_ratio_clamp=2"], "algorithm.log_ratio_clamp = 2.0 must be greater than ln(dual_clip) = 2.303"),
    ],
)
def test_loss_that_is_not_defined(file: Path, overrides: list[str], says: str) -> None:
    """Is found when the config is read, by the rules of the loss."""
    (problem,) = refused(file, *overrides)
    assert problem.startswith(says)


@pytest.mark.parametrize("override", ["rollout.correction.importance_sampling_cap=.inf", "algorithm.loss=grpo"])
def test_legal_extremes(file: Path, override: str) -> None:
    """No truncation of importance weights is an infinite cap."""
    load_config(file, [override])
