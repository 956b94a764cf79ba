"""The token-credit page holds what the rollouts file says, stays small, and no response can break out of it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_fipo.config import to_yaml
from megatron_fipo.report import credit
from megatron_fipo.report.history import read_run
from megatron_fipo.report.page import write_report
from tests.report.test_report import CONFIG, rows_of, write_run
from tests.support.policies import save_tokenizer
from tests.support.saved_rollouts import HOSTILE, hostile_text, write_rollouts


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of groups of four."""
    write_run(tmp_path, rows_of(3))
    config = replace(CONFIG, rollout=replace(CONFIG.rollout, group_size=4))
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    return tmp_path


def data_of(run: Path) -> dict:
    page = (run / "credit.html").read_text()
    return json.loads(re.search(r"id=data>(.*?)</script>", page, re.DOTALL).group(1))


def page_of(run: Path) -> dict:
    assert credit.write_credit_page(read_run(run), "name") == run / "credit.html"
    return data_of(run)


def test_numbers_are_the_file_s(run: Path) -> None:
    """Every response of a small run is there, its tokens' numbers to a thousandth."""
    written = {(step, row["id"]): row for step in (1, 2, 3) for row in write_rollouts(run, step)}
    data = page_of(run)
    assert len(data["responses"]) == len(written) == 36
    for shown in data["responses"]:
        row = written[shown["step"], shown["id"]]
        assert [data["texts"][t] for t in shown["tokens"]] == [f"⟨{t}⟩" for t in row["response_tokens"]]
        for short, column in (("w", "influence_weights"), ("s", "future_kl"), ("old", "old_log_probs")):
            assert [value / 1000 for value in shown[short]] == pytest.approx(row[column], abs=5.1e-4)
        assert [value / 1000 for value in shown["new"]] == pytest.approx(row["new_log_probs"], abs=5.1e-4)
        assert (shown["advantage"], shown["group"], shown["length"]) == (
            row["advantage"],
            row["id"] // 4,
            len(shown["w"]),
        )
        assert shown["versions"] == [[0, shown["step"] - 1]]


