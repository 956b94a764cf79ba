"""Validation of a config without the model; messages show the arithmetic."""

from __future__ import annotations

import re
from operator import attrgetter
from pathlib import Path

from megatron_fipo.config.sections import Config, DataConfig, ParallelConfig, RolloutConfig

# None selects a default
_POSITIVE = (
    "rollout.temperature",
    "rollout.prompts_per_step",
    "rollout.max_response_tokens",
    "rollout.batch_size",
    "rollout.num_servers",
    "rollout.tensor_parallel",
    "rollout.gpus_per_node",
    "rollout.weight_bucket_mb",
    "rollout.deadline_seconds",
    "rollout.start_seconds",
    "rollout.max_concurrency",
    "rollout.kv_cache_gb",
    "rollout.importance_sampling_cap",
    "data.max_prompt_tokens",
    "trainer.max_steps",
    "trainer.mini_batch_prompts",
    "trainer.epochs_per_batch",
    "trainer.tokens_per_micro_batch",
    "model.lm_head_chunk_tokens",
    "optimizer.max_consecutive_skips",
    "optimizer.eps",
    "optimizer.spike_threshold",
    "parallel.timeout_minutes",
    "parallel.nccl_timeout_minutes",
    "parallel.threads_per_rank",
    "rollout.prompts_per_round",
    "eval.samples",
    "eval.max_problems",
    "reward.workers",
    "reward.timeout_seconds",
    "reward.batch_seconds",
    "checkpoint.keep_last",
)
# Zero is allowed
_NOT_NEGATIVE = (
    "rollout.top_k",
    "rollout.verify_weights",
    "rollout.settle_seconds",
    "rollout.max_rounds",
    "reward.overlong_buffer_tokens",
    "optimizer.lr",
    "optimizer.warmup",
    "optimizer.weight_decay",
    "optimizer.grad_clip",
    "eval.every",
    "eval.temperature",
    "algorithm.kl_coefficient",
    "checkpoint.every",
    "checkpoint.keep_every",
    "resume.max_requeues",
)


def validate(config: Config) -> None:
    """Raise one ValueError that lists all problems of `config`, with the arithmetic."""
    problems = [
        *_required(config),
        *_benchmarks(config.data),
        *layout_problems(config.parallel),
        *(_batch_sizes(config) if min(config.parallel.tensor, config.parallel.context) > 0 else []),
        *_ranges(config),
        *_servers(config),
        *_staleness(config.rollout),
        *_verification(config),
    ]
    if problems:
        raise ValueError("illegal configuration:\n" + "\n".join(f"  - {p}" for p in problems))


def _required(config: Config) -> list[str]:
    return [
        f"{name} must be set"
        for name, value in (("model.hf_path", config.model.hf_path), ("data.train", config.data.train))
        if not value
    ]


def _benchmarks(d: DataConfig) -> list[str]:
    """Return problems with names and files of data.validation; names become keys of metrics."""
    given = d.validation
    if given is None:
        return []
    files = list(given.values()) if isinstance(given, dict) else given if isinstance(given, list) else [given]
    if not all(isinstance(file, str) and file for file in files):
        return [f"data.validation = {given!r} is no file, no list of files and no mapping of names to files"]
    names = [str(name) for name in given] if isinstance(given, dict) else [Path(file).stem for file in files]
    problems = [
        f"data.validation: the name {name!r} has other characters than letters, digits, '.', '_' and '-'"
        for name in names
        if not re.fullmatch(r"[\w.-]+", name, re.ASCII)
    ]
    if len(set(names)) < len(names):
        problems.append(
            f"data.validation: two of {', '.join(files)} have the same name; give them names: {{name: file, ...}}"
        )
    return problems


