"""Page <run>/credit.html: responses of a run with every token shaded by its credit in the loss.

The page shows a subset to stay small: of at most 8 steps, evenly from the first to the last saved, the first 512
responses are read; of these, whole groups are shown up to 60,000 tokens per step, the most complete groups first, and
among equals those with weights farthest from 1 (weights of a step's first update are all 1), each response up to its
4,000th token. Fewer tokens if the page would exceed 4.5 MB.
Letters: T tokens of a response.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from megatron_fipo.atomic_file import write_atomically
from megatron_fipo.report.history import Run
from megatron_fipo.report.parts import POLICY
from megatron_fipo.report.saved import Row, first_rows, saved_steps

_STEPS, _READ, _TOKENS, _LONGEST = 8, 512, 60_000, 4_000
_PAGE_BYTES = 4_500_000
_CREDITED = 30  # rows in the table of most credited tokens
_SEEN = 5  # minimum occurrences of a token in that table
_TEMPLATE = Path(__file__).with_name("credit.html")
_COLUMNS = (
    *("id", "prompt", "response_tokens", "weight_versions", "truncated"),
    *("reward", "accuracy", "advantage"),
    *("old_log_probs", "new_log_probs", "future_kl", "influence_weights"),
)
_OUTCOMES = ("reward", "accuracy", "advantage")
_FLOATS = ("old_log_probs", "new_log_probs", "future_kl", "influence_weights")
_LARGEST = 1e9  # upper limit of a token's displayed numbers
Text = Callable[[int], str]


def write_credit_page(run: Run, name: str) -> Path | None:
    """Write the page of a finished or live run; return None if no saved rollouts have credit.

    Raises:
        ValueError: a rollouts file is damaged.
    """
    saved = saved_steps(run.directory / "rollouts", _STEPS)
    read = {step: found for step, path in saved.items() if (found := first_rows(path, _COLUMNS, _READ)) is not None}
    for step, found in read.items():
        if not all(map(_is_row, found)):
            raise ValueError(
                f"{saved[step]} is not a valid rollouts file: a column has values of the wrong type or length"
            )
    rows = {step: [row for row in found if _is_finite(row)] for step, found in read.items()}
    skipped = sum(len(found) - len(rows[step]) for step, found in read.items())
    page = run.directory / "credit.html"
    if not any(rows.values()):
        page.unlink(missing_ok=True)
        return None
    text = _token_text(run)
    budget = _TOKENS
    html = _page(rows, text, run, name, budget, skipped)
    while len(html.encode()) > _PAGE_BYTES and budget > 100:
        budget //= 2
        html = _page(rows, text, run, name, budget, skipped)
    write_atomically(page, html)
    return page


def _token_text(run: Run) -> Text:
    """Return a function from token id to text, using the run's tokenizer if it can be loaded."""
    from megatron_fipo.model.stop_tokens import has_tokenizer, load_tokenizer  # not at the top: imports transformers

    for path in (run.directory / "policy", run.setting("model.hf_path")):
        if path and has_tokenizer(Path(path)):
            with contextlib.suppress(ValueError):
                tokenizer = load_tokenizer(path)
                return lambda token: str(tokenizer.decode([token]))
    return lambda token: f"⟨{token}⟩"


