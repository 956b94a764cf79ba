"""Validation of a config without the model; messages show the arithmetic.

Ranges of single values are stated at their fields; here are the rules that settings have with each other.
"""

from __future__ import annotations

import re
from pathlib import Path

from megatron_fipo.config.loss import loss_problems
from megatron_fipo.config.rollout import RolloutConfig
from megatron_fipo.config.sections import Config, DataConfig, ParallelConfig
from megatron_fipo.config.setting import range_problems


def validate(config: Config) -> None:
    """Raise one ValueError that lists all problems of `config`, with the arithmetic."""
    ranges = range_problems(config)
    problems = [*_required(config), *ranges, *_benchmarks(config.data)]
    rest = [
        *layout_problems(config.parallel),
        *_batch_sizes(config),
        *_optimizer(config),
        *_pass_k(config),
        *_best_on(config),
        *loss_problems(config.algorithm, "algorithm."),
        *_influence(config),
        *_servers(config),
        *_staleness(config.rollout),
        *_verification(config),
    ]
    problems += [problem for problem in rest if problem not in ranges]
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
        return [f"data.validation = {given!r} must be a file, a list of files or a mapping of names to files"]
    names = [str(name) for name in given] if isinstance(given, dict) else [Path(file).stem for file in files]
    problems = [
        f"data.validation: the name {name!r} must consist of letters, digits, '.', '_' and '-'"
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
    problems = range_problems(p, "parallel.")
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
        problems.append("parallel.sequence=true requires parallel.tensor > 1")
    if p.virtual_pipeline > 1 and p.pipeline == 1:
        problems.append("parallel.virtual_pipeline > 1 requires parallel.pipeline > 1")
    if p.sequence_chunks > 1 and p.virtual_pipeline > 1:
        problems.append(
            f"parallel.sequence_chunks {p.sequence_chunks} cannot be combined with parallel.virtual_pipeline "
            f"{p.virtual_pipeline}: set one of them to 1"
        )
    if p.sequence_chunks > 1 and p.context > 1:
        problems.append(
            f"parallel.sequence_chunks {p.sequence_chunks} cannot be combined with parallel.context {p.context}, whose "
            "ranks hold a piece from each end of a sequence: set one of them to 1"
        )
    uneven = p.first_stage_layers is not None or p.last_stage_layers is not None
    if uneven and p.pipeline == 1:
        problems.append("parallel.first_stage_layers and last_stage_layers require parallel.pipeline > 1")
    if uneven and p.pipeline_layout is not None:
        problems.append(
            "parallel.pipeline_layout has the layers of every stage: set first_stage_layers and last_stage_layers to "
            "null"
        )
    return problems


def _batch_sizes(c: Config) -> list[str]:
    problems = []
    if c.trainer.mini_batch_prompts > 0 and c.rollout.prompts_per_step % c.trainer.mini_batch_prompts:
        problems.append(
            f"rollout.prompts_per_step {c.rollout.prompts_per_step} must be a multiple of "
            f"trainer.mini_batch_prompts {c.trainer.mini_batch_prompts}"
        )
    longest = c.data.max_prompt_tokens + c.rollout.max_response_tokens
    alignment = max(1, c.parallel.sequence_alignment)
    padded = -(-longest // alignment) * alignment
    if padded > c.trainer.tokens_per_micro_batch:
        aligned = f" ({padded} after alignment to {alignment})" if padded > longest else ""
        problems.append(
            f"data.max_prompt_tokens {c.data.max_prompt_tokens} + rollout.max_response_tokens "
            f"{c.rollout.max_response_tokens} = {longest} tokens{aligned} do not fit trainer.tokens_per_micro_batch "
            f"{c.trainer.tokens_per_micro_batch}; raise it, or lower the lengths"
        )
    if c.reward.overlong_buffer_tokens >= c.rollout.max_response_tokens:
        problems.append(
            f"reward.overlong_buffer_tokens {c.reward.overlong_buffer_tokens} must be less than "
            f"rollout.max_response_tokens {c.rollout.max_response_tokens}"
        )
    return problems


def _optimizer(c: Config) -> list[str]:
    if c.optimizer.offload_state and not c.optimizer.distributed:
        return ["optimizer.offload_state=true requires optimizer.distributed=true, which owns the state that it moves"]
    return []


def _influence(c: Config) -> list[str]:
    if c.algorithm.influence == "placebo" and c.algorithm.loss != "fipo":
        return [
            f"algorithm.influence=placebo requires algorithm.loss=fipo, whose weights it permutes, not "
            f"{c.algorithm.loss}"
        ]
    return []


def _pass_k(c: Config) -> list[str]:
    above = [j for j in c.eval.pass_k or () if j > c.eval.samples]
    return [f"eval.pass_k: {above} must be at most eval.samples = {c.eval.samples}"] if above else []


def _best_on(c: Config) -> list[str]:
    """Return why the best checkpoint cannot be selected on checkpoint.best_on."""
    name = c.checkpoint.best_on
    if name is None or _benchmarks(c.data):
        return []
    names = [str(benchmark) for benchmark in c.data.benchmarks]
    if name not in names:
        there = f"has {', '.join(names)}" if names else "is not set"
        return [f"checkpoint.best_on = {name!r} must be the name of a benchmark, but data.validation {there}"]
    if len(names) == 1:
        return [
            f"checkpoint.best_on = {name!r} is the only benchmark of data.validation, and would leave none to report: "
            "add another, {name: file, name: file}, or set checkpoint.best_on=null"
        ]
    if not c.checkpoint.keep_best:
        return [f"checkpoint.best_on = {name!r} requires checkpoint.keep_best=true: no checkpoint is selected without"]
    return []


def _servers(c: Config) -> list[str]:
    """Return inconsistent settings of the vllm engine."""
    s = c.rollout.server
    if c.rollout.engine != "vllm":
        return ["rollout.server.urls requires rollout.engine=vllm"] if s.urls else []
    problems = []
    if c.moe.routing_replay == "rollout" and not s.enable_prefix_caching:
        problems.append(
            "moe.routing_replay=rollout requires rollout.server.enable_prefix_caching=true: vLLM returns experts from "
            "the cache of prefixes only"
        )
    if s.urls and (s.placement != "local" or s.count is not None):
        problems.append(
            "rollout.server.urls names servers that run already: leave rollout.server.placement and "
            "rollout.server.count at their defaults"
        )
    problems += [
        f"rollout.server.urls: {url!r} must have the form http://host:port or unix:/path/of/a/socket"
        for url in s.urls
        if not url.startswith(("http://", "https://", "unix:/"))
    ]
    if s.nodes and s.placement != "disaggregated":
        problems.append("rollout.server.nodes requires rollout.server.placement=disaggregated")
    if s.placement == "disaggregated" and s.weight_transport == "file" and not s.weight_directory:
        problems.append(
            "rollout.server.weight_transport=file writes into this node's memory, which servers on other nodes cannot "
            "read: set rollout.server.weight_directory to a directory that all nodes share, or use nccl or gloo"
        )
    if s.placement == "disaggregated" and s.tensor_parallel_size > 0 and s.gpus_per_node % s.tensor_parallel_size:
        problems.append(
            f"rollout.server.tensor_parallel_size {s.tensor_parallel_size} does not divide "
            f"rollout.server.gpus_per_node {s.gpus_per_node}"
        )
    if s.weight_transport == "ipc" and s.placement != "colocated":
        problems.append(
            "rollout.server.weight_transport=ipc requires rollout.server.placement=colocated: it works between "
            "processes on one GPU"
        )
    if s.weight_transport == "nccl" and s.placement == "colocated":
        problems.append(
            "rollout.server.weight_transport=nccl cannot connect a rank and a server on one GPU; use ipc or file"
        )
    if s.placement == "colocated" and not c.optimizer.offload_state:
        problems.append(
            "rollout.server.placement=colocated requires optimizer.offload_state=true: ranks and servers take turns"
        )
    return problems


def _staleness(r: RolloutConfig) -> list[str]:
    """Return inconsistent settings of batches that are generated ahead."""
    problems = []
    if r.engine == "hf" and (r.max_staleness > 0 or r.partial):
        problems.append(
            "rollout.max_staleness and rollout.partial require rollout.engine=vllm: the hf engine generates in the "
            "ranks themselves, which cannot train meanwhile"
        )
    if r.engine == "vllm" and r.surplus_groups == "keep":
        problems.append(
            "rollout.surplus_groups=keep requires rollout.engine=hf; with vllm, rollout.partial keeps unfinished groups"
        )
    if r.max_staleness > 1 and not r.partial:
        problems.append(
            f"rollout.max_staleness = {r.max_staleness}: one batch is generated ahead, so tokens are at most 1 step "
            "old; set it to 1, or set rollout.partial=true, which continues responses under newer weights"
        )
    if r.max_staleness > 0 and r.server.placement == "colocated" and not r.partial:
        problems.append(
            "rollout.server.placement=colocated cannot generate while it trains: set rollout.max_staleness=0, or "
            "rollout.partial=true"
        )
    least = 2 if r.server.placement != "colocated" else 1
    if r.partial and r.max_staleness < least:
        problems.append(
            f"rollout.partial requires rollout.max_staleness >= {least} with "
            f"rollout.server.placement={r.server.placement}, not {r.max_staleness}: continued responses have tokens of "
            "older weights"
        )
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
