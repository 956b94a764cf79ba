"""How often responses look back at themselves: a rate of marker words, from saved rollouts.

A response reflects if it holds one of `MARKERS` as whole words, in any case. It is a count of words, no judgement of
what they do; languages other than English count as not reflecting.
"""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

MARKERS = (
    *("wait", "however", "alternatively", "hold on", "let me check", "let's check", "let me verify", "let's verify"),
    *("double-check", "double check", "recheck", "re-check", "re-examine", "reconsider", "rethink", "go back"),
    *("mistake", "i made an error", "on second thought", "let me try again", "let's try again", "try another"),
)
_PATTERN = re.compile(rf"\b(?:{'|'.join(re.escape(marker) for marker in MARKERS)})\b", re.IGNORECASE)

# A report of a long run is drawn in seconds: this many steps, evenly, and of each this many responses.
_STEPS = 100
_RESPONSES = 256


def reflection_rates(rollouts: Path) -> dict[int, dict[str, float]]:
    """Step -> share of responses with a marker and markers a response, of a run's rollouts directory.

    {} where there are none, or no response has a marker.

    Raises:
        ValueError: a file is damaged.
    """
    steps = sorted((step_of(path), path) for path in rollouts.glob("step_*.parquet"))
    chosen = (
        steps if len(steps) <= _STEPS else [steps[round(i * (len(steps) - 1) / (_STEPS - 1))] for i in range(_STEPS)]
    )
    rates = {step: rate(_responses(path)) for step, path in chosen}
    return rates if any(rate["reflection/share"] for rate in rates.values()) else {}


def rate(responses: list[str]) -> dict[str, float]:
    counts = [len(_PATTERN.findall(response)) for response in responses]
    total = max(len(counts), 1)
    return {"reflection/share": sum(c > 0 for c in counts) / total, "reflection/markers": sum(counts) / total}


def step_of(path: Path) -> int:
    """Of rollouts/step_N.parquet, a file or a directory of parts."""
    return int(path.name.removesuffix(".parquet").rpartition("_")[2])


def parts_of(path: Path) -> list[Path]:
    """The files of a step's rollouts."""
    return sorted(path.glob("part-*.parquet")) if path.is_dir() else [path]


def _responses(path: Path) -> list[str]:
    texts: list[str] = []
    for part in parts_of(path):
        try:
            with pq.ParquetFile(part) as file:
                batch = next(file.iter_batches(_RESPONSES - len(texts), columns=["response"]), None)
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{part} is no rollouts file: {error}") from None
        texts += batch.column(0).to_pylist() if batch is not None else []
        if len(texts) >= _RESPONSES:
            break
    return texts
