"""How often responses look back at themselves: a rate of marker words, from saved rollouts.

A response reflects if it holds one of `MARKERS` as whole words, in any case. It is a count of words, no judgement of
what they do; languages other than English count as not reflecting.
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

# A report of a long run is drawn in seconds: this many steps, evenly, and of each this many responses.
_STEPS = 100
_RESPONSES = 256


def reflection_rates(rollouts: Path) -> dict[int, dict[str, float]]:
    """Step -> share of responses with a marker and markers a response, of a run's rollouts directory.

    {} where there are none, or no response has a marker.

    Raises:
        ValueError: a file is damaged.
    """
    read = {step: first_rows(path, ["response"], _RESPONSES) for step, path in saved_steps(rollouts, _STEPS).items()}
    rates = {step: rate([row["response"] for row in rows]) for step, rows in read.items() if rows is not None}
    return rates if any(rate["reflection/share"] for rate in rates.values()) else {}


def rate(responses: list[str]) -> dict[str, float]:
    counts = [len(_PATTERN.findall(response)) for response in responses]
    total = max(len(counts), 1)
    return {"reflection/share": sum(c > 0 for c in counts) / total, "reflection/markers": sum(counts) / total}
