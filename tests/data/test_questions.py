"""Files of bare questions, in the layouts that AIME sets are published in."""

from __future__ import annotations

import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_fipo.data import load_prompts, prepare
from megatron_fipo.reward.dapo import extract_answer
from tests.data.problems import character_tokenizer, write_as_dapo_math

PROBLEM = r"Find $\frac{m}{n}$ for {x} in $\{1, 2\}$."


def truths(path):
    return [row["reward_model"]["ground_truth"] for row in pq.read_table(path).to_pylist()]


def write_lines(rows, path):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_prompt_is_dapos(tmp_path):
    """The problem, braces and all, stands between DAPO's own sentences, which ask for a line `Answer: X`."""
    source = write_lines([{"problem": f" {PROBLEM}\n", "answer": "70", "id": "0"}], tmp_path / "test.jsonl")
    prepare(source, tmp_path / "out.parquet")
    (row,) = pq.read_table(tmp_path / "out.parquet").to_pylist()
    (message,) = row["prompt"]
    assert message["role"] == "user"
    assert message["content"] == (
        "Solve the following math problem step by step. The last line of your response should be of the form "
        "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
        f'{PROBLEM}\n\nRemember to put your answer on its own line after "Answer:".'
    )
    assert extract_answer("... so\nAnswer: 70") == row["reward_model"]["ground_truth"]


def test_schema_is_dapo_maths(tmp_path):
    """Column by column the types of DAPO-Math-17k, so that both can be put into one file."""
    prepare(write_lines([{"problem": "a", "answer": "1"}], tmp_path / "q.jsonl"), tmp_path / "questions.parquet")
    prepare(write_as_dapo_math([("a", "1")], 1, tmp_path / "d.parquet"), tmp_path / "dapo.parquet")
    assert pq.read_schema(tmp_path / "questions.parquet") == pq.read_schema(tmp_path / "dapo.parquet")


@pytest.mark.parametrize(
    ("answer", "truth"),
    [
        ("70", "70"),
        (70, "70"),
        (70.0, "70"),
        ("025", "25"),
        (r"336^\circ", "336"),
        (" 204 ", "204"),
        ("-7", "-7"),
        (r"\frac{1}{2}", r"\frac{1}{2}"),
        ("1.50", "1.50"),
    ],
)
def test_ground_truths(tmp_path, answer, truth):
    """Integers are written as DAPO writes them, whatever their type; anything else stays as it is."""
    prepare(write_lines([{"problem": "a", "answer": answer}], tmp_path / "q.jsonl"), tmp_path / "out.parquet")
    assert truths(tmp_path / "out.parquet") == [truth]


@pytest.mark.parametrize(
    "columns",
    [
        {"problem_idx": pa.array([1, 2]), "problem": ["a", "b"], "answer": pa.array([70, 588])},
        {
            "id": ["0", "1"],
            "problem": ["a", "b"],
            "answer": ["70", "588"],
            "solution": ["..", ".."],
            "year": ["25"] * 2,
        },
        {"ID": ["I-1", "I-2"], "Problem": ["a", "b"], "Solution": ["..", ".."], "Answer": pa.array([70, 588])},
        {"ID": ["1", "2"], "Problem Number": pa.array([1, 2]), "problem": ["a", "b"], "question": ["?", "?"]}
        | {"answer": ["70", "588"]},
        {"question": ["a", "b"], "answer": ["070", "588"]},
    ],
)
def test_published_columns(tmp_path, columns):
    """Parquet with the columns that publishers of AIME use, numbers or texts, in upper or lower case."""
    pq.write_table(pa.table(columns), tmp_path / "q.parquet")
    prepare(tmp_path / "q.parquet", tmp_path / "out.parquet")
    prompts = load_prompts(tmp_path / "out.parquet", character_tokenizer(), 1000)
    assert [p.ground_truth for p in prompts] == ["70", "588"]
    assert ["\n\na\n\n" in prompts[0].messages[0]["content"], "\n\nb\n\n" in prompts[1].messages[0]["content"]] == [
        True
    ] * 2


def test_repeats_and_contradictions(tmp_path):
    """Questions are de-duplicated as problems in the DAPO schema are; `25` and `025` do not contradict each other."""
    rows = [("a", "25"), ("b", "1"), ("a", "025"), ("b", "2")]
    source = write_lines([{"question": q, "answer": a} for q, a in rows], tmp_path / "q.jsonl")
    done = prepare(source, tmp_path / "out.parquet")
    assert (done.num_rows, done.num_unique, done.num_contradictory) == (4, 2, 1)
    assert truths(tmp_path / "out.parquet") == ["25"]


def test_many_questions(tmp_path, monkeypatch):
    """Files longer than one read keep their order and their numbering."""
    monkeypatch.setattr("megatron_fipo.data.questions.ROWS_AT_ONCE", 3)
    source = write_lines([{"problem": f"p{i}", "answer": i} for i in range(8)], tmp_path / "q.jsonl")
    prepare(source, tmp_path / "out.parquet")
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [r["extra_info"]["index"] for r in rows] == [str(i) for i in range(8)]
    assert truths(tmp_path / "out.parquet") == [str(i) for i in range(8)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"problem": "b", "answer": ""}', "row 1: column answer must be a non-blank string, got ''"),
        ('{"problem": "b", "answer": null}', "row 1: column answer must be a non-blank string, got None"),
        ('{"problem": "b", "answer": true}', "row 1: column answer must be a non-blank string, got True"),
        ('{"problem": "b", "answer": 0.5}', "row 1: column answer must be a non-blank string, got 0.5"),
        ('{"question": " ", "answer": "1"}', "row 1: column question must be a non-blank string, got ' '"),
        ('{"text": "b", "answer": "1"}', "row 1 has text, answer, but no problem or question with an answer"),
        ('{"problem": "b"', "line 2 is not JSON"),
        ("[1]", "line 2 must be an object with a problem and an answer, got '[1]'"),
    ],
)
def test_bad_questions(tmp_path, line, message):
    """A row without a question or a usable answer is named, and nothing is written."""
    source = tmp_path / "q.jsonl"
    source.write_text('{"problem": "a", "answer": "1"}\n' + line + "\n")
    with pytest.raises(ValueError, match=re.escape(f"{source}, {message}")):
        prepare(source, tmp_path / "out" / "out.parquet")
    assert [p.name for p in tmp_path.iterdir()] == ["q.jsonl"]
