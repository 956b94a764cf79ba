"""Everything that can be checked before ranks start, in one place for `train`, its --dry-run, `eval` and `doctor`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from transformers import AutoTokenizer

from megatron_fipo import vllm_environment
from megatron_fipo.algorithm import loss_config
from megatron_fipo.config import Config, RewardConfig
from megatron_fipo.convert.distributed import DistributedCheckpoint
from megatron_fipo.convert.load import check_weights
from megatron_fipo.data.prompts import check_chat_template
from megatron_fipo.data.schema import open_problems
from megatron_fipo.fused_kernels import check_context_parallelism, transformer_engine_problems
from megatron_fipo.model.architecture import Architecture, check_model
from megatron_fipo.model.stop_tokens import stop_token_ids
from megatron_fipo.reward import make_reward
from megatron_fipo.trackers import check_trackers

P = ParamSpec("P")
R = TypeVar("R")

_VOCABULARIES = ("tokenizer.json", "vocab.json", "tokenizer.model")


def check_run(config: Config, *, needs_gpu: bool = True) -> list[str]:
    """Check installation, model, layout, loss, data files, tokenizer and reward; returns warnings.

    Args:
        needs_gpu: this machine must have the GPU that the run asks for; False: only the installation must be in order.

    Raises:
        ValueError: everything that is wrong, and what to change.
    """
    _raise(run_problems(config, needs_gpu=needs_gpu))
    return _no_op_warnings(config)


def check_evaluation(config: Config) -> None:
    """Check what it takes to sample from a policy and to score it: nothing of training, nor its data.

    Raises:
        ValueError: everything that is wrong, and what to change.
    """
    _raise(evaluation_problems(config))


def run_problems(config: Config, *, needs_gpu: bool = True) -> list[str]:
    """List everything that keeps `train` from starting here."""
    problems = evaluation_problems(config, needs_gpu=needs_gpu)
    problems.attempt(loss_config, config.algorithm, config.rollout)
    problems.attempt(check_trackers, config)
    problems.attempt(_check_problem_file, config.data.train)
    warnings = _no_op_warnings(config)
    if warnings and config.trainer.strict:
        problems.append(f"trainer.strict: {warnings[0]}")
    return problems


def evaluation_problems(config: Config, *, needs_gpu: bool = True) -> _Problems:
    """List everything that keeps `eval` from starting here."""
    problems = _Problems(transformer_engine_problems(config.model.transformer_engine, needs_gpu=needs_gpu))
    if not problems:
        problems.attempt(check_context_parallelism, config)
    architecture = problems.attempt(check_model, config)
    problems.attempt(vllm_environment.check, config, None if architecture is None else architecture.head_dim)
    for path in config.data.benchmarks.values():
        problems.attempt(_check_problem_file, path)
    if architecture is not None:
        if config.model.megatron_path:
            problems.attempt(_check_checkpoint, config.model.megatron_path, architecture)
        elif any(Path(config.model.hf_path).glob("*.safetensors*")):
            problems.attempt(check_weights, config.model.hf_path, architecture)
        problems.attempt(_check_tokenizer, config.model.hf_path, architecture.vocab_size, config.model.overrides)
    problems.attempt(_check_reward, config.reward)
    return problems


class _Problems(list[str]):
    """Messages of the checks that failed."""

    def attempt(self, check: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R | None:
        """Return what `check` returns, or note the ValueError that it raises."""
        try:
            return check(*args, **kwargs)
        except ValueError as error:
            self.append(str(error))
            return None


def _raise(problems: list[str]) -> None:
    if problems:
        raise ValueError("\n".join(problems))


def _check_problem_file(path: str) -> None:
    open_problems(path).close()


def _check_checkpoint(path: str, architecture: Architecture) -> None:
    DistributedCheckpoint(path).check(architecture)


def _check_reward(config: RewardConfig) -> None:
    make_reward(config).close()


def _check_tokenizer(path: str, vocab_size: int, overrides: dict[str, Any]) -> None:
    if not any((Path(path) / name).is_file() for name in _VOCABULARIES):  # transformers would make an empty one
        raise ValueError(f"model.hf_path {path!r} has no usable tokenizer: none of {', '.join(_VOCABULARIES)} is there")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"model.hf_path {path!r} has no usable tokenizer: {error}") from None
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"the tokenizer of {path!r} has {len(tokenizer)} tokens, but the model's embedding only {vocab_size} rows"
        )
    check_chat_template(tokenizer)
    stop_token_ids(path, tokenizer, overrides)


def _no_op_warnings(config: Config) -> list[str]:
    """Old log-probabilities are the trainer's own at the start of a step, so Future-KL is 0 until the first update."""
    if config.algorithm.loss != "fipo" or config.updates_per_step > 1:
        return []
    return [
        "with one update a step, FIPO is exactly DAPO: Future-KL is 0 and every influence weight 1. "
        f"Lower trainer.mini_batch_prompts (now {config.trainer.mini_batch_prompts} of "
        f"{config.rollout.prompts_per_step} prompts) or raise trainer.epochs_per_batch"
    ]
