import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_fipo.data import load_prompts
from tests.data.problems import character_tokenizer, row, write


def test_prompts_are_tokenized_through_the_chat_template(tmp_path):
    """A prompt's tokens are the chat template's text with the generation prompt, exactly."""
    path = write([row("1+2?", "3"), row("2+2?", "4", 7)], tmp_path / "p.parquet")
    first, second = load_prompts(path, character_tokenizer(), max_prompt_tokens=100)
    assert first.token_ids == [ord(c) for c in "<user>1+2?<assistant>"]
    assert first.messages == [{"role": "user", "content": "1+2?"}]
    assert (first.index, first.data_source, first.ground_truth) == (0, "math_dapo", "3")
    assert (second.index, second.ground_truth) == (1, "4")


def test_repeats_and_long_prompts_are_counted(tmp_path):
    """Each prompt is taken once, too long ones are left out, and every count is reported."""
    rows = [row("a"), row("b"), row("a"), row("c" * 50), row("a"), row("b")]
    prompts = load_prompts(write(rows, tmp_path / "p.parquet"), character_tokenizer(), max_prompt_tokens=18)
    assert [p.index for p in prompts] == [0, 1]
    assert (prompts.num_rows, prompts.num_unique, prompts.num_too_long, len(prompts)) == (6, 3, 1, 2)
    assert str(prompts) == "6 rows, 3 different prompts, 1 too long, 2 prompts used"


def test_longest_allowed_prompt_is_kept(tmp_path):
    """`max_prompt_tokens` is inclusive: <user>a<assistant> is 18 tokens."""
    path = write([row("a")], tmp_path / "p.parquet")
    assert len(load_prompts(path, character_tokenizer(), max_prompt_tokens=18)) == 1
    with pytest.raises(ValueError, match=re.escape("none with at most 17 tokens (data.max_prompt_tokens)")):
        load_prompts(path, character_tokenizer(), max_prompt_tokens=17)


def test_fingerprint_follows_the_content(tmp_path):
    """The same problems have the same fingerprint; another ground truth or order has another."""
    files = [[row("a", "1"), row("b", "2")], [row("a", "1"), row("b", "3")], [row("b", "2"), row("a", "1")]]
    paths = [write(rows, tmp_path / f"{i}.parquet") for i, rows in enumerate([*files, files[0]])]
    fingerprints = [load_prompts(path, character_tokenizer(), 100).fingerprint for path in paths]
    assert len(set(fingerprints)) == 3
    assert fingerprints[0] == fingerprints[3]


def test_contradictory_ground_truths(tmp_path):
    """The same prompt with two ground truths is an error that names both rows and the way out."""
    path = write([row("a", "1"), row("b", "2"), row("a", "3")], tmp_path / "p.parquet")
    with pytest.raises(ValueError, match=r"rows 0 and 2 .*'1' and '3' \(1 such .* data prepare"):
        load_prompts(path, character_tokenizer(), 100)


def test_tokenizer_without_chat_template(tmp_path):
    """A tokenizer without a chat template is refused, and the error says what to add."""
    path = write([row("a")], tmp_path / "p.parquet")
    with pytest.raises(ValueError, match=r"no chat template.*chat_template\.jinja"):
        load_prompts(path, character_tokenizer(chat_template=None), 100)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": None}, "row 1: column prompt must be a non-empty list of {role, content}, got None"),
        ({"prompt": []}, "row 1: column prompt must be a non-empty list of {role, content}, got []"),
        (
            {"prompt": [{"role": "user", "content": " "}]},
            "row 1: column prompt.content must be a non-blank string, got ' '",
        ),
        (
            {"prompt": [{"role": None, "content": "a"}]},
            "row 1: column prompt.role must be a non-blank string, got None",
        ),
        ({"reward_model": None}, "row 1: column reward_model must be {ground_truth, style}, got None"),
        (
            {"reward_model": {"ground_truth": None, "style": "rule"}},
            "row 1: column reward_model.ground_truth must be a non-blank string, got None",
        ),
    ],
)
def test_bad_values_name_file_row_and_column(tmp_path, change, message):
    """A value that breaks the schema is an error that says where it stands."""
    path = write([row("a"), {**row("b"), **change}], tmp_path / "p.parquet")
    with pytest.raises(ValueError, match=re.escape(f"{path}, {message}")):
        load_prompts(path, character_tokenizer(), 100)


def test_columns_of_another_type(tmp_path):
    """A prompt that is plain text, a ground truth that is a number or absent: each is named."""
    for change, message in [
        ({"prompt": "1+2?"}, "column prompt must be a non-empty list of {role, content}, got '1+2?'"),
        (
            {"reward_model": {"ground_truth": True}},
            "column reward_model.ground_truth must be a non-blank string, got True",
        ),
        (
            {"reward_model": {"style": "rule"}},
            "column reward_model must be {ground_truth, style}, got {'style': 'rule'}",
        ),
        ({"data_source": 3}, "row 0: column data_source must be a string, got 3"),
        ({"prompt": [{"role": "user", "text": "a"}]}, "must contain {role, content}"),
    ]:
        path = write([{**row("a"), **change}], tmp_path / "p.parquet")
        with pytest.raises(ValueError, match=re.escape(message)):
            load_prompts(path, character_tokenizer(), 100)


def test_bad_files(tmp_path):
    """No file, not parquet, a column that is missing, no rows: each says so."""
    tokenizer = character_tokenizer()
    with pytest.raises(ValueError, match="does not exist"):
        load_prompts(tmp_path / "none.parquet", tokenizer, 100)
    (tmp_path / "text.parquet").write_text("problem,answer\n")
    with pytest.raises(ValueError, match="is not a parquet file"):
        load_prompts(tmp_path / "text.parquet", tokenizer, 100)
    pq.write_table(pa.table({"prompt": ["a"], "answer": ["1"]}), tmp_path / "columns.parquet")
    with pytest.raises(ValueError, match=r"lacks the column\(s\) reward_model; it has prompt, answer"):
        load_prompts(tmp_path / "columns.parquet", tokenizer, 100)
    empty = pa.Table.from_pylist([row("a")]).slice(0, 0)
    pq.write_table(empty, tmp_path / "empty.parquet")
    with pytest.raises(ValueError, match="0 rows"):
        load_prompts(tmp_path / "empty.parquet", tokenizer, 100)
