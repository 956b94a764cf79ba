"""Evaluation of a policy: generate, score, classify answers, summarize."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any, TypeAlias

import torch.distributed as dist

from megatron_fipo.config import Config
from megatron_fipo.data import PromptSet, TemplateOptions, load_prompts
from megatron_fipo.evaluation.estimators import CORRECT
from megatron_fipo.evaluation.sample import Sample
from megatron_fipo.evaluation.sampling import SampleSpec, local_chunks, plan_samples, responses
from megatron_fipo.evaluation.summary import Evaluation, summarize
from megatron_fipo.model.stop_tokens import without_stop_token
from megatron_fipo.parallel.collectives import broadcast, gather_to_first
from megatron_fipo.parallel.interrupt import unless_interrupted
from megatron_fipo.reward import RewardFunction
from megatron_fipo.reward.equivalence import answer_classes
from megatron_fipo.rollout import Response, RolloutEngine, Sampling

Benchmarks: TypeAlias = Mapping[str, PromptSet]


def load_benchmarks(config: Config, tokenizer: Any, now: datetime | None = None) -> dict[str, PromptSet]:
    """Return the problems of each file of data.validation, by its name.

    Args:
        now: date and time for chat templates; None: the present.

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
    """Generate and score `eval.samples` samples per problem, distributed over all ranks. Collective.

    Args:
        engine: None if all samples are finished.
        finished: on rank 0: samples that are not generated again.
        keep: called with this rank's samples as they are scored.

    Returns:
        The metrics, equal on all ranks; and on rank 0 all samples, in the order of the problems.

    Raises:
        Interrupted: a rank received a stop signal; raised on all ranks.
    """
    specs, rank, ranks = plan_samples(benchmarks, config), dist.get_rank(), dist.get_world_size()
    known = {sample.key: sample for sample in finished}
    chunks = local_chunks(specs, set(broadcast(list(known))), rank, ranks, config.rollout.batch_size)
    limit = config.rollout.max_response_tokens
    sampling = Sampling(config.eval.temperature, config.eval.top_p, 0, limit, stop_token_ids)

    def generate() -> list[Sample]:
        generated: list[Sample] = []
        for some in responses(engine, chunks, sampling, rank, ranks):
            scored = list(_scored(some, reward, tokenizer, stop_token_ids))
            keep(scored)
            generated += scored
        return generated

    known |= {sample.key: sample for part in gather_to_first(unless_interrupted(generate)) for sample in part}
    samples = _with_classes([known[d.key] for d in specs] if rank == 0 else [], reward)
    selection = config.checkpoint.best_on
    result = summarize(samples, config.eval.pass_k, config.run.seed, selection) if rank == 0 else None
    return broadcast(result), samples


def _scored(
    generated: Sequence[tuple[SampleSpec, Response]], reward: RewardFunction, tokenizer: Any, stops: Sequence[int]
) -> Iterator[Sample]:
    tokens = [without_stop_token(response.token_ids, stops) for _, response in generated]
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    prompts = [spec.prompt for spec, _ in generated]
    scores = reward(texts, [p.ground_truth for p in prompts], [p.data_source for p in prompts])
    for (spec, response), text, score in zip(generated, texts, scores, strict=True):
        yield Sample(
            *spec.key,
            seed=spec.seed,
            response=text,
            answer=score.answer,
            accuracy=score.accuracy,
            length=len(response.token_ids),
            truncated=response.truncated,
            failure=score.failure,
        )


def _with_classes(samples: Sequence[Sample], reward: RewardFunction) -> list[Sample]:
    """Return rank 0's samples with answer classes, which all ranks compute together. Collective.

    Correct answers of a problem form one class, since they equal the ground truth; only incorrect ones are compared.
    """
    problems: dict[tuple[str, int], dict[str, None]] = {}
    for sample in samples:
        if sample.answer is not None and sample.accuracy <= 0:
            problems.setdefault((sample.benchmark, sample.problem), {})[sample.answer] = None
    work = broadcast([(problem, list(answers)) for problem, answers in problems.items()])
    local_work = work[dist.get_rank() :: dist.get_world_size()]
    found = answer_classes(reward, [answers for _, answers in local_work])
    named = [
        (problem, dict(zip(answers, classes, strict=True)))
        for (problem, answers), classes in zip(local_work, found, strict=True)
    ]
    classes_of = dict(entry for part in gather_to_first(named) for entry in part)
    return [replace(sample, answer_class=_class_of(sample, classes_of)) for sample in samples]


def _class_of(sample: Sample, classes_of: Mapping[tuple[str, int], Mapping[str, int]]) -> int | None:
    if sample.answer is None:
        return None
    if sample.accuracy > 0:
        return CORRECT
    return CORRECT + 1 + classes_of[sample.benchmark, sample.problem][sample.answer]
