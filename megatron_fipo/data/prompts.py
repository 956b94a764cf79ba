"""Prompts: the problems of a file, once each, as the token ids that the policy continues."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fipo.data.schema import Problem, unique_problems

TOKENIZED_AT_ONCE = 1024


@dataclass(frozen=True)
class Prompt:
    index: int  # row of the file it was read from
    messages: list[dict[str, str]]  # {role, content}
    token_ids: list[int]
    data_source: str
    ground_truth: str


@dataclass(frozen=True)
class PromptSet(Sequence[Prompt]):
    """The prompts of one file, and how many rows it took to get them."""

    prompts: tuple[Prompt, ...]
    num_rows: int  # in the file
    num_unique: int  # different prompts among them
    num_too_long: int  # of those, left out

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, i: Any) -> Any:
        return self.prompts[i]

    @property
    def fingerprint(self) -> str:
        """Changes with any token of any prompt, with any ground truth and with their order."""
        digest = hashlib.sha256()
        for prompt in self.prompts:
            digest.update(repr((prompt.token_ids, prompt.data_source, prompt.ground_truth)).encode())
        return digest.hexdigest()

    def __str__(self) -> str:
        return (
            f"{self.num_rows} rows, {self.num_unique} different prompts, {self.num_too_long} too long, "
            f"{len(self)} prompts used"
        )


def load_prompts(path: str | Path, tokenizer: Any, max_prompt_tokens: int) -> PromptSet:
    """Read a parquet file in the DAPO schema. Prompts longer than `max_prompt_tokens` are left out and counted.

    Raises:
        ValueError: the file breaks the schema, one prompt has two ground truths, the tokenizer has no chat template,
            or no prompt is left.
    """
    check_chat_template(tokenizer)
    unique = unique_problems(path)
    if unique.contradictions:
        raise ValueError(
            f"{path}: {unique.contradictions[0]} ({len(unique.contradictions)} such prompts in all); "
            "`megatron-fipo data prepare` writes a file without them"
        )
    prompts = _tokenize(unique.problems, tokenizer)
    kept = tuple(prompt for prompt in prompts if len(prompt.token_ids) <= max_prompt_tokens)
    if not kept:
        raise ValueError(
            f"{path}: {unique.num_rows} rows, {len(prompts)} different prompts, and none has at most "
            f"{max_prompt_tokens} tokens (data.max_prompt_tokens)"
        )
    return PromptSet(kept, unique.num_rows, unique.num_unique, len(prompts) - len(kept))


def check_chat_template(tokenizer: Any) -> None:
    """Raise a ValueError where the tokenizer has none."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"the tokenizer {getattr(tokenizer, 'name_or_path', '')!r} has no chat template, and prompts go through it "
            "for base models too; add a chat_template.jinja to the checkpoint"
        )


def _tokenize(problems: Sequence[Problem], tokenizer: Any) -> list[Prompt]:
    prompts: list[Prompt] = []
    for start in range(0, len(problems), TOKENIZED_AT_ONCE):
        some = problems[start : start + TOKENIZED_AT_ONCE]
        chats = [[{"role": role, "content": content} for role, content in problem.messages] for problem in some]
        ids = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=True)["input_ids"]
        prompts += [
            Prompt(problem.row, chat, list(token_ids), problem.data_source, problem.ground_truth)
            for problem, chat, token_ids in zip(some, chats, ids, strict=True)
        ]
    return prompts
