"""Prompts as chat templates make them: prefilled turns, the date, variables, refusals; data as published."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.data import TemplateOptions, load_prompts, prepare
from tests.data.problems import TEMPLATE, character_tokenizer, row, write

TURNS = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if enable_thinking is defined and not enable_thinking %}"
    "<think></think>{% endif %}{% endif %}"
)
TRIMMED = TURNS.replace("m['content']", "m['content'] | trim")
DATED = "{{ strftime_now('%d %b %Y') }}|" + TURNS
DATE_IF_DEFINED = "{% if strftime_now is defined %}{{ strftime_now('%Y-%m-%d') }}{% endif %}|" + TURNS
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TURNS
)
ALTERNATING = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}{% endfor %}" + TURNS
)


def _chat(*messages: tuple[str, str], **columns: Any) -> dict[str, Any]:
    return {**row(""), "prompt": [{"role": role, "content": content} for role, content in messages], **columns}


def _text(tmp_path: Path, problem: dict[str, Any], template: str, options: TemplateOptions | None = None) -> str:
    path = write([problem], tmp_path / "p.parquet")
    (prompt,) = load_prompts(path, character_tokenizer(chat_template=template), 1000, options)
    return "".join(map(chr, prompt.token_ids))


@pytest.mark.parametrize(
    ("messages", "template", "expected"),
    [
        ([("user", "1+1?"), ("assistant", "<think>")], TURNS, "<user>1+1?</s><assistant><think>"),
        ([("user", "1+1?"), ("assistant", "Let me see: ")], TURNS, "<user>1+1?</s><assistant>Let me see: "),
        ([("user", "1+1?"), ("assistant", "<think>\n")], TRIMMED, "<user>1+1?</s><assistant><think>"),
        ([("system", "s"), ("user", "u"), ("assistant", "a")], TURNS, "<system>s</s><user>u</s><assistant>a"),
        ([("user", "u"), ("assistant", "")], TURNS, "<user>u</s><assistant>"),
        (
            [("user", "u"), ("assistant", "a"), ("user", "v")],
            TURNS,
            "<user>u</s><assistant>a</s><user>v</s><assistant>",
        ),
        ([("user", "u"), ("assistant", "a")], TEMPLATE, "<user>u<assistant>a"),
    ],
)
def test_a_last_message_of_the_assistant_is_continued(
    tmp_path: Path, messages: list[tuple[str, str]], template: str, expected: str
) -> None:
    """It is neither closed nor followed by a new turn; other prompts open the assistant's turn."""
    assert _text(tmp_path, _chat(*messages), template) == expected


def test_a_file_may_have_both_kinds_of_prompts(tmp_path: Path) -> None:
    """Each prompt is treated by its own last message."""
    path = write([_chat(("user", "a")), _chat(("user", "b"), ("assistant", "c"))], tmp_path / "p.parquet")
    prompts = load_prompts(path, character_tokenizer(chat_template=TURNS), 1000)
    assert ["".join(map(chr, p.token_ids)) for p in prompts] == ["<user>a</s><assistant>", "<user>b</s><assistant>c"]


@pytest.mark.parametrize(("template", "date"), [(DATED, "28 Nov 2026"), (DATE_IF_DEFINED, "2026-11-28")])
def test_templates_are_told_the_kept_date(tmp_path: Path, template: str, date: str) -> None:
    """`strftime_now` tells the time that it is given, not the present."""
    options = TemplateOptions(now=datetime(2026, 11, 28, 23, 59))
    assert _text(tmp_path, row("a"), template, options) == f"{date}|<user>a</s><assistant>"


def test_fingerprints_do_not_change_at_midnight(tmp_path: Path) -> None:
    """Prompts that were made with one time are the same on any day; without it they are not."""
    path, tokenizer = write([row("a")], tmp_path / "p.parquet"), character_tokenizer(chat_template=DATED)
    kept = [load_prompts(path, tokenizer, 1000, TemplateOptions(now=datetime(2026, 1, day))) for day in (1, 1, 2)]
    assert kept[0].fingerprint == kept[1].fingerprint != kept[2].fingerprint


@pytest.mark.parametrize(("kwargs", "suffix"), [({}, ""), ({"enable_thinking": False}, "<think></think>")])
def test_variables_reach_the_template(tmp_path: Path, kwargs: dict[str, Any], suffix: str) -> None:
    """data.chat_template_kwargs are variables of the template."""
    assert _text(tmp_path, row("a"), TURNS, TemplateOptions(kwargs)) == f"<user>a</s><assistant>{suffix}"


