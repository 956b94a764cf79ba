"""Exact verifier: the text after the last `Answer:` must equal the ground truth."""

from __future__ import annotations

from megatron_fipo.reward.score import Score, binary_score

MARKER = "Answer:"


def score(response: str, ground_truth: str) -> Score:
    """Return +1 or -1, ignoring only surrounding white space."""
    _, found, rest = response.rpartition(MARKER)
    answer = rest.strip() if found else None
    return binary_score(answer == ground_truth.strip(), answer)
