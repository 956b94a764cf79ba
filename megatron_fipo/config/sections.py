"""All settings of a run as frozen dataclasses. Each field states default, allowed values, resume rule and doc."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_fipo.config.loss import LossConfig
from megatron_fipo.config.moe import MoEConfig
from megatron_fipo.config.rollout import RolloutConfig
from megatron_fipo.config.setting import section, setting, subsection


@section
@dataclass(frozen=True)
class RunConfig:
    """Name, directory and seed of a run."""

    name: str = setting("run", "Name in reports and trackers, and of the default directory", resume="free")
    directory: str | None = setting(None, "Directory of the run; null: runs/<name>", resume="free")
    seed: int = setting(1, "Seed of the data order and of sampling", resume="fixed", at_least=0, at_most=2**32 - 1)
    overwrite: bool = setting(False, "Replace the results of an earlier run in the directory", resume="free")
    deterministic: bool = setting(
        False,
        "On GPUs: updates, and thus resumed runs, are reproducible bit by bit, at some cost; see docs/determinism.md. "
        "On the CPU they always are",
        resume="free",
    )


@section
@dataclass(frozen=True)
class ModelConfig:
    """Initial weights and how the model computes."""

    hf_path: str = setting(
        "", "Hugging Face checkpoint directory: config.json, tokenizer, *.safetensors", resume="fixed"
    )
    megatron_path: str | None = setting(
        None,
        "Megatron distributed checkpoint to start from; null: the weights in hf_path. A converted one also works as "
        "hf_path, since it includes config.json and tokenizer",
        resume="fixed",
    )
    overrides: dict[str, Any] = setting({}, "Fields of config.json to replace, e.g. the context length", resume="fixed")
    dtype: Literal["bfloat16", "float32"] = setting("bfloat16", "Dtype of weights and activations", resume="fixed")
    fp32_logits: bool = setting(
        False, "Compute the LM head in float32 instead of `dtype`; softmax always is float32", resume="fixed"
    )
    lm_head_chunk_tokens: int | None = setting(
        None, "Rows of logits computed at a time; null: 4096 on GPUs, else 512", resume="free", at_least=1
    )
    recompute: Literal["none", "selective", "full"] = setting("none", "Activation recomputation", resume="free")
    transformer_engine: Literal["auto", "on", "off"] = setting(
        "auto",
        "Transformer Engine's kernels. auto: if it is installed and there is a GPU. off: torch's layers and AdamW",
        resume="free",
    )

    @property
    def weights(self) -> str:
        """Return the path of the weights that the policy begins with."""
        return self.megatron_path or self.hf_path

    def chunk_tokens(self, on_gpu: bool) -> int:
        """Return `lm_head_chunk_tokens`, or the device's default.

        On a GPU each chunk reads and writes the head's float32 gradient once, which is cheap relative to the matmuls
        of 4096 rows; a CPU gains less, and its logits may be float32.
        """
        return self.lm_head_chunk_tokens or (4096 if on_gpu else 512)


@section
@dataclass(frozen=True)
class ParallelConfig:
    """Layout of the ranks."""

    world_size: int = setting(
        1, "Number of ranks; `train` starts them unless torchrun or srun already did", resume="free", at_least=1
    )
    tensor: int = setting(1, "Tensor-parallel size (TP)", resume="free", at_least=1)
    pipeline: int = setting(1, "Pipeline stages (PP)", resume="free", at_least=1)
    virtual_pipeline: int = setting(1, "Model chunks per pipeline stage; 1: no interleaving", resume="free", at_least=1)
    context: int = setting(1, "Context-parallel size (CP): ranks that split each sequence", resume="free", at_least=1)
    sequence: bool = setting(False, "Sequence parallelism inside the tensor-parallel group", resume="free")
    expert: int = setting(
        1, "Ranks that share the experts; taken from the tensor, context and data axes", resume="free", at_least=1
    )
    first_stage_layers: int | None = setting(
        None, "Uneven pipeline: layers of the first stage; null: as the others", resume="free", at_least=1
    )
    last_stage_layers: int | None = setting(
        None, "Uneven pipeline: layers of the last stage; null: as the others", resume="free", at_least=1
    )
    pipeline_layout: str | None = setting(
        None,
        "Free placement on virtual stages in Megatron-Core's notation, e.g. Et*3|t*4|t*4|t*3L: E embedding, t decoder "
        "layer, L LM head; null: equal stages, or by first_stage_layers and last_stage_layers",
        resume="free",
    )
    sequence_chunks: int = setting(
        1,
        "Chunks of each micro-batch's tokens that go through the pipeline one after another: activations of about PP + "
        "chunks, instead of PP times chunks; 1: whole micro-batches",
        resume="free",
        at_least=1,
    )
    timeout_minutes: float = setting(
        30.0,
        "Maximum wait for other ranks, which may still generate; then the run ends",
        resume="free",
        above=0,
    )
    nccl_timeout_minutes: float = setting(
        20.0,
        "Timeout of NCCL collectives, in which no rank waits long; then the run ends",
        resume="free",
        above=0,
    )
    threads_per_rank: int | None = setting(
        None, "CPU threads of a rank; null: cores divided by local ranks", resume="free", at_least=1
    )

    @property
    def data(self) -> int:
        """Number of data-parallel replicas."""
        return self.world_size // (self.tensor * self.pipeline * self.context)

    @property
    def sequence_alignment(self) -> int:
        """Packed sequences are padded to a multiple of this: zig-zag context chunks, sequence-parallel shards."""
        context = 2 * self.context if self.context > 1 else 1
        return context * (self.tensor if self.sequence else 1)


@section
@dataclass(frozen=True)
class DataConfig:
    """Problem files and prompts."""

    train: str = setting("", "Training data: a parquet file in the DAPO schema", resume="fixed")
    validation: Any = setting(
        None,
        "Validation data: a file, a list of files, or a mapping of names to files. An unnamed file is named after its "
        "stem. Several files are separate benchmarks; overall scores are means over them",
        resume="free",
    )
    max_prompt_tokens: int = setting(
        2048, "Longest prompt; longer ones are dropped and counted", resume="fixed", at_least=1
    )
    shuffle: bool = setting(True, "Another order of the problems in every epoch", resume="fixed")
    chat_template_kwargs: dict[str, Any] = setting(
        {}, "Variables of the chat template, e.g. {enable_thinking: false}", resume="fixed"
    )

    @property
    def benchmarks(self) -> dict[str, str]:
        """Return the files of `validation` by name."""
        given = self.validation or {}
        files = [given] if isinstance(given, str) else given
        return dict(files) if isinstance(files, dict) else {Path(file).stem: file for file in files}


@section
@dataclass(frozen=True)
class RewardConfig:
    """Verification of responses, and the overlong penalty."""

    function: str = setting("dapo", "dapo | math | exact | package.module:function", resume="fixed")
    accuracy_threshold: float | None = setting(
        None,
        "Threshold from which numbers returned by a user function count as correct (accuracy, pass@k). null: 0.5, with "
        "a warning for numbers other than 0, 1 and -1. Training uses the number itself",
        resume="free",
    )
    overlong_buffer_tokens: int = setting(
        4096, "Tokens before the length limit over which the penalty grows; 0: no penalty", resume="fixed", at_least=0
    )
    overlong_penalty_factor: float = setting(
        1.0, "Penalty at the length limit; it grows linearly over the buffer", resume="fixed", at_least=0
    )
    workers: int = setting(2, "Processes of the `math` verifier per data-parallel replica", resume="free", at_least=1)
    timeout_seconds: float = setting(10.0, "Timeout of verifying one answer", resume="free", above=0)
    batch_seconds: float = setting(
        600.0, "Timeout of verifying a replica's batch; remaining answers count as timed out", resume="free", above=0
    )

    @property
    def reads_data_source(self) -> bool:
        """Whether the function is user-defined and receives data sources; built-in ones ignore them."""
        return ":" in self.function


@section
@dataclass(frozen=True)
class AlgorithmConfig(LossConfig):
    """The loss and its regularization."""

    loss: Literal["fipo", "grpo"] = setting(
        "fipo", "grpo: DAPO/GRPO, the same loss with influence weight 1", resume="fixed"
    )
    influence: Literal["fipo", "placebo"] = setting(
        "fipo",
        "placebo: FIPO's influence weights, permuted among a mini-batch's tokens of equal advantage sign; a control of "
        "the credit assignment, which costs one more forward pass",
        resume="fixed",
    )
    kl_coefficient: float = setting(
        0.0,
        "Coefficient of the KL penalty towards the initial policy: the k3 estimate of KL(policy || initial), whose "
        "gradient is on average that of KL(initial || policy)",
        resume="fixed",
        at_least=0,
    )
    entropy_coefficient: float = setting(0.0, "Coefficient of the entropy bonus", resume="fixed")


@section
@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    lr: float = setting(1e-6, "Learning rate of AdamW", resume="fixed", at_least=0)
    warmup: int = setting(10, "Length of the linear warm-up from 0; then constant", resume="fixed", at_least=0)
    warmup_unit: Literal["step", "update"] = setting(
        "step", "Unit of the schedule; the authors' code counts steps", resume="fixed"
    )
    betas: tuple[float, float] = setting((0.9, 0.999), "Betas of AdamW", resume="fixed", at_least=0, below=1)
    eps: float = setting(1e-8, "Epsilon of AdamW", resume="fixed", above=0)
    weight_decay: float = setting(
        0.1,
        "Weight decay of AdamW. Biases and norms have none, as usual in Megatron and unlike verl's FSDP trainer",
        resume="fixed",
        at_least=0,
    )
    grad_clip: float = setting(1.0, "Largest norm of an update's gradient; 0: no clip", resume="fixed", at_least=0)
    distributed: bool = setting(True, "Shard optimizer state over data-parallel ranks", resume="free")
    offload_state: bool = setting(
        False, "Outside updates: optimizer state in host memory, gradient buffers freed", resume="free"
    )
    spike_threshold: float | None = setting(
        None, "Gradient norm above which an update is skipped; null: only non-finite ones", resume="fixed", above=0
    )
    max_consecutive_skips: int = setting(
        3, "Number of consecutive skipped updates that ends the run", resume="fixed", at_least=1
    )


@section
@dataclass(frozen=True)
class TrainerConfig:
    """Steps, batches and what a run writes."""

    max_steps: int = setting(100, "Training steps of the whole run", resume="free", at_least=1)
    mini_batch_prompts: int = setting(
        64,
        "Groups per optimizer update; rollout.prompts_per_step / this = updates per step",
        resume="fixed",
        at_least=1,
    )
    mini_batch_order: Literal["mixed", "groups"] = setting(
        "mixed",
        "mixed: a batch's responses are shuffled, seeded by run.seed and the step, before they are cut into "
        "mini-batches. groups: whole groups, in prompt order",
        resume="fixed",
    )
    epochs_per_batch: int = setting(1, "Passes over a training batch", resume="fixed", at_least=1)
    tokens_per_micro_batch: int = setting(
        20480 + 2048, "Packed tokens of a micro-batch per context-parallel group", resume="free", at_least=1
    )
    micro_batch_order: Literal["longest_first", "shortest_first", "longest_middle"] = setting(
        "longest_middle",
        "Order of a replica's micro-batches. longest_middle: increasing, then decreasing length fills and drains the "
        "pipeline with short ones",
        resume="free",
    )
    strict: bool = setting(False, "Reject, instead of warn about, settings under which FIPO is a no-op", resume="free")
    export_policy: bool = setting(
        True, "Write the trained policy as a Hugging Face checkpoint to <run>/policy", resume="free"
    )
    tensorboard: bool = setting(True, "Also log to <run>/tensorboard", resume="free")
    wandb_project: str | None = setting(
        None, "Also log to this Weights & Biases project (extra `wandb`)", resume="free"
    )


@section
@dataclass(frozen=True)
class EvalConfig:
    """Evaluations on the validation data."""

    every: int = setting(
        5, "Steps between evaluations; 0: only before the first and after the last step", resume="free", at_least=0
    )
    samples: int = setting(32, "Responses per problem (k)", resume="free", at_least=1)
    temperature: float = setting(1.0, "Sampling temperature in evaluations; 0: greedy", resume="free", at_least=0)
    top_p: float = setting(0.7, "Nucleus sampling in evaluations; 1: all tokens", resume="free", above=0, at_most=1)
    max_problems: int | None = setting(
        None, "Number of each benchmark's first problems to use; null: all", resume="free", at_least=1
    )
    pass_k: tuple[int, ...] | None = setting(
        None,
        "Values of j for pass@j, at most `samples`; null: powers of two, and `samples`",
        resume="free",
        at_least=1,
    )
    save: bool = setting(True, "Keep evaluation/step_N.parquet, every response with its score", resume="free")


@section
@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints, and which of them are kept."""

    every: int = setting(
        10,
        "Steps between checkpoints; 0: only when the run is interrupted and after the last step",
        resume="free",
        at_least=0,
    )
    asynchronous: bool = setting(True, "Continue training while a checkpoint is written", resume="free")
    keep_last: int = setting(2, "Number of latest checkpoints to keep", resume="free", at_least=1)
    keep_every: int = setting(
        0, "Keep checkpoints at multiples of this many steps permanently; 0: none", resume="free", at_least=0
    )
    keep_best: bool = setting(
        True,
        "Keep the checkpoint with the highest validation avg@k. The highest of many evaluations is biased upwards: do "
        "not report it, or select on other problems (best_on)",
        resume="free",
    )
    best_on: str | None = setting(
        None,
        "keep_best: name of the benchmark of data.validation that selects. It is left out of the overall scores, which "
        "are those of the other benchmarks. null: the overall avg@k selects",
        resume="fixed",
    )


