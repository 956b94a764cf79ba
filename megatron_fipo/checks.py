"""Everything that can be checked before ranks start, in one place for `train`, its --dry-run, and `eval`."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer

from megatron_fipo import vllm_environment
from megatron_fipo.algorithm import loss_config
from megatron_fipo.config import Config
from megatron_fipo.convert.distributed import DistributedCheckpoint
from megatron_fipo.data.prompts import check_chat_template
from megatron_fipo.data.schema import open_problems
from megatron_fipo.model.architecture import check_model
from megatron_fipo.reward import make_reward
from megatron_fipo.trackers import check_trackers

_VOCABULARIES = ("tokenizer.json", "vocab.json", "tokenizer.model")


def check_run(config: Config) -> list[str]:
    """Check model, layout, loss, data files, tokenizer and reward; returns warnings.

    Raises:
        ValueError: what is wrong, and what to change.
    """
    check_evaluation(config)
    loss_config(config.algorithm, config.rollout)
    check_trackers(config)
    open_problems(config.data.train).close()
    warnings = _no_op_warnings(config)
    if warnings and config.trainer.strict:
        raise ValueError(f"trainer.strict: {warnings[0]}")
    return warnings


def check_evaluation(config: Config) -> None:
    """Check what it takes to draw from a policy and to judge it: nothing of training, nor its data.

    Raises:
        ValueError: what is wrong, and what to change.
    """
    architecture = check_model(config)
    if config.model.megatron_path:
        DistributedCheckpoint(config.model.megatron_path).check(architecture)
    vllm_environment.check(config, architecture.head_dim)
    for path in config.data.benchmarks.values():
        open_problems(path).close()
    _check_tokenizer(config.model.hf_path, architecture.vocab_size)
    make_reward(config.reward).close()


def _check_tokenizer(path: str, vocab_size: int) -> None:
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


def _no_op_warnings(config: Config) -> list[str]:
    """Old log-probabilities are the trainer's own at the start of a step, so Future-KL is 0 until the first update."""
    if config.algorithm.loss != "fipo" or config.updates_per_step > 1:
        return []
    return [
        "with one update a step, FIPO is exactly DAPO: Future-KL is 0 and every influence weight 1. "
        f"Lower trainer.mini_batch_prompts (now {config.trainer.mini_batch_prompts} of "
        f"{config.rollout.prompts_per_step} prompts) or raise trainer.epochs_per_batch"
    ]