@pytest.mark.parametrize("name", ["add_generation_prompt", "messages", "strftime_now", "tokenize"])
def test_variables_of_the_recipe_are_refused(name: str) -> None:
    """Arguments that the recipe sets itself cannot be set otherwise."""
    with pytest.raises(ValueError, match=rf"data\.chat_template_kwargs must not contain {name}, which the recipe sets"):
        TemplateOptions({name: True})


@pytest.mark.parametrize(
    ("template", "messages", "words"),
    [
        (NO_SYSTEM, [("system", "s"), ("user", "u")], "(system, user): System role not supported"),
        (ALTERNATING, [("user", "u"), ("user", "v")], "(user, user): roles must alternate user/assistant"),
        ("{{ messages[0]['content'] + 1 }}", [("user", "u")], "can only concatenate str"),
        ("{% if %}", [("user", "u")], "Expected an expression"),
        ("{{ missing.field }}", [("user", "u")], "'missing' is undefined"),
    ],
)
def test_templates_that_refuse_name_row_and_words(
    tmp_path: Path, template: str, messages: list[tuple[str, str]], words: str
) -> None:
    """Whatever a template raises is one ValueError with the file, the row and the template's own words."""
    path = write([_chat(*messages)], tmp_path / "p.parquet")
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}, row 0: the chat template.*{re.escape(words)}"):
        load_prompts(path, character_tokenizer(chat_template=template), 1000)


def test_the_row_that_is_refused_is_named(tmp_path: Path) -> None:
    """Rows before it are in order."""
    path = write([_chat(("user", "a")), _chat(("system", "s"), ("user", "b"))], tmp_path / "p.parquet")
    with pytest.raises(ValueError, match=r"row 1: the chat template"):
        load_prompts(path, character_tokenizer(chat_template=NO_SYSTEM), 1000)


@pytest.mark.parametrize("content", ["", " ", "\n"])
def test_blank_system_messages_are_kept(tmp_path: Path, content: str) -> None:
    """A template with a default system message gives another text without one."""
    text = _text(tmp_path, _chat(("system", content), ("user", "u")), TURNS)
    assert text == f"<system>{content}</s><user>u</s><assistant>"


@pytest.mark.parametrize(("truth", "text"), [(73, "73"), (-3, "-3"), (3.0, "3"), (0.25, "0.25"), (2**53, str(2**53))])
def test_ground_truths_may_be_numbers(tmp_path: Path, truth: float, text: str) -> None:
    """They are the text of the number, without a point where it is whole."""
    path = write([{**row("a"), "reward_model": {"ground_truth": truth}}], tmp_path / "p.parquet")
    (prompt,) = load_prompts(path, character_tokenizer(), 1000)
    assert prompt.ground_truth == text


@pytest.mark.parametrize("truth", [True, float("nan"), None, " "])
def test_ground_truths_that_are_none(tmp_path: Path, truth: Any) -> None:
    """Truth values, missing numbers and blanks are no answers."""
    path = write([{**row("a"), "reward_model": {"ground_truth": truth}}], tmp_path / "p.parquet")
    with pytest.raises(ValueError, match=r"row 0: column reward_model\.ground_truth must be"):
        load_prompts(path, character_tokenizer(), 1000)


@pytest.mark.parametrize("change", [{"data_source": ""}, {"data_source": " "}, {"data_source": None}, "absent"])
def test_data_sources_may_be_missing(tmp_path: Path, change: Any) -> None:
    """Unless the reward function gets them: then the first such row is named."""
    rows = [row("a"), row("b")]
    rows = [{k: v for k, v in r.items() if k != "data_source"} for r in rows] if change == "absent" else rows
    if change != "absent":
        rows[1] |= change
    path = write(rows, tmp_path / "p.parquet")
    assert len(load_prompts(path, character_tokenizer(), 1000)) == 2
    with pytest.raises(ValueError, match=rf"row {0 if change == 'absent' else 1}: column data_source is blank"):
        load_prompts(path, character_tokenizer(), 1000, reads_data_source=True)


def test_prepare_takes_data_as_published(tmp_path: Path) -> None:
    """Blank systems, numbers and no data source pass through `data prepare` as they are."""
    problem = {"prompt": row("a")["prompt"], "reward_model": {"ground_truth": 7}}
    problem["prompt"] = [{"role": "system", "content": ""}, *problem["prompt"]]
    prepare(write([problem, problem], tmp_path / "in.parquet"), tmp_path / "out.parquet")
    (prompt,) = load_prompts(tmp_path / "out.parquet", character_tokenizer(), 1000)
    assert (prompt.ground_truth, prompt.data_source, prompt.messages[0]["content"]) == ("7", "", "")
