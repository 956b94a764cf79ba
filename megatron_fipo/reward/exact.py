"""The strictest verifier: what follows the last `Answer:` is the ground truth, character for character."""

from __future__ import annotations

from megatron_fipo.reward.score import Score, right_or_wrong

MARKER = "Answer:"


def score(response: str, ground_truth: str) -> Score:
    """+1 / -1. Surrounding white space is ignored, nothing else is."""
    _, found, rest = response.rpartition(MARKER)
    answer = rest.strip() if found else None
    return right_or_wrong(answer == ground_truth.strip(), answer)
