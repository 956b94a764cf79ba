"""From problems to figures: draw, judge, compare the answers, summarize."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any, TypeAlias

import torch.distributed as dist

from megatron_fipo.config import Config
from megatron_fipo.data import PromptSet, TemplateOptions, load_prompts
from megatron_fipo.evaluation.drawing import Draw, responses, share, wanted
from megatron_fipo.evaluation.estimators import RIGHT
from megatron_fipo.evaluation.sample import Sample
from megatron_fipo.evaluation.summary import Evaluation, summarize
from megatron_fipo.model.stop_tokens import without_stop_token
from megatron_fipo.parallel.interrupt import unless_interrupted
from megatron_fipo.reward import RewardFunction
from megatron_fipo.reward.equivalence import answer_classes
from megatron_fipo.rollout import Response, RolloutEngine, Sampling

Benchmarks: TypeAlias = Mapping[str, PromptSet]


def load_benchmarks(config: Config, tokenizer: Any, now: datetime | None = None) -> dict[str, PromptSet]:
    """Return the problems of each file of data.validation, by its name.

    Args:
        now: the time that chat templates are told; None: the present.

    Raises:
        ValueError: as `load_prompts`.
    """
    template = TemplateOptions(config.data.chat_template_kwargs, now)
    limit, reads_data_source = config.data.max_prompt_tokens, config.reward.reads_data_source
    files = config.data.benchmarks.items()
    return {name: load_prompts(file, tokenizer, limit, template, reads_data_source) for name, file in files}


def evaluate(
    benchmarks: Benchmarks,
    engine: RolloutEngine | None,
    reward: RewardFunction,
    tokenizer: Any,
    config: Config,
    stop_token_ids: tuple[int, ...],
    *,
    finished: Sequence[Sample] = (),
    keep: Callable[[Sequence[Sample]], None] = lambda samples: None,
) -> tuple[Evaluation, list[Sample]]:
    """Draw `eval.samples` answers a problem, shared out over all ranks. Collective.

    Args:
        engine: None where no sample is left to be drawn.
        finished: of rank 0: samples that are not drawn again.
        keep: called with samples of this rank as they come.

    Returns:
        The figures, the same everywhere; and on rank 0 all samples, in the order of the problems.

    Raises:
        Interrupted: a rank was asked to stop; raised on all of them.
    """
    draws, rank, ranks = wanted(benchmarks, config), dist.get_rank(), dist.get_world_size()
    known = {sample.key: sample for sample in finished}
    chunks = share(draws, set(_from_rank_0(list(known))), rank, ranks, config.rollout.batch_size)
    limit = config.rollout.max_response_tokens
    sampling = Sampling(config.eval.temperature, config.eval.top_p, 0, limit, stop_token_ids)

    def draw() -> list[Sample]:
        drawn: list[Sample] = []
        for some in responses(engine, chunks, sampling):
            judged = list(_judged(some, reward, tokenizer, stop_token_ids))
            keep(judged)
            drawn += judged
        return drawn

    known |= {sample.key: sample for part in _to_rank_0(unless_interrupted(draw)) for sample in part}
    samples = _with_classes([known[d.key] for d in draws] if rank == 0 else [], reward)
    result = summarize(samples, config.eval.pass_k, config.run.seed) if rank == 0 else None
    return _from_rank_0(result), samples


def _judged(
    drawn: Sequence[tuple[Draw, Response]], reward: RewardFunction, tokenizer: Any, stops: Sequence[int]
) -> Iterator[Sample]:
    tokens = [without_stop_token(response.token_ids, stops) for _, response in drawn]
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    prompts = [draw.prompt for draw, _ in drawn]
    scores = reward(texts, [p.ground_truth for p in prompts], [p.data_source for p in prompts])
    for (draw, response), text, score in zip(drawn, texts, scores, strict=True):
        yield Sample(
            *draw.key,
            seed=draw.seed,
            response=text,
            answer=score.answer,
            accuracy=score.accuracy,
            length=len(response.token_ids),
            truncated=response.truncated,
            failure=score.failure,
        )


def _with_classes(samples: Sequence[Sample], reward: RewardFunction) -> list[Sample]:
    """Rank 0's samples with the classes of their answers, which all ranks' verifiers find together. Collective.

    The right answers of a problem are one class, being equal to the ground truth; only wrong ones need comparing.
    """
    problems: dict[tuple[str, int], dict[str, None]] = {}
    for sample in samples:
        if sample.answer is not None and sample.accuracy <= 0:
            problems.setdefault((sample.benchmark, sample.problem), {})[sample.answer] = None
    work = _from_rank_0([(problem, list(answers)) for problem, answers in problems.items()])
    mine = work[dist.get_rank() :: dist.get_world_size()]
    found = answer_classes(reward, [answers for _, answers in mine])
    named = [
        (problem, dict(zip(answers, classes, strict=True)))
        for (problem, answers), classes in zip(mine, found, strict=True)
    ]
    classes_of = dict(entry for part in _to_rank_0(named) for entry in part)
    return [replace(sample, answer_class=_class_of(sample, classes_of)) for sample in samples]


def _class_of(sample: Sample, classes_of: Mapping[tuple[str, int], Mapping[str, int]]) -> int | None:
    if sample.answer is None:
        return None
    if sample.accuracy > 0:
        return RIGHT
    return RIGHT + 1 + classes_of[sample.benchmark, sample.problem][sample.answer]


def _from_rank_0(value: Any) -> Any:
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _to_rank_0(value: Any) -> list[Any]:
    """Every rank's value on rank 0, nothing on the others."""
    gathered: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, gathered, dst=0)
    return gathered or []
