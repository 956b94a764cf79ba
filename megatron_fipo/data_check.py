"""`megatron-fipo data check`: prompts as the model sees them, and how the reward scores answers to them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from megatron_fipo.checks import check_data, load_chat_tokenizer
from megatron_fipo.config import Config
from megatron_fipo.data import Prompt, TemplateOptions, load_prompts
from megatron_fipo.model.stop_tokens import stop_token_ids
from megatron_fipo.reward import Score, make_reward
from megatron_fipo.run_log import began

_INCORRECT = ("-987654321", "123456789")  # the first one that is not the ground truth


def show(config: Config, count: int = 3) -> Iterator[str]:
    """Yield lines about `count` prompts of data.train, from its beginning to its end.

    Raises:
        ValueError: as `checks.check_data`; `count` is below 1.
    """
    if count < 1:
        raise ValueError(f"--prompts {count} must be at least 1")
    for warning in check_data(config):
        yield f"warning: {warning}"
    tokenizer = load_chat_tokenizer(config.model.hf_path)
    template = TemplateOptions(config.data.chat_template_kwargs, began(config.run_directory))
    limit = config.data.max_prompt_tokens
    prompts = load_prompts(config.data.train, tokenizer, limit, template, config.reward.reads_data_source)
    yield f"{config.data.train}: {prompts}"
    yield f"a response ends with {_stops(config, tokenizer)}, or after {config.rollout.max_response_tokens} tokens"
    chosen = _spread(prompts.prompts, count)
    scores = _scores(config, chosen)
    for prompt, scored in zip(chosen, scores, strict=True):
        yield from _about(prompt, scored, tokenizer)
    missed = [str(p.index) for p, scored in zip(chosen, scores, strict=True) if scored[0][1].accuracy < 1]
    if missed:
        yield (
            f"warning: reward.function={config.reward.function} scores the ground truth itself as incorrect in "
            f"row(s) {', '.join(missed)}: no response to them can be correct"
        )


def _stops(config: Config, tokenizer: Any) -> str:
    ids = stop_token_ids(config.model.hf_path, tokenizer, config.model.overrides)
    return " or ".join(f"{tokenizer.convert_ids_to_tokens(i)!r} ({i})" for i in ids)


def _spread(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """Return the first prompt, the last one and some in between."""
    count = min(count, len(prompts))
    return [prompts[round(i * (len(prompts) - 1) / max(1, count - 1))] for i in range(count)]


def _scores(config: Config, prompts: Sequence[Prompt]) -> list[list[tuple[str, Score]]]:
    """Return for each prompt a correct, an incorrect and an empty answer with their scores."""
    responses = [_answers(prompt) for prompt in prompts]
    flat = [(response, prompt) for some, prompt in zip(responses, prompts, strict=True) for response in some]
    reward = make_reward(config.reward)
    try:
        scores = reward([r for r, _ in flat], [p.ground_truth for _, p in flat], [p.data_source for _, p in flat])
    finally:
        reward.close()
    scored = iter(zip((r for r, _ in flat), scores, strict=True))
    return [[next(scored) for _ in some] for some in responses]


def _answers(prompt: Prompt) -> list[str]:
    incorrect = next(x for x in _INCORRECT if x != prompt.ground_truth.strip())
    return [f"Answer: {prompt.ground_truth}", f"Answer: {incorrect}", ""]


def _about(prompt: Prompt, scored: Sequence[tuple[str, Score]], tokenizer: Any) -> Iterator[str]:
    yield f"\nrow {prompt.index}, data_source {prompt.data_source!r}, {len(prompt.token_ids)} tokens; the model sees:"
    yield repr(tokenizer.decode(prompt.token_ids, skip_special_tokens=False))
    names = tokenizer.convert_ids_to_tokens(prompt.token_ids)
    yield "tokens: " + " ".join(f"{i}:{name!r}" for i, name in zip(prompt.token_ids, names, strict=True))
    for name, (response, score) in zip(("correct", "incorrect", "empty"), scored, strict=True):
        failure = f", failure {score.failure}" if score.failure else ""
        yield (
            f"{name} answer {response!r}: reward {score.reward:g}, accuracy {score.accuracy:g}, "
            f"answer {score.answer!r}{failure}"
        )
