"""Published sets by name, with the hub replaced by a local function: no test asks the network for anything."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from typer.testing import CliRunner

from megatron_fipo import cli
from megatron_fipo.data import load_prompts, prepare, published
from tests.data.problems import character_tokenizer, write_as_aime_2024, write_as_dapo_math


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A function that puts a file on the hub as the published `name`; asked for, the hub gives that file."""
    files: dict[tuple[str, str, str], Path] = {}

    def download(repository, file, *, repo_type, revision):
        assert repo_type == "dataset"
        return str(files[repository, file, revision])

    def put(name: str, path: Path, sha256: str | None = None) -> None:
        entry = dataclasses.replace(published.PUBLISHED[name], sha256=sha256 or published.sha256_of(path))
        monkeypatch.setitem(published.PUBLISHED, name, entry)
        files[entry.repository, entry.file, entry.revision] = path

    monkeypatch.setattr(published, "hf_hub_download", download)
    return put


def test_dapo_math_by_name(tmp_path, hub):
    """The repeated rows of DAPO-Math-17k become each problem once, and a contradictory one is dropped and counted."""
    problems = [("1+1?", "2"), ("2+2?", "4"), ("3+3?", "6"), ("2+2?", "5")]
    hub("dapo-math-17k", write_as_dapo_math(problems, 100, tmp_path / "hub.parquet"))
    done = prepare("dapo-math-17k", tmp_path / "train.parquet")
    assert (done.num_rows, done.num_unique, done.num_contradictory) == (400, 3, 1)
    prompts = load_prompts(tmp_path / "train.parquet", character_tokenizer(), 100)
    assert [(p.messages[0]["content"], p.ground_truth) for p in prompts] == [("1+1?", "2"), ("3+3?", "6")]


def test_aime_2024_by_name(tmp_path, hub):
    """The 32 rows of each AIME 2024 problem become one, and columns of another type than DAPO-Math's stay."""
    hub("aime-2024", write_as_aime_2024([("a", "204"), ("b", "25")], 32, tmp_path / "hub.parquet"))
    done = prepare("aime-2024", tmp_path / "aime.parquet")
    assert (done.num_rows, done.num_unique) == (64, 2)
    rows = pq.read_table(tmp_path / "aime.parquet").to_pylist()
    assert [r["extra_info"] for r in rows] == [
        {"index": 0, "raw_problem": "a", "split": None},
        {"index": 1, "raw_problem": "b", "split": None},
    ]


def test_aime_2025_by_name(tmp_path, hub):
    """Bare questions in JSON lines become prompts in the DAPO schema."""
    (tmp_path / "hub.jsonl").write_text('{"problem": "Find $x$.", "answer": "70", "id": "0"}\n')
    hub("aime-2025", tmp_path / "hub.jsonl")
    prepare("aime-2025", tmp_path / "aime.parquet")
    (prompt,) = load_prompts(tmp_path / "aime.parquet", character_tokenizer(), 1000)
    assert prompt.ground_truth == "70"
    assert "\n\nFind $x$.\n\n" in prompt.messages[0]["content"]


def test_summary_names_the_revision(tmp_path, hub):
    """The JSON beside the output tells where the set came from: repository, revision and file."""
    hub("dapo-math-17k", write_as_dapo_math([("a", "1")], 2, tmp_path / "hub.parquet"))
    prepare("dapo-math-17k", tmp_path / "train.parquet")
    assert json.loads((tmp_path / "train.json").read_text())["input"] == (
        "https://huggingface.co/datasets/BytedTsinghua-SIA/DAPO-Math-17k/resolve/"
        "65877096c24ffa7abc4e4fa5edb95cf3413a5674/data/dapo-math-17k.parquet"
    )


def test_revisions_and_checksums_are_pinned():
    """Each set is one file of one commit with one content."""
    for entry in published.PUBLISHED.values():
        assert len(entry.revision) == 40
        assert len(entry.sha256) == 64
        int(entry.revision + entry.sha256, 16)


def test_damaged_download(tmp_path, hub):
    """Another content than the published one is refused, and nothing is written."""
    hub("aime-2024", write_as_aime_2024([("a", "1")], 1, tmp_path / "hub.parquet"), sha256="0" * 64)
    with pytest.raises(ValueError, match=r"hub\.parquet has checksum [0-9a-f]{64}, expected 0{64} for aime-2024"):
        prepare("aime-2024", tmp_path / "out.parquet")
    assert [p.name for p in tmp_path.iterdir()] == ["hub.parquet"]


@pytest.mark.parametrize(("name", "file"), [("dapo-math-17k", "dapo-math-17k.parquet"), ("aime-2025", "test.jsonl")])
def test_without_the_hub(tmp_path, monkeypatch, name, file):
    """Where the hub cannot be reached, exit code 2 and what to download by hand and to run then."""

    def unreachable(*_, **__):
        raise LocalEntryNotFoundError("An error happened while trying to locate the file on the Hub")

    monkeypatch.setattr(published, "hf_hub_download", unreachable)
    monkeypatch.setattr("sys.argv", ["megatron-fipo", "data", "prepare", name, str(tmp_path / "out.parquet")])
    said: list[str] = []
    monkeypatch.setattr(cli.typer, "secho", lambda text, **_: said.append(text))
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert exit.value.code == 2
    assert published.PUBLISHED[name].url in said[0]
    assert f"megatron-fipo data prepare {file} {tmp_path / 'out.parquet'}" in said[0]


def test_a_file_of_that_name_comes_first(tmp_path, monkeypatch):
    """A path is a path, even where it is called like a published set."""
    monkeypatch.chdir(tmp_path)
    write_as_dapo_math([("a", "1")], 3, Path("dapo-math-17k"))
    assert prepare("dapo-math-17k", "out.parquet").num_rows == 3


def test_neither_file_nor_name(tmp_path):
    """Anything else is refused, and the names are listed."""
    with pytest.raises(ValueError, match=r"aime-2026 must be a file .* \(dapo-math-17k, aime-2024, aime-2025\)"):
        prepare("aime-2026", tmp_path / "out.parquet")


def test_command_prints_both_counts(tmp_path):
    """`data prepare` says how many rows there were, how many different prompts, and the checksum of what it wrote."""
    source = write_as_dapo_math([("a", "1"), ("b", "2")], 50, tmp_path / "in.parquet")
    output = tmp_path / "out.parquet"
    result = CliRunner().invoke(cli.app, ["data", "prepare", str(source), str(output)])
    assert result.exit_code == 0
    assert result.output.splitlines() == [
        "100 rows, 2 different prompts, 0 dropped since their rows disagree on the answer",
        f"{output}: 2 problems, sha256 {published.sha256_of(output)}",
    ]
