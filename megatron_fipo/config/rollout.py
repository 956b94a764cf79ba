"""Settings of rollouts: sampling and batches, vLLM servers, and the correction for rollout log-probabilities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_fipo.config.setting import section, setting, subsection


@section
@dataclass(frozen=True)
class ServerConfig:
    """vLLM servers. Options of vLLM have vLLM's names."""

    placement: Literal["local", "colocated", "disaggregated"] = setting(
        "local",
        "local: servers beside rank 0. colocated: on the ranks' GPUs, alternating with them; requires "
        "optimizer.offload_state. disaggregated: on nodes of the same Slurm job without ranks",
        resume="free",
    )
    count: int | None = setting(
        None,
        "Number of servers, per node unless local. null: 1 if local, else as many as the node's GPUs allow",
        resume="free",
        at_least=1,
    )
    nodes: tuple[str, ...] = setting(
        (), "disaggregated: node names. Empty: all nodes of the job without ranks", resume="free"
    )
    gpus_per_node: int = setting(8, "disaggregated: GPUs of each of `nodes`", resume="free", at_least=1)
    urls: tuple[str, ...] = setting(
        (),
        "URLs of servers that run already and use the package's worker folder; MEGATRON_FIPO_VLLM_KEY holds their "
        "key, or one per server, separated by commas. Empty: the run starts its servers",
        resume="free",
    )
    python: str | None = setting(
        None,
        "Python interpreter that has vllm. null: MEGATRON_FIPO_VLLM_PYTHON, else the environment of `make vllm-env`",
        resume="free",
    )
    tensor_parallel_size: int = setting(1, "GPUs per server", resume="free", at_least=1)
    max_num_seqs: int = setting(
        256,
        "Concurrent responses per server. Replicas share them equally, and so do the ranks of an evaluation; further "
        "requests wait in the trainer",
        resume="free",
        at_least=1,
    )
    gpu_memory_utilization: float = setting(
        0.9, "Share of the GPU for weights and KV cache while generating", resume="free", above=0, at_most=1
    )
    kv_cache_gb: float | None = setting(
        None,
        "Size of the KV cache in GiB. null: what gpu_memory_utilization leaves; 1 on the CPU",
        resume="free",
        above=0,
    )
    enable_prefix_caching: bool = setting(
        True, "Share the KV cache of a prompt among the responses of its group", resume="free"
    )
    seeded: bool | None = setting(
        None,
        "Send a seed with each request, for reproducible runs. null: not on GPUs, where it is slower",
        resume="fixed",
    )
    weight_transport: Literal["auto", "file", "gloo", "nccl", "ipc"] = setting(
        "auto",
        "Transfer of weights to servers. auto: file if local, ipc if colocated, nccl if disaggregated. With file, a "
        "restarted server gets its weights immediately; otherwise at the next update",
        resume="free",
    )
    weight_bucket_mb: int = setting(
        512, "Approximate size of one weight transfer in MiB; a larger tensor is sent alone", resume="free", at_least=1
    )
    weight_directory: str | None = setting(
        None,
        "file: directory for a full copy of the weights (two during an update), in which the run makes and removes a "
        "directory of its own. null: /dev/shm, on one node only",
        resume="free",
    )
    verify_weights: int = setting(
        20,
        "Compare checksums of all weights on both sides in the first update and in every Nth after it; 0: never",
        resume="free",
        at_least=0,
    )
    request_timeout_seconds: float = setting(
        3600.0,
        "Timeout of a response from the moment it is sent to a server, which begins it at once; waiting before that "
        "does not count. It is then generated again, by another server if possible",
        resume="free",
        above=0,
    )
    start_timeout_seconds: float = setting(
        900.0,
        "Timeout for a server to start, and for the run to wait if no server is available",
        resume="free",
        above=0,
    )
    drain_timeout_seconds: float = setting(
        20.0,
        "Timeout for completing the batch that is generated ahead when a run is interrupted, so that the checkpoint "
        "includes it; an incomplete batch is generated again, with newer weights",
        resume="free",
        at_least=0,
    )