def test_hostile_texts_stay_texts(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Markup, quotes, ends of scripts and templates come back from the data unchanged, and nowhere else."""
    monkeypatch.setattr(credit, "_token_text", lambda run: hostile_text)
    write_rollouts(run, 1)
    credit.write_credit_page(read_run(run), "<b>&\"'{{data}}")  # a name may look like the template's own places
    page = (run / "credit.html").read_text()
    assert page.count("</script>") == 2
    assert "\u2028" not in page
    data = data_of(run)
    assert set(HOSTILE) <= {*data["texts"], *(r["prompt"] for r in data["responses"])}
    assert "<img" not in page
    script = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]+)"', page)
    assert "default-src 'none';" in policy
    assert f"script-src 'sha256-{digest}'" in policy
    assert len(script) == 1
    assert "<title>&lt;b&gt;&amp;" in page


def test_whole_groups_up_to_the_budget(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for a part of the tokens, every group that is shown is whole."""
    monkeypatch.setattr(credit, "_TOKENS", 100)
    write_rollouts(run, 1, groups=6)
    shown = page_of(run)["responses"]
    groups = [r["group"] for r in shown]
    assert 1 <= len(set(groups)) < 6
    assert all(groups.count(g) == 4 for g in groups)
    assert sum(len(r["tokens"]) for r in shown) <= 100


def test_groups_that_were_credited_come_first(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where not all groups have room, those of a step's first update, whose weights are all 1, are left out."""
    monkeypatch.setattr(credit, "_TOKENS", 120)
    rows = write_rollouts(run, 1, groups=4)
    for row in rows[:8]:
        row["influence_weights"] = [1.0] * len(row["influence_weights"])
    pq.write_table(pa.Table.from_pylist(rows), run / "rollouts" / "step_1.parquet")
    assert {2, 3} <= {r["group"] for r in page_of(run)["responses"]}


def test_a_long_run_stays_small(run: Path) -> None:
    """20 steps of long responses: eight steps, first and last among them, 60,000 tokens, below 5 MB."""
    for step in range(1, 21):
        write_rollouts(run, step, groups=4, length=2500, vocab=30_000)
    data = page_of(run)
    steps = sorted({r["step"] for r in data["responses"]})
    assert (steps[0], steps[-1], len(steps)) == (1, 20, 8)
    assert sum(len(r["tokens"]) for r in data["responses"]) <= 60_000
    assert (run / "credit.html").stat().st_size < 5e6


def test_long_texts_leave_fewer_tokens(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens of a thousand characters each: the page stays below 5 MB all the same."""
    monkeypatch.setattr(credit, "_token_text", lambda run: lambda token: f"{token:>1000}")
    write_rollouts(run, 1, groups=8, length=500, vocab=100_000)
    assert page_of(run)["responses"]
    assert (run / "credit.html").stat().st_size < 5e6


def test_most_credited_tokens(run: Path) -> None:
    """Tokens that were seen five times or more, by mean influence weight over all steps that were read."""
    rows = [row for step in (1, 2) for row in write_rollouts(run, step, vocab=6)]
    found = page_of(run)["credited"]
    sums = {t: [] for t in range(6)}
    for row in rows:
        for token, weight in zip(row["response_tokens"], row["influence_weights"], strict=True):
            sums[token].append(weight)
    expected = sorted(((sum(w) / len(w), f"⟨{t}⟩", len(w)) for t, w in sums.items()), reverse=True)
    assert [(f["text"], f["count"]) for f in found] == [(text, count) for _, text, count in expected]
    assert [f["weight"] for f in found] == pytest.approx([mean for mean, _, _ in expected], abs=1e-4)


def test_texts_are_the_tokenizer_s(run: Path) -> None:
    """With the run's tokenizer at hand, tokens are text."""
    (run / "policy").mkdir()
    tokenizer = save_tokenizer(run / "policy")
    write_rollouts(run, 1, vocab=20)
    data = page_of(run)
    assert set(data["texts"]) <= {tokenizer.decode([t]) for t in range(20)}
    assert len(data["texts"]) > 10


@pytest.mark.usefixtures("no_figures")
def test_no_credit_no_page(run: Path) -> None:
    """Rollouts without credit, or none, leave no page, and take an old one away; the report has no link then."""
    write_rollouts(run, 1)
    assert "token credit: " in write_report(run)
    assert '<a href="credit.html">' in (run / "report.html").read_text()
    path = run / "rollouts" / "step_1.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["influence_weights"]), path)
    assert "token credit: " not in write_report(run)
    assert not (run / "credit.html").exists()
    assert "credit.html" not in (run / "report.html").read_text()


def test_parts_of_replicas(run: Path) -> None:
    """A step whose replicas wrote a part each is read from all of them."""
    write_rollouts(run, 1)
    table = pq.read_table(run / "rollouts" / "step_1.parquet")
    (run / "rollouts" / "step_1.parquet").unlink()
    (run / "rollouts" / "step_1.parquet").mkdir()
    for part, ids in ((0, range(0, 12, 2)), (1, range(1, 12, 2))):
        pq.write_table(table.take(pa.array(ids)), run / "rollouts" / "step_1.parquet" / f"part-{part}.parquet")
    assert sorted(r["id"] for r in page_of(run)["responses"]) == list(range(12))


def test_a_damaged_file_is_named(run: Path) -> None:
    """Bytes that are no parquet are an error that names the file."""
    (run / "rollouts").mkdir()
    (run / "rollouts" / "step_1.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"step_1\.parquet is not a valid rollouts file"):
        write_report(run)


@pytest.mark.parametrize(("column", "value"), [("influence_weights", float("nan")), ("future_kl", float("inf"))])
def test_numbers_that_are_not_finite(run: Path, column: str, value: float) -> None:
    """For a run that has diverged, the responses that can be shown are shown, and the others counted."""
    rows = write_rollouts(run, 1)
    path = run / "rollouts" / "step_1.parquet"
    rows[0][column] = [value] * len(rows[0]["response_tokens"])
    rows[1]["new_log_probs"] = [-float("inf")] * len(rows[1]["response_tokens"])
    pq.write_table(pa.Table.from_pylist(rows), path)
    data = page_of(run)
    assert data["skipped"] == 1
    assert {r["id"] for r in data["responses"]} == set(range(1, 12))
    assert {r["id"]: r for r in data["responses"]}[1]["new"][0] == -(10**12)


@pytest.mark.usefixtures("no_figures")
def test_files_that_are_no_steps(run: Path) -> None:
    """A file of another name beside the rollouts is passed over."""
    write_rollouts(run, 1)
    (run / "rollouts" / "step_x.parquet").write_bytes(b"")
    (run / "rollouts" / "step_.parquet").mkdir()
    page_of(run)
    write_report(run)


@pytest.mark.parametrize(
    "changes",
    [
        {"id": None},
        {"prompt": 3},
        {"reward": "high"},
        {"response_tokens": None},
        {"response_tokens": [-1]},
        {"influence_weights": [1.0]},
        {"future_kl": ["x"]},
        {"truncated": 1},
    ],
)
def test_rollouts_of_another_kind(run: Path, changes: dict) -> None:
    """A column of another type or length is told with the file's name."""
    rows = [{**row, **changes} for row in write_rollouts(run, 1)]
    pq.write_table(pa.Table.from_pylist(rows), run / "rollouts" / "step_1.parquet")
    with pytest.raises(ValueError, match=r"step_1\.parquet is not a valid rollouts file: a column has"):
        credit.write_credit_page(read_run(run), "name")
