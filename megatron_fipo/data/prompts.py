"""Prompts: unique problems of a file, as token ids."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from megatron_fipo.data.schema import Problem, unique_problems

TOKENIZED_AT_ONCE = 1024
RESERVED = (
    *("messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt"),
    *("continue_final_message", "tokenize", "return_dict", "strftime_now", "padding", "truncation", "return_tensors"),
)


@dataclass(frozen=True)
class TemplateOptions:
    """Options of the chat template.

    Attributes:
        kwargs: template variables, from `data.chat_template_kwargs`.
        now: time for the template's `strftime_now`. A run keeps its start time, so that prompts of templates that
            write the date do not change; None: the present.
    """

    kwargs: Mapping[str, Any] = field(default_factory=dict)
    now: datetime | None = None

    def __post_init__(self) -> None:
        taken = sorted(set(self.kwargs) & set(RESERVED))
        if taken:
            raise ValueError(
                f"data.chat_template_kwargs must not contain {', '.join(taken)}, which the recipe sets; use it "
                "only for the template's own variables, such as enable_thinking"
            )

    def variables(self) -> dict[str, Any]:
        now = self.now
        return {**self.kwargs, **({} if now is None else {"strftime_now": now.strftime})}


@dataclass(frozen=True)
class Prompt:
    index: int  # row of the file it was read from
    messages: list[dict[str, str]]  # {role, content}
    token_ids: list[int]
    data_source: str
    ground_truth: str


@dataclass(frozen=True)
class PromptSet(Sequence[Prompt]):
    """Prompts of one file, with counts of its rows."""

    prompts: tuple[Prompt, ...]
    num_rows: int  # rows of the file
    num_unique: int  # different prompts among them
    num_too_long: int  # of those, dropped

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, i: Any) -> Any:
        return self.prompts[i]

    @property
    def fingerprint(self) -> str:
        """Return a hash of all prompts' tokens, their ground truths and their order."""
        digest = hashlib.sha256()
        for prompt in self.prompts:
            digest.update(repr((prompt.token_ids, prompt.data_source, prompt.ground_truth)).encode())
        return digest.hexdigest()

    def __str__(self) -> str:
        return (
            f"{self.num_rows} rows, {self.num_unique} different prompts, {self.num_too_long} too long, "
            f"{len(self)} prompts used"
        )


def load_prompts(
    path: str | Path,
    tokenizer: Any,
    max_prompt_tokens: int,
    template: TemplateOptions | None = None,
    reads_data_source: bool = False,
) -> PromptSet:
    """Read a parquet file in the DAPO schema; drop and count prompts longer than `max_prompt_tokens`.

    A prompt whose last message is from the assistant is continued there; otherwise the template starts the assistant's
    turn.

    Args:
        reads_data_source: the reward function uses the data source, which then must not be blank.

    Raises:
        ValueError: the file violates the schema, a prompt has two ground truths, the tokenizer has no chat template,
            the template rejects a prompt, or no prompt is left.
    """
    check_chat_template(tokenizer)
    unique = unique_problems(path)
    if unique.contradictions:
        raise ValueError(
            f"{path}: {unique.contradictions[0]} ({len(unique.contradictions)} such prompts in total); "
            "`megatron-fipo data prepare` writes a file without them"
        )
    blank = next((p.row for p in unique.problems if not p.data_source.strip()), None) if reads_data_source else None
    if blank is not None:
        raise ValueError(
            f"{path}, row {blank}: column data_source is blank or missing, but the reward function uses it: fill it in"
        )
    prompts = _tokenize(unique.problems, tokenizer, template or TemplateOptions(), path)
    kept = tuple(prompt for prompt in prompts if len(prompt.token_ids) <= max_prompt_tokens)
    if not kept:
        raise ValueError(
            f"{path}: {unique.num_rows} rows, {len(prompts)} different prompts, none with at most "
            f"{max_prompt_tokens} tokens (data.max_prompt_tokens)"
        )
    return PromptSet(kept, unique.num_rows, unique.num_unique, len(prompts) - len(kept))


def check_chat_template(tokenizer: Any) -> None:
    """Raise ValueError if the tokenizer has no chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"the tokenizer {getattr(tokenizer, 'name_or_path', '')!r} has no chat template, which is required "
            "for base models, too: add a chat_template.jinja to the checkpoint"
        )


def render(messages: Sequence[Mapping[str, str]], tokenizer: Any, template: TemplateOptions) -> str:
    """Return a prompt's text."""
    prefilled = messages[-1]["role"] == "assistant"
    text = tokenizer.apply_chat_template(
        list(messages),
        tokenize=False,
        add_generation_prompt=not prefilled,
        continue_final_message=prefilled,
        **template.variables(),
    )
    assert isinstance(text, str)
    return text


def _tokenize(problems: Sequence[Problem], tokenizer: Any, template: TemplateOptions, path: str | Path) -> list[Prompt]:
    prompts: list[Prompt] = []
    for start in range(0, len(problems), TOKENIZED_AT_ONCE):
        some = problems[start : start + TOKENIZED_AT_ONCE]
        chats = [[{"role": role, "content": content} for role, content in problem.messages] for problem in some]
        texts = [
            _rendered(chat, tokenizer, template, f"{path}, row {p.row}") for chat, p in zip(chats, some, strict=True)
        ]
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]  # the template has added special tokens
        prompts += [
            Prompt(problem.row, chat, list(token_ids), problem.data_source, problem.ground_truth)
            for problem, chat, token_ids in zip(some, chats, ids, strict=True)
        ]
    return prompts


def _rendered(chat: Sequence[Mapping[str, str]], tokenizer: Any, template: TemplateOptions, where: str) -> str:
    try:
        return render(chat, tokenizer, template)
    except Exception as error:  # a template may raise anything, intentionally (raise_exception) or not
        words = " ".join(str(error).split()) or type(error).__name__
        roles = ", ".join(message["role"] for message in chat)
        raise ValueError(
            f"{where}: the chat template of {getattr(tokenizer, 'name_or_path', '')!r} rejects this prompt ({roles}): "
            f"{words}. Change the messages, the template, or data.chat_template_kwargs"
        ) from error
