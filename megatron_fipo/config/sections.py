"""Every setting of a run, in frozen dataclasses. A default stands beside its meaning here and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class RunConfig:
    name: str = "run"  # in reports and trackers, and of the default directory
    directory: str | None = None  # None: runs/<name>
    seed: int = 1  # of the data order and of sampling
    overwrite: bool = False  # replace what an earlier run left in the directory
    # On GPUs: an update, and so a resumed run, gives the same bits again, at some cost; see docs/determinism.md. On the
    # CPU it does so anyway.
    deterministic: bool = False


@dataclass(frozen=True)
class ModelConfig:
    hf_path: str = ""  # directory of a Hugging Face checkpoint: config.json, tokenizer, *.safetensors
    # Megatron distributed checkpoint to start from; None: the weights in hf_path. A converted one can be given as
    # hf_path as well, since config.json and tokenizer travel along.
    megatron_path: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)  # replace fields of config.json, e.g. the context length
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of weights and activations
    fp32_logits: bool = False  # multiply the LM head in float32 instead of `dtype`; softmax is float32 either way
    lm_head_chunk_tokens: int | None = None  # response tokens whose logits exist at once; None: 4096 on GPUs, else 512
    recompute: Literal["none", "selective", "full"] = "none"  # activation recomputation
    transformer_engine: Literal["auto", "on", "off"] = (
        "auto"  # auto: where it and a GPU are; off: torch's layers and AdamW
    )

    def chunk_tokens(self, on_gpu: bool) -> int:
        """Return `lm_head_chunk_tokens`, or the default of the device.

        On a GPU each chunk reads and writes the float32 gradient of the head once, which 4096 rows make small beside
        their matrix products; a CPU has less to gain, and its logits may be float32.
        """
        return self.lm_head_chunk_tokens or (4096 if on_gpu else 512)


@dataclass(frozen=True)
class ParallelConfig:
    world_size: int = 1  # ranks; `train` starts them itself unless torchrun or srun already did
    tensor: int = 1  # tensor-parallel size (TP)
    pipeline: int = 1  # pipeline stages (PP)
    virtual_pipeline: int = 1  # model chunks per pipeline stage; 1: no interleaving
    context: int = 1  # context-parallel size (CP): ranks that split each sequence
    sequence: bool = False  # sequence parallelism inside the tensor-parallel group
    expert: int = 1  # ranks that share out the experts; taken from the tensor, context and data axes
    first_stage_layers: int | None = None  # uneven pipeline: layers of the first stage
    last_stage_layers: int | None = None  # uneven pipeline: layers of the last stage
    timeout_minutes: float = 30.0  # longest wait of ranks for others, which may still generate; more ends the run
    nccl_timeout_minutes: float = 20.0  # of a collective on GPUs, for which no rank waits long; more ends the run
    threads_per_rank: int | None = None  # CPU threads; None: cores divided by local ranks

    @property
    def data(self) -> int:
        """Data-parallel replicas: what is left of the world after the model-parallel axes."""
        return self.world_size // (self.tensor * self.pipeline * self.context)

    @property
    def sequence_alignment(self) -> int:
        """Packed sequences are padded to a multiple of this: zig-zag context chunks, sequence-parallel shards."""
        context = 2 * self.context if self.context > 1 else 1
        return context * (self.tensor if self.sequence else 1)


@dataclass(frozen=True)
class DataConfig:
    train: str = ""  # parquet in the DAPO schema
    # What is evaluated on: a file, a list of files, or a mapping of names to files. A file without a name is called as
    # it is, without its ending. Several are benchmarks of their own; the scores of all are the mean over them.
    validation: Any = None
    max_prompt_tokens: int = 2048  # longer prompts are left out and counted
    shuffle: bool = True  # another order of the problems in every epoch
    # Variables of the chat template, e.g. {enable_thinking: false}
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def benchmarks(self) -> dict[str, str]:
        """The files of `validation` by their names."""
        given = self.validation or {}
        files = [given] if isinstance(given, str) else given
        return dict(files) if isinstance(files, dict) else {Path(file).stem: file for file in files}


@dataclass(frozen=True)
class RolloutConfig:
    engine: Literal["hf", "vllm"] = "hf"  # hf: in the ranks themselves, for small models; vllm: servers of its own
    prompts_per_step: int = 512  # groups in a training batch
    group_size: int = 16  # responses a prompt (G)
    prompts_per_round: int | None = None  # prompts a generation round; None: prompts_per_step
    dynamic_sampling: bool = True  # drop groups whose rewards are all the same, generate until the batch is full
    max_rounds: int = 10  # 0: no limit
    when_exhausted: Literal["stop", "train"] = "stop"  # after max_rounds: end with an error, or train on what there is
    surplus_groups: Literal["drop", "keep"] = (
        "drop"  # groups beyond prompts_per_step: cut, or open the next step with them
    )
    temperature: float = 1.0  # of sampling in training
    top_p: float = 1.0  # nucleus sampling in training; 1: all tokens
    top_k: int = 0  # 0: all tokens
    max_response_tokens: int = 20480  # longer responses are truncated
    batch_size: int = 256  # hf engine: sequences generated at once by a rank
    # The settings from here to prefix_cache are the vllm engine's.

    # local: servers beside rank 0. colocated: on the GPUs of the ranks, which take turns with them (set
    # optimizer.offload_state). disaggregated: on nodes of the same Slurm job that have no ranks.
    placement: Literal["local", "colocated", "disaggregated"] = "local"
    num_servers: int | None = None  # None: 1 if local, else as many as the GPUs of a node give, on each node
    tensor_parallel: int = 1  # GPUs that a server splits the model over
    nodes: tuple[str, ...] = ()  # disaggregated: their names; none given: all nodes of the job that have no ranks
    gpus_per_node: int = 8  # disaggregated: of each of `nodes`
    # URLs of servers that run already, with the package's worker folder. MEGATRON_FIPO_VLLM_KEY has their key, or one
    # for each, separated by commas.
    servers: tuple[str, ...] = ()
    # The interpreter that has vllm. None: MEGATRON_FIPO_VLLM_PYTHON, else what `make vllm-env` made in the checkout.
    vllm_python: str | None = None
    # How weights reach the servers. auto: file if local, ipc if colocated, nccl if disaggregated. With file a server
    # that was restarted gets its weights at once, with the others it waits for the next update.
    weight_transport: Literal["auto", "file", "gloo", "nccl", "ipc"] = "auto"
    weight_bucket_mb: int = 512  # weights travel in pieces of about this size; a larger tensor is a piece of its own
    # file: where a directory is made, and removed, for a whole copy of the weights, twice during an update; None:
    # /dev/shm, of one node alone.
    weight_directory: str | None = None
    verify_weights: int = 0  # every this many updates checksums prove that all tensors arrived; 0: never
    deadline_seconds: float = 3600.0  # for one response; then it is drawn anew, by another server if there is one
    start_seconds: float = 900.0  # for a server to be ready, and for the run to wait when none is
    max_concurrency: int = 256  # responses that a server draws at the same time
    seeded: bool | None = None  # each request has a seed, for a run that can be repeated. None: not on GPUs, for speed
    kv_cache_gb: float | None = None  # None: gpu_memory_utilization decides; 1 on the CPU
    gpu_memory_utilization: float = 0.9  # share of the GPU for weights and cache while generating
    prefix_cache: bool = True  # the responses of a group share their prompt's cache
    # Truncated weights, trainer over rollout probabilities. auto: token where max_staleness allows older weights.
    importance_sampling: Literal["auto", "none", "token", "sequence"] = "auto"
    importance_sampling_cap: float = 2.0  # the largest such weight
    mismatch_warning: float = 0.05  # warn when mean |log p_trainer - log p_rollout| exceeds this
    save: bool = True  # keep rollouts/step_N.parquet
    # In it, each token's log-probabilities before the step and in its last update, Future-KL and influence weight: 16
    # bytes a token.
    save_credit: bool = True
    # The settings from here on need an engine with servers (vllm).

    # Steps by which the weights that sampled a token may be behind those that it trains. 0: every batch is sampled from
    # the newest weights. 1: the next batch is sampled while one is trained (not if colocated, where they take turns).
    max_staleness: int = 0
    # An interrupted run waits this long for the batch that is drawn ahead, which its checkpoint then holds. One that is
    # not full by then is drawn anew, with newer weights than it would have had.
    settle_seconds: float = 20.0
    # Responses that are unfinished when a batch is full go on with the next weights instead of being drawn anew. What
    # is in a batch then depends on speed. Needs max_staleness >= 1, or >= 2 if a batch is drawn during training.
    partial: bool = False

    @property
    def overlaps(self) -> bool:
        """Whether a batch is drawn while the one before it is trained."""
        return self.max_staleness > 0 and self.placement != "colocated"

    @property
    def importance_sampling_level(self) -> Literal["none", "token", "sequence"]:
        if self.importance_sampling == "auto":
            return "token" if self.max_staleness else "none"
        return self.importance_sampling


@dataclass(frozen=True)
class RewardConfig:
    function: str = "dapo"  # dapo | math | exact | package.module:function
    # Numbers that a function of one's own returns count as right (accuracy, pass@k) from here on; None: 0.5, and a
    # warning where they are other than 0, 1 and -1. What is trained on is the number itself.
    accuracy_threshold: float | None = None
    overlong_buffer_tokens: int = 4096  # 0: no overlong shaping
    overlong_penalty_factor: float = 1.0  # penalty at the length limit; it grows linearly over the buffer
    workers: int = 2  # processes of the `math` verifier, on each data-parallel replica
    timeout_seconds: float = 10.0  # one answer's verification
    batch_seconds: float = 600.0  # that of a batch by one replica; answers that are left then count as timed out

    @property
    def reads_data_source(self) -> bool:
        """Whether the function is one of the user's, which gets the data sources; the others judge without them."""
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
    warmup_unit: Literal["step", "update"] = "step"  # what advances the schedule; the authors' code counts steps
    betas: tuple[float, float] = (0.9, 0.999)  # of AdamW
    eps: float = 1e-8  # of AdamW
    weight_decay: float = 0.1  # of AdamW
    grad_clip: float = 1.0  # largest norm of the gradient of an update
    distributed: bool = True  # shard optimizer state over data-parallel ranks
    offload_state: bool = False  # outside the update phase: optimizer state in host memory, gradient buffers freed
    spike_threshold: float | None = None  # skip an update whose gradient norm is above this; None: only non-finite ones
    max_consecutive_skips: int = 3  # skipped updates in a row that end the run


