"""Long responses are finished late. Accepting groups as they finish would train on the short ones; this does not."""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
from transformers import AutoTokenizer

from megatron_fipo.batching import make_batch_builder
from megatron_fipo.data import Prompt, PromptSet, PromptStream
from megatron_fipo.parallel import topology as topologies
from megatron_fipo.reward import Score
from megatron_fipo.rollout import Request, Sampling, derive_seed
from tests.batching.scoring import scorer
from tests.support.policies import make_config, save_tokenizer
from tests.support.ranks import run_ranks
from tests.support.streaming import ScriptedStream

pytestmark = pytest.mark.distributed

GROUP, BATCH, WINDOW, STEPS = 2, 4, 16, 25
LIMIT = 40
RESPONSES = range(4000)
SLOTS = WINDOW * GROUP


def _length(number: int) -> int:
    """Tokens, stop token included: many short responses and a long tail, mean about 10."""
    return min(2 + int(random.Random(f"length {number}").expovariate(1 / 8)), LIMIT)


def _right(number: int) -> bool:
    """Whatever its length."""
    return random.Random(f"right {number}").random() < 0.5


def _informative(group: int) -> bool:
    return _right(GROUP * group) != _right(GROUP * group + 1)


class Script:
    def __init__(self, tokenizer: Any) -> None:
        vocabulary = tokenizer.get_vocab()
        self.stop = tokenizer.eos_token_id
        self.letters = {True: vocabulary["1"], False: vocabulary["0"]}
        self.numbers = {derive_seed(1, "rollout", i): i for i in RESPONSES}

    def __call__(self, request: Request) -> tuple[list[int], int]:
        number = self.numbers[request.seed]
        return [self.letters[_right(number)]] * (_length(number) - 1) + [self.stop], 0


class EndsWithOne:
    def __call__(self, responses: Sequence[str], truths: Sequence[str], sources: Sequence[str]) -> list[Score]:
        return [Score(float(r.endswith("1")), float(r.endswith("1"))) for r in responses]

    def close(self) -> None:
        pass


def _in_prompt_order(path: Path) -> tuple[list[int], int]:
    """Lengths of all trained responses, and the number of prompts that they took."""
    config = make_config(
        path,
        rollout={
            "prompts_per_step": BATCH,
            "prompts_per_round": WINDOW,
            "group_size": GROUP,
            "max_response_tokens": LIMIT,
        },
    )
    topology = topologies.initialize(config.parallel, seed=1)
    tokenizer = AutoTokenizer.from_pretrained(path)
    script = Script(tokenizer)
    engine = ScriptedStream(script, script.stop, "first", SLOTS)
    prompts = PromptSet((Prompt(0, [], [5, 6, 7], "bits", "1"),), 1, 1, 0)
    score = scorer(config, EndsWithOne(), tokenizer, (script.stop,))
    builder = make_batch_builder(config, topology, engine, score, PromptStream(prompts, 1), (script.stop,))
    lengths: list[int] = []
    for _ in range(STEPS):
        lengths += builder.build().rollouts.response_lengths.tolist()
    builder.close()
    engine.close()
    topologies.destroy()
    return lengths, builder.next_group


def _as_they_finish(path: Path) -> list[int]:
    """The same with what must not be done: the first informative groups that are finished are the batch."""
    script = Script(AutoTokenizer.from_pretrained(path))
    engine = ScriptedStream(script, script.stop, "first", SLOTS)
    sampling = Sampling(1.0, 1.0, 0, LIMIT, (script.stop,))
    lengths: list[int] = []
    upcoming = 0
    for _ in range(STEPS):
        under_way: dict[Any, int] = {}
        accepted: list[int] = []
        while len(accepted) < BATCH:
            while len(set(under_way.values())) < WINDOW:
                for i in range(GROUP):
                    request = Request([5, 6, 7], derive_seed(1, "rollout", GROUP * upcoming + i))
                    under_way[engine.submit(request, sampling)] = upcoming
                upcoming += 1
            done, _ = wait(under_way, return_when=FIRST_COMPLETED)
            finished = [under_way.pop(future) for future in done]
            accepted += [g for g in dict.fromkeys(finished) if g not in under_way.values() and _informative(g)]
        for future in under_way:
            future.cancel()
        lengths += [_length(GROUP * g + i) for g in accepted[:BATCH] for i in range(GROUP)]
    engine.close()
    return lengths


def test_lengths_are_those_of_the_population(tmp_path: Path) -> None:
    """Over 25 batches the mean length of trained responses is that of all responses to the prompts that were passed,
    within three standard errors; accepting groups as they finish is below it by more than five."""
    save_tokenizer(tmp_path)
    ((trained, prompts),) = run_ranks(_in_prompt_order, 1, tmp_path)
    (hasty,) = run_ranks(_as_they_finish, 1, tmp_path)
    population = [_length(i) for i in range(prompts * GROUP)]
    error = stdev(population) / len(trained) ** 0.5
    assert len(trained) == len(hasty) == STEPS * BATCH * GROUP
    assert sorted(trained) == sorted(
        _length(g * GROUP + i) for g in range(prompts) if _informative(g) for i in range(GROUP)
    )
    assert abs(mean(trained) - mean(population)) < 3 * error
    assert mean(hasty) < mean(population) - 5 * error
