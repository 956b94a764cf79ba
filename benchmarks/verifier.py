r"""The `math` verifier compared with plain math-verify: accuracy on known pairs, agreement, and speed.

    python benchmarks/verifier.py [--pairs 10000] [--answers 8192] [--workers 2] [--step-seconds 600] [--samples FILE]

Pairs are random expressions against themselves rewritten and against perturbed ones, in several notations (see
`expressions.py`), nine in ten of them, and decimals against fractions. Their equality is known from values computed
with 60 digits. Task answers are those of the quickstart's arithmetic, correct and incorrect, in forms that models use.
`--samples` uses the recorded answers of an evaluation (its samples.parquet) instead; their correctness is known
for integers, which the quickstart's are.
Plain math-verify gets the same two answers as boxes, with its time limit of 5 s. Speed: `--answers` answers at once,
like a training batch, seven in eight of them task answers and the others random expressions; its share of a
step is of a step of `--step-seconds`.
Prints a table, and as its last line one JSON object with the same results.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from expressions import Case, decimal_case, make_case
from megatron_fipo.config import RewardConfig
from megatron_fipo.reward import RewardFunction, Score, make_reward

_EXAMPLES = 3  # printed examples per kind of difference
_BATCH = 500  # pairs per call, for progress


def corpus(pairs: int, first: int = 0) -> list[Case]:
    """Return the pairs for seeds starting with `first`."""
    return [decimal_case(seed) if seed % 10 == 9 else make_case(seed) for seed in range(first, first + pairs)]


def task_answers(count: int, seed: int = 0) -> list[Case]:
    """Return answers to sums of small numbers, as in the quickstart: correct and incorrect, in many forms."""
    rng = random.Random(seed)
    forms = ("{}", "{}.0", "{}.", r"\text{{{}}}", "{}^\\circ", "0{}", "+{}", "x = {}", r"{}\text{{ units}}", "{}/1")
    cases = []
    for _ in range(count):
        truth = rng.randint(2, 10**6)
        said = truth if rng.random() < 0.5 else truth + rng.choice((-10, -1, 1, 9, 1000))
        form = rng.choice(forms)
        cases.append(Case(str(truth), form.format(said), said == truth, f"task, as {form}"))
    return cases


def recorded_answers(path: Path) -> list[Case]:
    """Return the answers of an evaluation with their ground truths; samples without an answer are skipped.

    Raises:
        ValueError: a ground truth is not an integer.
    """
    rows = pq.read_table(path, columns=["answer", "ground_truth"]).to_pylist()
    return [
        Case(row["ground_truth"], row["answer"], _same_integer(row["answer"], int(row["ground_truth"])), "recorded")
        for row in rows
        if row["answer"] is not None
    ]


def _same_integer(answer: str, truth: int) -> bool:
    try:
        return int(answer) == truth
    except ValueError:
        return False


def ours(reward: RewardFunction, cases: Sequence[Case]) -> list[Score]:
    """Score the cases with the `math` verifier."""
    scores: list[Score] = []
    for start in range(0, len(cases), _BATCH):
        some = cases[start : start + _BATCH]
        scores += reward([rf"\boxed{{{c.answer}}}" for c in some], [c.truth for c in some], [""] * len(some))
        print(f"{len(scores)} of {len(cases)}", end="\r", file=sys.stderr)
    return scores


def bare(cases: Sequence[Case], workers: int) -> list[bool]:
    """Score the cases with math-verify as documented."""
    with ProcessPoolExecutor(workers) as pool:
        return list(pool.map(_bare, cases, chunksize=50))


def _bare(case: Case) -> bool:
    from math_verify import parse, verify

    logging.disable()
    gold, answer = (parse(rf"$\boxed{{{text}}}$") for text in (case.truth, case.answer))
    return bool(verify(gold, answer))


def speed(workers: int, answers: int) -> tuple[float, int]:
    """Return the seconds for `answers` comparisons by running workers, and how many were undecided."""
    cases = [*task_answers(answers - answers // 8, seed=1), *corpus(answers // 8, first=10**6)]
    random.Random(0).shuffle(cases)
    reward = make_reward(RewardConfig(function="math", workers=workers))
    try:
        reward(
            [rf"\boxed{{{i}.5}}" for i in range(8 * workers)], ["0"] * 8 * workers, [""] * 8 * workers
        )  # starts all workers
        started = time.monotonic()
        responses, truths = [rf"\boxed{{{c.answer}}}" for c in cases], [c.truth for c in cases]
        scores = reward(responses, truths, [""] * len(cases))
        return time.monotonic() - started, sum(s.failure is not None for s in scores)
    finally:
        reward.close()


def differences(cases: Sequence[Case], scores: Sequence[Score], theirs: Sequence[bool]) -> dict[str, list[Case]]:
    """Group the pairs on which the two differ by which one is correct, and by kind of pair."""
    groups: dict[str, list[Case]] = {}
    for case, score, other in zip(cases, scores, theirs, strict=True):
        if (score.accuracy > 0) != other:
            who = "ours right" if (score.accuracy > 0) == case.equal else "math-verify right"
            groups.setdefault(f"{who}: {'equal' if case.equal else 'different'}, {_about(case)}", []).append(case)
    return dict(sorted(groups.items(), key=lambda item: -len(item[1])))


def _about(case: Case) -> str:
    """Return why the library's result may differ, judging from the text."""
    text = case.truth + case.answer
    if "task" in case.kind:
        return case.kind
    if "tiny" in case.kind:
        return "a difference below its 15 digits or 6 places"
    if "decimal" in case.kind:
        return "decimals, which it rounds to 6 places"
    if re.search(r"\d(?:\\,|\\;|\{,\}|,\\!|,| )\d{3}", text):
        return "digit groups"
    if any(word in text for word in ("sqrt(", "exp(", "ln(", "sin(", "pi", "*")):
        return "plain text"
    if any(ord(c) > 127 for c in text):
        return "Unicode signs"
    return "other"


