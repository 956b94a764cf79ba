"""Avg@k, Cons@k and Pass@k of the current policy on a set of problems."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch.distributed as dist

from megatron_fipo.config import EvalConfig
from megatron_fipo.data import Prompt
from megatron_fipo.parallel.interrupt import unless_interrupted
from megatron_fipo.reward import RewardFunction
from megatron_fipo.rollout import RolloutEngine, Sampling
from megatron_fipo.rollout.collect import derive_seed, generate_and_score


class Sample(NamedTuple):
    """One answer to one problem."""

    problem: int
    number: int  # 0 .. k-1
    accuracy: float
    answer: str | None
    length: int  # tokens of the response
    truncated: bool


@dataclass(frozen=True)
class Evaluation:
    """k samples of each problem, summarized.

    Attributes:
        avg: mean accuracy of all samples.
        cons: share of problems whose most frequent answer is right; a tie goes to the answer that came first.
        pass_: share of problems with at least one right sample.
        length: mean response length, tokens.
        truncated: share of responses that hit the length limit.
    """

    samples: int
    problems: int
    avg: float
    cons: float
    pass_: float
    length: float
    truncated: float

    def scores(self) -> dict[str, float]:
        return {"avg@k": self.avg, "cons@k": self.cons, "pass@k": self.pass_}

    def metrics(self) -> dict[str, float]:
        return {
            f"eval/{k}": v for k, v in {**self.scores(), "length": self.length, "truncated": self.truncated}.items()
        }


def evaluate(
    problems: Sequence[Prompt],
    engine: RolloutEngine,
    reward: RewardFunction,
    tokenizer: Any,
    config: EvalConfig,
    *,
    max_tokens: int,
    stop_token_ids: tuple[int, ...],
    seed: int,
) -> Evaluation:
    """Sample `config.samples` answers a problem, shared out over all ranks. Collective; the same result everywhere.

    The seeds depend on the problem and the sample only, so that two policies are compared on the same draws.

    Raises:
        Interrupted: a rank was asked to stop; raised on all of them.
    """
    problems = problems[: config.max_problems]
    sampling = Sampling(config.temperature, config.top_p, 0, max_tokens, stop_token_ids)
    wanted = [(p, k) for p in range(len(problems)) for k in range(config.samples)]
    mine = wanted[dist.get_rank() :: dist.get_world_size()]
    prompts, seeds = [problems[p] for p, _ in mine], [derive_seed(seed, "eval", p, k) for p, k in mine]
    responses, scores = unless_interrupted(
        lambda: generate_and_score(engine, reward, tokenizer, prompts, seeds, sampling)
    )
    samples = [
        Sample(p, k, score.accuracy, score.answer, len(response.token_ids), response.truncated)
        for (p, k), response, score in zip(mine, responses, scores, strict=True)
    ]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, samples)
    return summarize([sample for part in gathered for sample in part])


def summarize(samples: Sequence[Sample]) -> Evaluation:
    """The figures of a finished evaluation.

    Raises:
        ValueError: problems with different numbers of samples, or none at all.
    """
    by_problem: dict[int, list[Sample]] = {}
    for sample in sorted(samples):
        by_problem.setdefault(sample.problem, []).append(sample)
    counts = {len(answers) for answers in by_problem.values()}
    if len(counts) != 1:
        raise ValueError(f"every problem needs the same number of samples, but there are {sorted(counts)}")
    total = len(samples)
    return Evaluation(
        samples=counts.pop(),
        problems=len(by_problem),
        avg=sum(s.accuracy for s in samples) / total,
        cons=sum(_majority_is_right(answers) for answers in by_problem.values()) / len(by_problem),
        pass_=sum(any(s.accuracy > 0 for s in answers) for answers in by_problem.values()) / len(by_problem),
        length=sum(s.length for s in samples) / total,
        truncated=sum(s.truncated for s in samples) / total,
    )


def _majority_is_right(answers: Sequence[Sample]) -> bool:
    votes = Counter(s.answer for s in answers if s.answer is not None)
    if not votes:
        return False
    winner = votes.most_common(1)[0][0]  # insertion order breaks ties
    return any(s.accuracy > 0 for s in answers if s.answer == winner)
