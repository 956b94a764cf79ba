"""All settings of a run as frozen dataclasses; each default is defined and documented only here."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class RunConfig:
    name: str = "run"  # in reports and trackers, and of the default directory
    directory: str | None = None  # None: runs/<name>
    seed: int = 1  # of the data order and of sampling
    overwrite: bool = False  # replace the results of an earlier run in the directory
    # On GPUs: updates, and thus resumed runs, are reproducible bit by bit, at some cost; see docs/determinism.md. On
    # the CPU they always are.
    deterministic: bool = False


@dataclass(frozen=True)
class ModelConfig:
    hf_path: str = ""  # Hugging Face checkpoint directory: config.json, tokenizer, *.safetensors
    # Megatron distributed checkpoint to start from; None: the weights in hf_path. A converted one also works as
    # hf_path, since it includes config.json and tokenizer.
    megatron_path: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)  # replace fields of config.json, e.g. the context length
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of weights and activations
    fp32_logits: bool = False  # compute the LM head in float32 instead of `dtype`; softmax always is float32
    lm_head_chunk_tokens: int | None = None  # rows of logits at a time; None: 4096 on GPUs, else 512
    recompute: Literal["none", "selective", "full"] = "none"  # activation recomputation
    transformer_engine: Literal["auto", "on", "off"] = (
        "auto"  # auto: where it and a GPU are; off: torch's layers and AdamW
    )

    def chunk_tokens(self, on_gpu: bool) -> int:
        """Return `lm_head_chunk_tokens`, or the device's default.

        On a GPU each chunk reads and writes the head's float32 gradient once, which is cheap relative to the matmuls
        of 4096 rows; a CPU gains less, and its logits may be float32.
        """
        return self.lm_head_chunk_tokens or (4096 if on_gpu else 512)


@dataclass(frozen=True)
class ParallelConfig:
    world_size: int = 1  # number of ranks; `train` starts them unless torchrun or srun already did
    tensor: int = 1  # tensor-parallel size (TP)
    pipeline: int = 1  # pipeline stages (PP)
    virtual_pipeline: int = 1  # model chunks per pipeline stage; 1: no interleaving
    context: int = 1  # context-parallel size (CP): ranks that split each sequence
    sequence: bool = False  # sequence parallelism inside the tensor-parallel group
    expert: int = 1  # ranks that share the experts; taken from the tensor, context and data axes
    first_stage_layers: int | None = None  # uneven pipeline: layers of the first stage
    last_stage_layers: int | None = None  # uneven pipeline: layers of the last stage
    timeout_minutes: float = 30.0  # maximum wait for other ranks, which may still generate; then the run ends
    nccl_timeout_minutes: float = 20.0  # timeout of NCCL collectives, in which no rank waits long; then the run ends
    threads_per_rank: int | None = None  # CPU threads; None: cores divided by local ranks

    @property
    def data(self) -> int:
        """Number of data-parallel replicas."""
        return self.world_size // (self.tensor * self.pipeline * self.context)

    @property
    def sequence_alignment(self) -> int:
        """Packed sequences are padded to a multiple of this: zig-zag context chunks, sequence-parallel shards."""
        context = 2 * self.context if self.context > 1 else 1
        return context * (self.tensor if self.sequence else 1)


@dataclass(frozen=True)
class DataConfig:
    train: str = ""  # parquet in the DAPO schema
    # Validation data: a file, a list of files, or a mapping of names to files. An unnamed file is named after its stem.
    # Several files are separate benchmarks; overall scores are means over them.
    validation: Any = None
    max_prompt_tokens: int = 2048  # longer prompts are dropped and counted
    shuffle: bool = True  # another order of the problems in every epoch
    # Variables of the chat template, e.g. {enable_thinking: false}
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def benchmarks(self) -> dict[str, str]:
        """Return the files of `validation` by name."""
        given = self.validation or {}
        files = [given] if isinstance(given, str) else given
        return dict(files) if isinstance(files, dict) else {Path(file).stem: file for file in files}


@dataclass(frozen=True)
class RolloutConfig:
    engine: Literal["hf", "vllm"] = "hf"  # hf: in the ranks, for small models; vllm: separate servers
    prompts_per_step: int = 512  # groups per training batch
    group_size: int = 16  # responses per prompt (G)
    prompts_per_round: int | None = None  # prompts per generation round; None: prompts_per_step
    dynamic_sampling: bool = True  # drop groups with equal rewards, and generate until the batch is full
    max_rounds: int = 10  # 0: no limit
    when_exhausted: Literal["stop", "train"] = (
        "stop"  # after max_rounds: stop with an error, or train on the incomplete batch
    )
    surplus_groups: Literal["drop", "keep"] = (
        "drop"  # groups beyond prompts_per_step: discard, or start the next step with them
    )
    temperature: float = 1.0  # of sampling in training
    top_p: float = 1.0  # nucleus sampling in training; 1: all tokens
    top_k: int = 0  # 0: all tokens
    max_response_tokens: int = 20480  # longer responses are truncated
    batch_size: int = 256  # hf engine: sequences per generation batch of a rank
    # The settings from here to prefix_cache apply to the vllm engine.

    # local: servers beside rank 0. colocated: on the ranks' GPUs, alternating with them (requires
    # optimizer.offload_state). disaggregated: on nodes of the same Slurm job without ranks.
    placement: Literal["local", "colocated", "disaggregated"] = "local"
    num_servers: int | None = None  # None: 1 if local, else as many per node as its GPUs allow
    tensor_parallel: int = 1  # GPUs per server
    nodes: tuple[str, ...] = ()  # disaggregated: node names; empty: all nodes of the job without ranks
    gpus_per_node: int = 8  # disaggregated: GPUs of each of `nodes`
    # URLs of running servers that use the package's worker folder. MEGATRON_FIPO_VLLM_KEY contains their key, or one
    # per server, separated by commas.
    servers: tuple[str, ...] = ()
    # Python interpreter with vllm. None: MEGATRON_FIPO_VLLM_PYTHON, else the environment of `make vllm-env`.
    vllm_python: str | None = None
    # Weight transfer to servers. auto: file if local, ipc if colocated, nccl if disaggregated. With file, a
    # restarted server gets its weights immediately; otherwise at the next update.
    weight_transport: Literal["auto", "file", "gloo", "nccl", "ipc"] = "auto"
    weight_bucket_mb: int = 512  # approximate size of weight transfers; a larger tensor is sent alone
    # file: directory for a full copy of the weights (twice during an update), created and removed in here; None:
    # /dev/shm, on one node only.
    weight_directory: str | None = None
    verify_weights: int = 0  # interval of checksum verification in updates; 0: never
    deadline_seconds: float = 3600.0  # timeout of a response; it is then generated again, by another server if possible
    start_seconds: float = 900.0  # timeout for a server to start, and for the run to wait if none is available
    max_concurrency: int = 256  # concurrent responses per server
    seeded: bool | None = None  # seeded requests, for reproducible runs. None: not on GPUs, for speed
    kv_cache_gb: float | None = None  # None: gpu_memory_utilization decides; 1 on the CPU
    gpu_memory_utilization: float = 0.9  # share of the GPU for weights and cache while generating
    prefix_cache: bool = True  # share the prompt's cache among the responses of a group
    # Truncated weights: trainer over rollout probabilities. auto: token if max_staleness allows older weights.
    importance_sampling: Literal["auto", "none", "token", "sequence"] = "auto"
    importance_sampling_cap: float = 2.0  # the largest such weight
    mismatch_warning: float = 0.05  # threshold of mean |log p_trainer - log p_rollout| for a warning
    save: bool = True  # keep rollouts/step_N.parquet
    # Include each token's log-probabilities before the step and in its last update, Future-KL and influence weight: 16
    # bytes per token.
    save_credit: bool = True
    # The settings from here on require servers (vllm).

    # Maximum number of steps by which the weights that generated a token may be older than
    # those being trained. 0: every batch is generated by the latest weights. 1: the next batch is generated during
    # training (not if colocated, where they alternate).
    max_staleness: int = 0
    # Timeout for completing the batch generated ahead when a run is interrupted, so that its checkpoint includes it.
    # An incomplete batch is generated again, with newer weights.
    settle_seconds: float = 20.0
    # Responses that are unfinished when a batch is full continue with the next weights instead of being restarted. The
    # contents of a batch then depend on timing. Requires max_staleness >= 1, or >= 2 if batches are generated during
    # training.
    partial: bool = False

    @property
    def overlaps(self) -> bool:
        """Whether a batch is generated while the previous one is trained."""
        return self.max_staleness > 0 and self.placement != "colocated"

    @property
    def importance_sampling_level(self) -> Literal["none", "token", "sequence"]:
        if self.importance_sampling == "auto":
            return "token" if self.max_staleness else "none"
        return self.importance_sampling


@dataclass(frozen=True)
class RewardConfig:
    function: str = "dapo"  # dapo | math | exact | package.module:function
    # Threshold from which numbers returned by a user function count as correct (accuracy, pass@k); None: 0.5, with a
    # warning for numbers other than 0, 1 and -1. Training uses the number itself.
    accuracy_threshold: float | None = None
    overlong_buffer_tokens: int = 4096  # 0: no overlong shaping
    overlong_penalty_factor: float = 1.0  # penalty at the length limit; it grows linearly over the buffer
    workers: int = 2  # processes of the `math` verifier per data-parallel replica
    timeout_seconds: float = 10.0  # per answer
    batch_seconds: float = 600.0  # per batch of a replica; remaining answers count as timed out

    @property
    def reads_data_source(self) -> bool:
        """Whether the function is user-defined and receives data sources; built-in ones ignore them."""
        return ":" in self.function


@dataclass(frozen=True)
class AlgorithmConfig:
    loss: Literal["fipo", "grpo"] = "fipo"  # grpo: DAPO/GRPO, the same loss with influence weight 1
    half_life: float = 32.0  # tokens; gamma = 2^(-1/half_life)
    influence_clip: tuple[float, float] | None = (1.0, 1.2)  # None: no clip, capped at 10
    safety_threshold: float = 10.0  # above this ratio, with a negative advantage, the weight is clipped to [0.8, 1]
    clip_ratio_low: float = 0.2  # PPO clip: ratios below 1 - this
    clip_ratio_high: float = 0.28  # PPO clip: ratios above 1 + this
    dual_clip: float = 10.0  # bounds the loss of negative advantages; larger ratios are left out of Future-KL
    log_ratio_clamp: float = 20.0  # nats; log-ratios are clamped to +- this
    max_dual_clipped_tokens: int | None = 1  # a sequence with more is vetoed; None: never
    # How token losses become one number: a mean over all tokens, or over sequences of each one's sum, mean, or sum
    # divided by max_response_tokens.
    aggregation: Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"] = (
        "token-mean"
    )
    kl_coefficient: float = 0.0  # penalty towards the initial policy (k3 estimator)
    entropy_coefficient: float = 0.0  # bonus


@dataclass(frozen=True)
class OptimizerConfig:
    lr: float = 1e-6  # learning rate of AdamW
    warmup: int = 10  # linear from 0, then constant
    warmup_unit: Literal["step", "update"] = "step"  # unit of the schedule; the authors' code counts steps
    betas: tuple[float, float] = (0.9, 0.999)  # of AdamW
    eps: float = 1e-8  # of AdamW
    weight_decay: float = 0.1  # of AdamW
    grad_clip: float = 1.0  # largest norm of the gradient of an update
    distributed: bool = True  # shard optimizer state over data-parallel ranks
    offload_state: bool = False  # outside updates: optimizer state in host memory, gradient buffers freed
    spike_threshold: float | None = None  # skip updates with a larger gradient norm; None: only non-finite ones
    max_consecutive_skips: int = 3  # consecutive skipped updates that end the run


@dataclass(frozen=True)
class TrainerConfig:
    max_steps: int = 100  # training steps of the whole run
    mini_batch_prompts: int = 64  # groups per optimizer update; prompts_per_step / this = updates per step
    epochs_per_batch: int = 1  # passes over a training batch
    tokens_per_micro_batch: int = 20480 + 2048  # packed tokens of a micro-batch per context-parallel group
    # Order of a replica's micro-batches: increasing, then decreasing length fills and drains the pipeline with short
    # ones.
    micro_batch_order: Literal["longest_first", "shortest_first", "longest_middle"] = "longest_middle"
    strict: bool = False  # reject, instead of warn about, settings under which FIPO is a no-op
    export_policy: bool = True  # write the trained policy as a Hugging Face checkpoint to <run>/policy
    tensorboard: bool = True  # also log to <run>/tensorboard
    wandb_project: str | None = None  # log to this Weights & Biases project, too (extra `wandb`)


@dataclass(frozen=True)
class EvalConfig:
    every: int = 5  # steps; 0: only before the first and after the last
    samples: int = 32  # k: responses per problem
    temperature: float = 1.0  # of sampling in evaluations
    top_p: float = 0.7  # nucleus sampling in evaluations
    max_problems: int | None = None  # of each benchmark, its first problems
    # Values of j for pass@j, at most `samples`; None: powers of two, and `samples`.
    pass_k: tuple[int, ...] | None = None
    save: bool = True  # keep evaluation/step_N.parquet, every response with its score


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 10  # steps; 0: only when the run is interrupted and after the last step
    asynchronous: bool = True  # continue training while a checkpoint is written
    keep_last: int = 2  # latest checkpoints to keep
    keep_every: int = 0  # steps: keep checkpoints at multiples of this permanently; 0: none
    keep_best: bool = True  # keep the one with the highest validation avg@k


@dataclass(frozen=True)
class ResumeConfig:
    allow_changes: bool = False  # continue a run although its model, data, seed or algorithm have changed
    max_requeues: int = 100  # maximum number of times that a Slurm job requeues itself


@dataclass(frozen=True)
class ProfileConfig:
    # Record when each stage computes and waits: metrics of every step, traces/rank_R.json of the latest.
    pipeline: bool = False


@dataclass(frozen=True)
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    resume: ResumeConfig = field(default_factory=ResumeConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)

    @property
    def run_directory(self) -> Path:
        return Path(self.run.directory or f"runs/{self.run.name}")

    @property
    def updates_per_step(self) -> int:
        return self.rollout.prompts_per_step // self.trainer.mini_batch_prompts * self.trainer.epochs_per_batch