@dataclass(frozen=True)
class TrainerConfig:
    max_steps: int = 100  # training steps of the whole run
    mini_batch_prompts: int = 64  # groups an optimizer update; prompts_per_step / this = updates a step
    epochs_per_batch: int = 1  # passes over one training batch
    tokens_per_micro_batch: int = 20480 + 2048  # packed tokens of a micro-batch on one context-parallel group
    # Of a replica: rising to the longest and falling again fills and drains the pipeline with short ones.
    micro_batch_order: Literal["longest_first", "shortest_first", "longest_middle"] = "longest_middle"
    strict: bool = False  # refuse, instead of warn about, settings under which FIPO is a no-op
    export_policy: bool = True  # write the trained policy as a Hugging Face checkpoint to <run>/policy
    tensorboard: bool = True  # also log to <run>/tensorboard
    wandb_project: str | None = None  # also log to this project of Weights & Biases (extra `wandb`)


@dataclass(frozen=True)
class EvalConfig:
    every: int = 5  # steps; 0: only before the first and after the last
    samples: int = 32  # k: responses a problem
    temperature: float = 1.0  # of sampling in evaluations
    top_p: float = 0.7  # nucleus sampling in evaluations
    max_problems: int | None = None  # of each benchmark, its first ones
    # The j of every pass@j, at most `samples`; None: powers of two, and `samples`.
    pass_k: tuple[int, ...] | None = None
    save: bool = True  # keep evaluation/step_N.parquet, every response with its verdict


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 10  # steps; 0: only when the run is interrupted and after the last step
    asynchronous: bool = True  # training goes on while a checkpoint is written
    keep_last: int = 2  # newest checkpoints that stay
    keep_every: int = 0  # steps: checkpoints of multiples of this stay for good; 0: none
    keep_best: bool = True  # the one with the highest validation avg@k stays


@dataclass(frozen=True)
class ResumeConfig:
    allow_changes: bool = False  # go on with a run although its model, data, seed or algorithm were changed
    max_requeues: int = 100  # times that a Slurm job puts itself back into the queue


@dataclass(frozen=True)
class ProfileConfig:
    # When each stage computed and waited: metrics of every step, traces/rank_R.json of the newest.
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