@section
@dataclass(frozen=True)
class CorrectionConfig:
    """Correction for the difference between rollout and trainer log-probabilities."""

    importance_sampling: Literal["auto", "none", "token", "sequence", "geometric"] = setting(
        "auto",
        "Level of truncated importance weights, trainer over rollout probabilities: each token's ratio, the product of "
        "a sequence's ratios, or their geometric mean. The cap bounds weights only above: over thousands of tokens a "
        "product is often near 0, and removes long responses; the geometric mean does not. auto: token if "
        "rollout.max_staleness > 0, else none",
        resume="fixed",
    )
    importance_sampling_cap: float = setting(2.0, "Largest importance weight", resume="fixed", above=0, finite=False)
    mismatch_warning: float = setting(
        0.05,
        "Mean |log p_trainer - log p_rollout| above which a warning is printed",
        resume="free",
        at_least=0,
        finite=False,
    )


@section
@dataclass(frozen=True)
class RolloutConfig:
    """Sampling of responses and the batches that are made of them."""

    engine: Literal["hf", "vllm"] = setting(
        "hf", "hf: in the ranks, for small models. vllm: separate servers", resume="free"
    )
    prompts_per_step: int = setting(512, "Groups per training batch", resume="fixed", at_least=1)
    group_size: int = setting(
        16, "Responses per prompt (G); a group-relative advantage needs at least 2", resume="fixed", at_least=2
    )
    prompts_per_round: int | None = setting(
        None,
        "hf: prompts per generation round. vllm: largest number of groups in flight; usually fewer are, as many as are "
        "likely to be needed. max_rounds counts prompts in this unit. null: prompts_per_step",
        resume="fixed",
        at_least=1,
    )
    dynamic_sampling: bool = setting(
        True, "Drop groups whose rewards are all equal, and generate until the batch is full", resume="fixed"
    )
    max_rounds: int = setting(
        10, "Largest number of generation rounds per step; 0: no limit", resume="fixed", at_least=0
    )
    when_exhausted: Literal["stop", "train"] = setting(
        "stop", "After max_rounds: stop with an error, or train on the incomplete batch", resume="fixed"
    )
    surplus_groups: Literal["drop", "keep"] = setting(
        "drop", "Groups beyond prompts_per_step: drop them, or start the next step with them", resume="fixed"
    )
    temperature: float = setting(1.0, "Sampling temperature in training", resume="fixed", above=0)
    top_p: float = setting(1.0, "Nucleus sampling in training; 1: all tokens", resume="fixed", above=0, at_most=1)
    top_k: int = setting(0, "Top-k sampling in training; 0: all tokens", resume="fixed", at_least=0)
    max_response_tokens: int = setting(20480, "Longest response; longer ones are truncated", resume="fixed", at_least=1)
    batch_size: int = setting(256, "hf: sequences per generation batch of a rank", resume="free", at_least=1)
    max_staleness: int = setting(
        0,
        "vllm: largest number of steps by which the weights that generated a token may be older than those being "
        "trained. 0: every batch is generated by the latest weights. 1: the next batch is generated during training "
        "(not if colocated, where they alternate)",
        resume="fixed",
        at_least=0,
    )
    partial: bool = setting(
        False,
        "vllm: responses that are unfinished when a batch is full continue under the next weights instead of being "
        "restarted. The contents of a batch then depend on timing. Requires max_staleness >= 1, or >= 2 if batches are "
        "generated during training",
        resume="fixed",
    )
    save: bool = setting(True, "Keep rollouts/step_N.parquet", resume="free")
    save_credit: bool = setting(
        True,
        "Include each token's log-probabilities before the step and in its last update, Future-KL and influence "
        "weight: 16 bytes per token",
        resume="free",
    )
    server: ServerConfig = subsection(ServerConfig)
    correction: CorrectionConfig = subsection(CorrectionConfig)

    @property
    def round_size(self) -> int:
        """Number of prompts of a generation round."""
        return self.prompts_per_round or self.prompts_per_step

    @property
    def overlaps(self) -> bool:
        """Whether a batch is generated while the previous one is trained."""
        return self.max_staleness > 0 and self.server.placement != "colocated"

    @property
    def importance_sampling_level(self) -> Literal["none", "token", "sequence", "geometric"]:
        """Level of importance weights, with "auto" resolved."""
        level = self.correction.importance_sampling
        if level == "auto":
            return "token" if self.max_staleness else "none"
        return level