def _page(rows: Mapping[int, Sequence[Row]], text: Text, run: Run, name: str, budget: int, skipped: int) -> str:
    size = run.count("rollout.group_size") or 1
    shown = [
        {"step": step, "group": int(row["id"]) // size, **row}
        for step, of_step in rows.items()
        for row in _choose(of_step, size, budget // len(rows))
    ]
    tokens = sorted({token for row in shown for token in row["response_tokens"][:_LONGEST]})
    index = {token: n for n, token in enumerate(tokens)}
    data = {
        "texts": [text(token) for token in tokens],
        "responses": [_response(row, index) for row in shown],
        "credited": _most_credited(rows, text),
        "skipped": skipped,  # responses with non-finite numbers
    }
    head, tail = _TEMPLATE.read_text().split("{{data}}")  # split before names or texts can look like a placeholder
    script = tail.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"{POLICY}; script-src 'sha256-{digest}'"  # allows only the page's own script
    return head.replace("{{policy}}", policy).replace("{{title}}", escape(name)) + _inline(data) + tail


def _is_row(row: Row) -> bool:
    """Return whether every column has the type that `run_log` writes."""
    tokens, versions, floats = row["response_tokens"], row["weight_versions"], [row[column] for column in _FLOATS]
    if not all(isinstance(values, list) and len(values) == len(tokens) for values in (tokens, versions, *floats)):
        return False
    return (
        all(type(number) is int and 0 <= number < 1 << 31 for number in (*tokens, *versions))
        and all(isinstance(number, float) for values in floats for number in values)
        and all(isinstance(row[column], float) for column in _OUTCOMES)
        and (type(row["id"]), type(row["prompt"]), type(row["truncated"])) == (int, str, bool)
    )


def _is_finite(row: Row) -> bool:
    """Return whether the row can be shown; a probability may have become 0, with an infinite logarithm."""
    finite = [[row[column] for column in _OUTCOMES], row["future_kl"], row["influence_weights"]]
    numbers = [row["old_log_probs"], row["new_log_probs"]]
    return bool(all(np.isfinite(v).all() for v in finite) and not any(np.isnan(v).any() for v in numbers))


def _inline(data: Any) -> str:
    """Return JSON that is safe in a script element: no response can end it."""
    text = json.dumps(
        data, separators=(",", ":"), allow_nan=False
    )  # ASCII, so it contains no JavaScript line separators
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _choose(rows: Sequence[Row], group_size: int, budget: int) -> list[Row]:
    """Choose whole groups within the budget, most complete, then most credited first; at least one response."""
    groups: dict[int, list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: int(row["id"])):
        groups[int(row["id"]) // group_size].append(row)
    chosen: list[Row] = []
    for group in sorted(groups.values(), key=lambda group: (-len(group), -_spread(group))):
        length = sum(min(len(row["response_tokens"]), _LONGEST) for row in group)
        if length <= budget:
            chosen += group
            budget -= length
    return chosen or sorted(rows, key=lambda row: len(row["response_tokens"]))[:1]


def _spread(group: Sequence[Row]) -> float:
    """Return the mean distance of the tokens' influence weights from 1."""
    weights = np.concatenate([np.array(row["influence_weights"], dtype=np.float64) for row in group])
    return float(np.abs(weights - 1).mean()) if len(weights) else 0.0


def _response(row: Row, index: Mapping[int, int]) -> dict[str, Any]:
    """Return a response's data; token values in thousandths, to keep the page small."""
    weights = np.array(row["influence_weights"])
    return {
        **{key: row[key] for key in ("step", "group", "id", "prompt", "truncated")},
        **{key: round(float(row[key]), 4) for key in ("reward", "accuracy", "advantage")},
        "length": len(row["response_tokens"]),
        "weight": round(float(weights.mean()), 4) if len(weights) else 1.0,
        "tokens": [index[token] for token in row["response_tokens"][:_LONGEST]],
        "versions": _runs_of(row["weight_versions"][:_LONGEST]),
        **{
            short: _thousandths(row[column][:_LONGEST])
            for short, column in (
                ("w", "influence_weights"),
                ("s", "future_kl"),
                ("old", "old_log_probs"),
                ("new", "new_log_probs"),
            )
        },
    }


def _runs_of(versions: Sequence[int]) -> list[list[int]]:
    """Return [first token, version] at each change of the version."""
    return [[n, v] for n, v in enumerate(versions) if n == 0 or versions[n - 1] != v]


def _thousandths(values: Sequence[float]) -> list[int]:
    return np.rint(np.clip(np.array(values, dtype=np.float64), -_LARGEST, _LARGEST) * 1000).astype(int).tolist()


def _most_credited(rows: Mapping[int, Sequence[Row]], text: Text) -> list[dict[str, Any]]:
    """Return the tokens with the largest mean influence weight over all responses read."""
    count: Counter[int] = Counter()
    weight: defaultdict[int, float] = defaultdict(float)
    future: defaultdict[int, float] = defaultdict(float)
    for row in (row for of_step in rows.values() for row in of_step):
        columns = (row["response_tokens"], row["influence_weights"], row["future_kl"])
        for token, f, s in zip(*columns, strict=True):
            count[token] += 1
            weight[token] += f
            future[token] += s
    often = [token for token in count if count[token] >= _SEEN]
    best = sorted(often, key=lambda token: (-weight[token] / count[token], token))[:_CREDITED]
    return [
        {
            "text": text(token),
            "count": count[token],
            "weight": round(weight[token] / count[token], 4),
            "future_kl": round(future[token] / count[token], 4),
        }
        for token in best
    ]
