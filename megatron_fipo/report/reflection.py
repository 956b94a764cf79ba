"""Reflection rate of responses: frequency of marker words in saved rollouts.

A response counts if it contains one of `MARKERS` as whole words, case-insensitive. Only words are counted; languages
other than English count as not reflecting.
"""

from __future__ import annotations

import re
from pathlib import Path

from megatron_fipo.report.saved import first_rows, saved_steps

MARKERS = (
    *("wait", "however", "alternatively", "hold on", "let me check", "let's check", "let me verify", "let's verify"),
    *("double-check", "double check", "recheck", "re-check", "re-examine", "reconsider", "rethink", "go back"),
    *("mistake", "i made an error", "on second thought", "let me try again", "let's try again", "try another"),
)
_PATTERN = re.compile(rf"\b(?:{'|'.join(re.escape(marker) for marker in MARKERS)})\b", re.IGNORECASE)

# Limits, so that a report of a long run takes seconds: number of steps (evenly spaced), and responses per step.
_STEPS = 100
_RESPONSES = 256


def reflection_rates(rollouts: Path) -> dict[int, dict[str, float]]:
    """Return step -> share of responses with a marker and markers per response, of a run's rollouts directory.

    Empty if there are no rollouts, or no response has a marker.

    Raises:
        ValueError: a file is damaged.
    """
    read = {step: first_rows(path, ["response"], _RESPONSES) for step, path in saved_steps(rollouts, _STEPS).items()}
    rates = {step: rate([row["response"] for row in rows]) for step, rows in read.items() if rows is not None}
    return rates if any(rate["reflection/share"] for rate in rates.values()) else {}


def rate(responses: list[str]) -> dict[str, float]:
    """Return the share of responses with a marker, and markers per response."""
    counts = [len(_PATTERN.findall(response)) for response in responses]
    total = max(len(counts), 1)
    return {"reflection/share": sum(c > 0 for c in counts) / total, "reflection/markers": sum(counts) / total}
