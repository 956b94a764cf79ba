"""Checks before ranks start and the model is built."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from megatron_fipo import vllm_environment
from megatron_fipo.algorithm import loss_config
from megatron_fipo.config import Config, RewardConfig
from megatron_fipo.convert.distributed import DistributedCheckpoint
from megatron_fipo.convert.load import check_weights
from megatron_fipo.data.prompts import Prompt, TemplateOptions, check_chat_template, load_prompts
from megatron_fipo.data.schema import open_problems
from megatron_fipo.fused_kernels import check_context_parallelism, transformer_engine_problems
from megatron_fipo.model.architecture import Architecture
from megatron_fipo.model.check import check_model
from megatron_fipo.model.stop_tokens import load_tokenizer, stop_token_ids
from megatron_fipo.reward import make_reward
from megatron_fipo.trackers import check_trackers

P = ParamSpec("P")
R = TypeVar("R")


class Problems(list[str]):
    """Messages of the checks that failed.

    Attributes:
        warnings: what the user should know of a run that may start all the same.
    """

    def __init__(self, messages: Sequence[str] = ()) -> None:
        super().__init__(messages)
        self.warnings: list[str] = []

    def attempt(self, check: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R | None:
        """Return what `check` returns, or note the ValueError that it raises."""
        try:
            return check(*args, **kwargs)
        except ValueError as error:
            self.append(str(error))
            return None

    def raise_if_any(self) -> None:
        """Raise a ValueError that lists all of them."""
        if self:
            raise ValueError("\n".join(self))


def check_run(config: Config, *, needs_gpu: bool = True) -> list[str]:
    """Check installation, model, layout, loss, data files, tokenizer and reward; return warnings.

    Args:
        needs_gpu: this machine must have the GPU that the run asks for; False: check only the installation.

    Raises:
        ValueError: everything that is wrong, and what to change.
    """
    problems = run_problems(config, needs_gpu=needs_gpu)
    problems.raise_if_any()
    return problems.warnings


def check_evaluation(config: Config) -> list[str]:
    """Check what sampling from a policy and scoring need, but not training or its data; return warnings.

    Raises:
        ValueError: everything that is wrong, and what to change.
    """
    problems = evaluation_problems(config)
    problems.raise_if_any()
    return problems.warnings


def check_sampling(config: Config) -> list[str]:
    """Check what sampling responses to training prompts needs, but not training; return warnings.

    Raises:
        ValueError: everything that is wrong, and what to change.
    """
    problems = _find_problems(config, [config.data.train], needs_gpu=True)
    problems.raise_if_any()
    return problems.warnings


def run_problems(config: Config, *, needs_gpu: bool = True) -> Problems:
    """List everything that keeps `train` from starting here."""
    problems = _find_problems(config, [config.data.train, *config.data.benchmarks.values()], needs_gpu)
    problems.attempt(loss_config, config.algorithm, config.rollout)
    problems.attempt(check_trackers, config)
    no_op = _no_op_warnings(config)
    if no_op and config.trainer.strict:
        problems.append(f"trainer.strict: {no_op[0]}")
    problems.warnings[:0] = no_op
    return problems


def evaluation_problems(config: Config, *, needs_gpu: bool = True) -> Problems:
    """List everything that keeps `eval` from starting here."""
    return _find_problems(config, list(config.data.benchmarks.values()), needs_gpu)


def check_data(config: Config) -> list[str]:
    """Check the model's config, tokenizer, problem files and reward, not what it takes to run them; return warnings.

    Raises:
        ValueError: everything that is wrong, and what to change.
    """
    problems = Problems()
    architecture = problems.attempt(check_model, config)
    _add_data_problems(problems, config, [config.data.train, *config.data.benchmarks.values()], architecture)
    problems.raise_if_any()
    return problems.warnings


def _find_problems(config: Config, files: Sequence[str], needs_gpu: bool) -> Problems:
    """List what keeps responses to the prompts of these files from being generated and scored here."""
    problems = Problems(transformer_engine_problems(config.model.transformer_engine, needs_gpu=needs_gpu))
    if not problems:
        problems.attempt(check_context_parallelism, config)
    architecture = problems.attempt(check_model, config)
    problems.attempt(vllm_environment.check, config, None if architecture is None else architecture.head_dim)
    if architecture is not None and config.model.megatron_path:
        problems.attempt(_check_checkpoint, config.model.megatron_path, architecture)
    elif architecture is not None and any(Path(config.model.hf_path).glob("*.safetensors*")):
        problems.attempt(check_weights, config.model.hf_path, architecture)
    _add_data_problems(problems, config, files, architecture)
    return problems


def _add_data_problems(
    problems: Problems, config: Config, files: Sequence[str], architecture: Architecture | None
) -> None:
    problems.attempt(_check_reward, config.reward)
    tokenizer = problems.attempt(load_chat_tokenizer, config.model.hf_path)
    prompts = _prompts(config, files, tokenizer, problems)
    if architecture is not None and tokenizer is not None:
        found = problems.attempt(_vocabulary_warnings, config, tokenizer, architecture.vocab_size, prompts)
        problems.warnings += found or []


def load_chat_tokenizer(path: str) -> Any:
    """Return the tokenizer of model.hf_path, which must have a chat template.

    Raises:
        ValueError: it cannot be loaded, or has no chat template.
    """
    try:
        tokenizer = load_tokenizer(path)
    except ValueError as error:
        raise ValueError(f"model.hf_path {path!r} has no usable tokenizer: {error}") from None
    check_chat_template(tokenizer)
    return tokenizer


def _prompts(config: Config, files: Sequence[str], tokenizer: Any, problems: Problems) -> dict[str, Sequence[Prompt]]:
    """Return the prompts of each file as the model will see them, without files that cannot be used."""
    readable = [path for path in files if problems.attempt(_check_problem_file, path)]
    if tokenizer is None:
        return {}
    options = (
        config.data.max_prompt_tokens,
        TemplateOptions(config.data.chat_template_kwargs),
        config.reward.reads_data_source,
    )
    loaded = {path: problems.attempt(load_prompts, path, tokenizer, *options) for path in readable}
    return {path: prompts for path, prompts in loaded.items() if prompts is not None}


def _check_problem_file(path: str) -> bool:
    open_problems(path).close()
    return True


def _check_checkpoint(path: str, architecture: Architecture) -> None:
    DistributedCheckpoint(path).check(architecture)


def _check_reward(config: RewardConfig) -> None:
    make_reward(config).close()


def _vocabulary_warnings(
    config: Config, tokenizer: Any, vocab_size: int, prompts: Mapping[str, Sequence[Prompt]]
) -> list[str]:
    """Return whether tokens have no row in the embedding: added ones that nothing uses may.

    Raises:
        ValueError: the vocabulary itself, a prompt or the end of a response has such tokens; or nothing ends one.
    """
    path = config.model.hf_path
    stops = stop_token_ids(path, tokenizer, config.model.overrides)
    if len(tokenizer) <= vocab_size:
        return []
    sizes = f"the tokenizer of {path!r} has {len(tokenizer)} tokens, but the model's embedding only {vocab_size} rows"
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(f"{sizes}; is it the tokenizer of another model?")
    for token in stops:
        if token >= vocab_size:
            raise ValueError(f"{sizes}, and token {token}, which ends a response, is beyond them")
    for file, some in prompts.items():
        for prompt in some:
            if max(prompt.token_ids, default=0) >= vocab_size:
                token = max(prompt.token_ids)
                name = tokenizer.convert_ids_to_tokens(token)
                raise ValueError(f"{sizes}, and {file}, row {prompt.index}, has the added token {token} ({name!r})")
    return [f"{sizes}. No prompt has a token beyond them, so they do no harm here"]


def _no_op_warnings(config: Config) -> list[str]:
    """Old log-probabilities are the trainer's own at the start of a step, so Future-KL is 0 until the first update."""
    if config.algorithm.loss != "fipo" or config.updates_per_step > 1:
        return []
    return [
        "with one update a step, FIPO is exactly DAPO: Future-KL is 0 and every influence weight 1. "
        f"Lower trainer.mini_batch_prompts (now {config.trainer.mini_batch_prompts} of "
        f"{config.rollout.prompts_per_step} prompts) or raise trainer.epochs_per_batch"
    ]