@section
@dataclass(frozen=True)
class ResumeConfig:
    """Resuming of interrupted runs."""

    allow_changes: bool = setting(
        False, "Continue a run although its model, data, seed or algorithm have changed", resume="free"
    )
    max_requeues: int = setting(
        100, "Maximum number of times that a Slurm job requeues itself", resume="free", at_least=0
    )


@section
@dataclass(frozen=True)
class ProfileConfig:
    """Profiling."""

    pipeline: bool = setting(
        False,
        "Record when each stage computes and waits: metrics of every step, traces/rank_R.json of the latest",
        resume="free",
    )


@section
@dataclass(frozen=True)
class Config:
    """All settings of a run."""

    run: RunConfig = subsection(RunConfig)
    model: ModelConfig = subsection(ModelConfig)
    moe: MoEConfig = subsection(MoEConfig)
    parallel: ParallelConfig = subsection(ParallelConfig)
    data: DataConfig = subsection(DataConfig)
    rollout: RolloutConfig = subsection(RolloutConfig)
    reward: RewardConfig = subsection(RewardConfig)
    algorithm: AlgorithmConfig = subsection(AlgorithmConfig)
    optimizer: OptimizerConfig = subsection(OptimizerConfig)
    trainer: TrainerConfig = subsection(TrainerConfig)
    eval: EvalConfig = subsection(EvalConfig)
    checkpoint: CheckpointConfig = subsection(CheckpointConfig)
    resume: ResumeConfig = subsection(ResumeConfig)
    profile: ProfileConfig = subsection(ProfileConfig)

    @property
    def run_directory(self) -> Path:
        return Path(self.run.directory or f"runs/{self.run.name}")

    @property
    def evaluation_directory(self) -> Path:
        """Return the default output directory of `megatron-fipo eval`: in the run's, with the checkpoint's name."""
        return self.run_directory / "evaluation" / Path(self.model.weights).resolve().name

    @property
    def updates_per_step(self) -> int:
        return self.rollout.prompts_per_step // self.trainer.mini_batch_prompts * self.trainer.epochs_per_batch