def _row(table: Table, name: str, cases: Iterable[Case], results: Iterable[bool]) -> dict[str, int]:
    counts = Counter((case.equal, result) for case, result in zip(cases, results, strict=True))
    figures = {
        "pairs": counts.total(),
        "wrong_called_right": counts[False, True],
        "right_called_wrong": counts[True, False],
    }
    table.add_row(name, *(str(value) for value in figures.values()))
    return figures


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10_000)
    parser.add_argument("--tasks", type=int, default=1000)
    parser.add_argument("--answers", type=int, default=8192)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--step-seconds", type=float, default=600.0)
    parser.add_argument("--samples", type=Path)
    options = parser.parse_args()
    console = Console(width=140)
    table = Table("verifier, pairs", "pairs", "different called equal", "equal called different")
    figures: dict[str, object] = {}
    reward = make_reward(RewardConfig(function="math", workers=options.workers))
    listed: list[tuple[str, list[Case]]] = []
    task = recorded_answers(options.samples) if options.samples else task_answers(options.tasks)
    for name, cases in (("random", corpus(options.pairs)), ("recorded" if options.samples else "task", task)):
        scores = ours(reward, cases)
        theirs = bare(cases, options.workers)
        figures[f"{name}_ours"] = _row(table, f"math, {name}", cases, [s.accuracy > 0 for s in scores])
        figures[f"{name}_math_verify"] = _row(table, f"math-verify, {name}", cases, theirs)
        figures[f"{name}_failures"] = dict(Counter(s.failure for s in scores if s.failure))
        found = differences(cases, scores, theirs)
        figures[f"{name}_agreement"] = 1 - sum(map(len, found.values())) / max(1, len(cases))
        figures[f"{name}_differences"] = {kind: len(some) for kind, some in found.items()}
        listed += found.items()
    reward.close()
    console.print(table)
    for kind, some in listed:
        console.print(f"{len(some):6}  {kind}", markup=False, highlight=False)
        for case in some[:_EXAMPLES]:
            console.print(f"            {case.truth}   |   {case.answer}", markup=False, highlight=False)
    if options.answers:
        seconds, undecided = speed(options.workers, options.answers)
        figures |= {"answers": options.answers, "workers": options.workers, "undecided": undecided}
        figures |= {"answers_per_second": options.answers / seconds, "share_of_step": seconds / options.step_seconds}
        console.print(
            f"{options.answers} answers, {options.workers} workers: {seconds:.1f} s, "
            f"{options.answers / seconds:.0f} a second, {seconds / options.step_seconds:.1%} of a step of "
            f"{options.step_seconds:.0f} s; {undecided} not decided",
            highlight=False,
        )
    print(json.dumps(figures))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
