"""Made-up rollouts with credit, and texts that would break out of a page that does not escape them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

HOSTILE = (
    "</script><script>window.hacked=1</script>",
    "<img src=x onerror='window.hacked=1'>",
    "&lt;b&gt; & \"quotes\" 'single'",
    "\u2028\u2029\\u003c`${window.hacked=1}`",
    "<!--",
)


def write_rollouts(
    run: Path, step: int, groups: int = 3, size: int = 4, length: int = 12, vocab: int = 40, seed: int = 0
) -> list[dict]:
    """One step's responses, both signs of advantage in each group; returns the rows."""
    random = np.random.default_rng(seed + step)
    rows = []
    for number in range(groups * size):
        tokens = int(random.integers(max(1, length // 2), length + 1))
        old = -random.random(tokens).astype(np.float32)
        shift = (0.05 * random.standard_normal(tokens)).astype(np.float32)
        future = (0.1 * random.standard_normal(tokens)).astype(np.float32)
        rows.append(
            {
                "id": number,
                "prompt": HOSTILE[number % len(HOSTILE)],
                "response": "made up",
                "response_tokens": random.integers(0, vocab, tokens).tolist(),
                "rollout_log_probs": old.tolist(),
                "weight_versions": [step - 1] * tokens,
                "reward": 1.0 if number % size else -1.0,
                "accuracy": float(number % size > 0),
                "advantage": 0.5 if number % size else -1.5,
                "truncated": False,
                "old_log_probs": old.tolist(),
                "new_log_probs": (old + shift).tolist(),
                "future_kl": future.tolist(),
                "influence_weights": np.clip(np.exp(future), 0.8, 1.2).tolist(),
            }
        )
    path = run / "rollouts" / f"step_{step}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return rows


def hostile_text(token: int) -> str:
    return HOSTILE[token] if token < len(HOSTILE) else f" token{token}"