def layout_problems(p: ParallelConfig) -> list[str]:
    """Return problems of a layout that do not depend on the model; [] if none."""
    sizes = {"tensor": p.tensor, "pipeline": p.pipeline, "context": p.context, "virtual_pipeline": p.virtual_pipeline}
    sizes["expert"] = p.expert
    problems = [
        f"parallel.{k} = {v} must be at least 1" for k, v in {**sizes, "world_size": p.world_size}.items() if v < 1
    ]
    if problems:
        return problems
    model_parallel = p.tensor * p.pipeline * p.context
    if p.world_size % model_parallel:
        below, above = (
            p.world_size // model_parallel * model_parallel,
            -(-p.world_size // model_parallel) * model_parallel,
        )
        nearest = f"{below} or {above}" if below else str(above)
        problems.append(
            f"tp {p.tensor} x pp {p.pipeline} x cp {p.context} = {model_parallel} does not divide the "
            f"{p.world_size} ranks; use {nearest} ranks, or another layout"
        )
    elif (p.world_size // p.pipeline) % p.expert:
        problems.append(
            f"parallel.expert {p.expert} does not divide the {p.world_size // p.pipeline} ranks of a pipeline stage "
            f"({p.world_size} ranks / pp {p.pipeline})"
        )
    if p.sequence and p.tensor == 1:
        problems.append("parallel.sequence needs parallel.tensor > 1")
    if p.virtual_pipeline > 1 and p.pipeline == 1:
        problems.append("parallel.virtual_pipeline > 1 needs parallel.pipeline > 1")
    uneven = p.first_stage_layers is not None or p.last_stage_layers is not None
    if uneven and p.pipeline == 1:
        problems.append("parallel.first_stage_layers and last_stage_layers need parallel.pipeline > 1")
    return problems


def _batch_sizes(c: Config) -> list[str]:
    problems = []
    if c.trainer.mini_batch_prompts > 0 and c.rollout.prompts_per_step % c.trainer.mini_batch_prompts:
        problems.append(
            f"rollout.prompts_per_step {c.rollout.prompts_per_step} is not a multiple of "
            f"trainer.mini_batch_prompts {c.trainer.mini_batch_prompts}"
        )
    if c.rollout.group_size < 2:
        problems.append(
            f"rollout.group_size {c.rollout.group_size}: a group-relative advantage needs at least 2 responses"
        )
    longest = c.data.max_prompt_tokens + c.rollout.max_response_tokens
    alignment = c.parallel.sequence_alignment
    padded = -(-longest // alignment) * alignment
    if padded > c.trainer.tokens_per_micro_batch:
        aligned = f" ({padded} after alignment to {alignment})" if padded > longest else ""
        problems.append(
            f"data.max_prompt_tokens {c.data.max_prompt_tokens} + rollout.max_response_tokens "
            f"{c.rollout.max_response_tokens} = {longest} tokens{aligned} do not fit trainer.tokens_per_micro_batch "
            f"{c.trainer.tokens_per_micro_batch}"
        )
    if c.reward.overlong_buffer_tokens >= c.rollout.max_response_tokens:
        problems.append(
            f"reward.overlong_buffer_tokens {c.reward.overlong_buffer_tokens} must be below "
            f"rollout.max_response_tokens {c.rollout.max_response_tokens}"
        )
    return problems


def _servers(c: Config) -> list[str]:
    """Return inconsistent settings of the vllm engine."""
    r = c.rollout
    problems = []
    if not 0 < r.gpu_memory_utilization <= 1:
        problems.append(f"rollout.gpu_memory_utilization = {r.gpu_memory_utilization} must be in (0, 1]")
    if r.engine != "vllm":
        return [*problems, *(["rollout.servers needs rollout.engine=vllm"] if r.servers else [])]
    if r.servers and (r.placement != "local" or r.num_servers is not None):
        problems.append(
            "rollout.servers run already: leave rollout.placement and rollout.num_servers at their defaults"
        )
    for url in r.servers:
        if not url.startswith(("http://", "https://", "unix:/")):
            problems.append(f"rollout.servers: {url!r} is not of the form http://host:port or unix:/path/of/a/socket")
    if r.nodes and r.placement != "disaggregated":
        problems.append("rollout.nodes needs rollout.placement=disaggregated")
    if r.placement == "disaggregated" and r.weight_transport == "file" and not r.weight_directory:
        problems.append(
            "rollout.weight_transport=file writes into this node's memory, which servers on other nodes cannot read: "
            "set rollout.weight_directory to a directory that all nodes share, or choose nccl or gloo"
        )
    if r.placement == "disaggregated" and r.tensor_parallel > 0 and r.gpus_per_node % r.tensor_parallel:
        problems.append(
            f"rollout.tensor_parallel {r.tensor_parallel} does not divide rollout.gpus_per_node {r.gpus_per_node}"
        )
    if r.weight_transport == "ipc" and r.placement != "colocated":
        problems.append("rollout.weight_transport=ipc works between processes on one GPU: rollout.placement=colocated")
    if r.weight_transport == "nccl" and r.placement == "colocated":
        problems.append("rollout.weight_transport=nccl cannot join a rank and a server on one GPU: choose ipc or file")
    if r.placement == "colocated" and not c.optimizer.offload_state:
        problems.append("rollout.placement=colocated needs optimizer.offload_state=true: ranks and servers take turns")
    return problems


def _verification(c: Config) -> list[str]:
    """Return problems with the time limit of a batch's verification, while other ranks wait in a collective."""
    seconds, limit = c.reward.batch_seconds + c.reward.timeout_seconds, 60 * c.parallel.timeout_minutes
    if c.reward.function != "math" or seconds < limit:
        return []
    return [
        f"reward.batch_seconds {c.reward.batch_seconds:g} + reward.timeout_seconds {c.reward.timeout_seconds:g} = "
        f"{seconds:g} s must be less than parallel.timeout_minutes {c.parallel.timeout_minutes:g} ({limit:g} s)"
    ]


def _staleness(r: RolloutConfig) -> list[str]:
    """Return inconsistent settings of batches that are generated ahead."""
    problems = []
    if r.max_staleness < 0:
        problems.append(f"rollout.max_staleness = {r.max_staleness} must not be negative")
    if r.engine == "hf" and (r.max_staleness > 0 or r.partial):
        problems.append(
            "rollout.max_staleness and rollout.partial need rollout.engine=vllm: the hf engine draws in the ranks "
            "themselves, which cannot train meanwhile"
        )
    if r.engine == "vllm" and r.surplus_groups == "keep":
        problems.append(
            "rollout.surplus_groups=keep is for the hf engine; with vllm rollout.partial keeps what is begun"
        )
    if r.max_staleness > 1 and not r.partial:
        problems.append(
            f"rollout.max_staleness = {r.max_staleness}: one batch is drawn ahead, so tokens are at most 1 step old; "
            "set it to 1, or set rollout.partial=true, which continues responses under newer weights"
        )
    if r.max_staleness > 0 and r.placement == "colocated" and not r.partial:
        problems.append(
            "rollout.placement=colocated cannot draw while it trains: rollout.max_staleness=0, or rollout.partial=true"
        )
    least = 2 if r.placement != "colocated" else 1
    if r.partial and r.max_staleness < least:
        problems.append(
            f"rollout.partial needs rollout.max_staleness >= {least} with rollout.placement={r.placement}, "
            f"not {r.max_staleness}: continued responses have tokens of older weights"
        )
    return problems


def _ranges(c: Config) -> list[str]:
    """Return values out of bounds; the loss's own are checked by `algorithm.FIPOLossConfig`."""
    # `not v > 0` also catches NaN.
    positive, not_negative = ([(name, attrgetter(name)(c)) for name in names] for names in (_POSITIVE, _NOT_NEGATIVE))
    problems = [f"{name} = {v} must be positive" for name, v in positive if v is not None and not v > 0]
    problems += [f"{name} = {v} must not be negative" for name, v in not_negative if not v >= 0]
    if c.optimizer.offload_state and not c.optimizer.distributed:
        problems.append("optimizer.offload_state needs optimizer.distributed, which owns the state that it moves")
    if not all(0 <= beta < 1 for beta in c.optimizer.betas):
        problems.append(f"optimizer.betas = {list(c.optimizer.betas)} must be in [0, 1)")
    wrong = [j for j in c.eval.pass_k or () if not 1 <= j <= c.eval.samples]
    if wrong:
        problems.append(f"eval.pass_k: {wrong} must be between 1 and eval.samples = {c.eval.samples}")
    for name, p in (("rollout.top_p", c.rollout.top_p), ("eval.top_p", c.eval.top_p)):
        if not 0 < p <= 1:
            problems.append(f"{name} = {p} must be in (0, 1]")
    return problems
