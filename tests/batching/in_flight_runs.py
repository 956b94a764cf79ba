"""Batches built in flight inside ranks, from a script of responses: one function a case."""

from __future__ import annotations

import copy
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from megatron_fipo.algorithm.dynamic_sampling import DynamicSamplingExhausted
from megatron_fipo.batching import BatchBuilder, StepBatch, make_batch_builder
from megatron_fipo.batching.in_flight import InFlightSource
from megatron_fipo.batching.plan import InformativeShare
from megatron_fipo.batching.rounds import RoundSource
from megatron_fipo.config import RewardConfig
from megatron_fipo.data import PromptStream
from megatron_fipo.parallel import interrupt
from megatron_fipo.parallel import topology as topologies
from megatron_fipo.parallel.interrupt import Interrupted
from megatron_fipo.reward import make_reward
from megatron_fipo.rollout import Request, Sampling, derive_seed
from tests.batching.scoring import RIGHT, build, digit_prompts, scorer
from tests.support.policies import make_config
from tests.support.streaming import PausableStream, ScriptedStream
from tests.support.waiting import wait_until

GROUP = 4
LIMIT = 24  # max_response_tokens
INFORMATIVE = [g for g in range(60) if 0 < RIGHT[g % len(RIGHT)] < GROUP]
BATCHES = [INFORMATIVE[at : at + 4] for at in range(0, 16, 4)]
TIMING = ("sampling/cancelled_", "sampling/continued_", "sampling/wasted_")


class Script:
    """Response i of a group is right if i < RIGHT[problem]; later prompts and responses are shorter or longer."""

    def __init__(self, tokenizer: Any) -> None:
        self.vocabulary = tokenizer.get_vocab()
        self.stop = tokenizer.eos_token_id
        ids = range(60 * GROUP)
        self.numbers = {derive_seed(1, "rollout", i): (i, 0) for i in ids}
        self.numbers |= {derive_seed(1, "rollout", i, have): (i, have) for i in ids for have in range(1, LIMIT)}

    def __call__(self, request: Request) -> tuple[list[int], int]:
        number, have = self.numbers[request.seed]
        tokens = self.tokens(number)
        if have:
            assert list(request.prompt_ids)[-have:] == tokens[:have], "a piece must go on where the last one ended"
        return tokens[have:], have

    def tokens(self, number: int) -> list[int]:
        group, i = divmod(number, GROUP)
        problem = group % len(RIGHT)
        answer = problem if i < RIGHT[problem] else problem + 1
        padding = (7 * group + 5 * i) % 14
        text = "+" * padding + f"Answer:{answer}"  # 8 to 22 tokens
        tokens = [self.vocabulary[c] for c in text]
        return [*tokens, self.stop]


def make_builder(path: Path, world: int, order: str = "first", slots: int = 8, **rollout: Any) -> BatchBuilder:
    config = make_config(
        path,
        parallel={"world_size": world},
        rollout={"prompts_per_step": 4, "group_size": GROUP, "max_response_tokens": LIMIT, **rollout},
        reward={"overlong_buffer_tokens": 4},
    )
    topology = topologies.initialize(config.parallel, seed=1)
    tokenizer = AutoTokenizer.from_pretrained(path)
    script = Script(tokenizer)
    kind = PausableStream if config.rollout.partial else ScriptedStream
    engine = kind(script, script.stop, order, slots)
    stream = PromptStream(digit_prompts(tokenizer), config.run.seed, shuffle=False)
    reward = make_reward(RewardConfig(function="exact"))
    score = scorer(config, reward, tokenizer, (script.stop,))
    return make_batch_builder(config, topology, engine, score, stream, (script.stop,))


def engine_of(builder: BatchBuilder) -> Any:
    assert isinstance(builder.source, InFlightSource)
    return builder.source.engine


def close(builder: BatchBuilder) -> None:
    builder.close()
    engine_of(builder).close()
    topologies.destroy()


def collect(path: Path, world: int, steps: int, **options: Any) -> dict[str, Any]:
    """Return `steps` batches of this rank, or the error."""
    builder = make_builder(path, world, **options)
    collected: list[StepBatch] = []
    error = None
    try:
        for _ in range(steps):
            engine_of(builder).load_weights(iter(()))
            collected.append(build(builder))
    except DynamicSamplingExhausted as exhausted:
        error = str(exhausted)
    finally:
        close(builder)
    return {"steps": collected, "error": error}


PACES: dict[str, dict[str, Any]] = {
    "first": {"order": "first"},
    "last": {"order": "last", "slots": 3},
    "mixed": {"order": "mixed", "slots": 40, "prompts_per_round": 11},
    "one": {"slots": 1, "prompts_per_round": 1},
}
CASES: dict[str, dict[str, Any]] = {
    **{name: {"steps": 3, **pace} for name, pace in PACES.items()},
    "no_filter": {"steps": 2, "dynamic_sampling": False, "order": "last"},
    "stop": {"steps": 1, "max_rounds": 1},
    "train": {"steps": 1, "max_rounds": 1, "when_exhausted": "train", "order": "mixed"},
}


def prefetched(path: Path, world: int) -> dict[str, Any]:
    """Two batches, each but the first drawn ahead; and what a checkpoint between them holds."""
    builder = make_builder(path, world, max_staleness=1)
    engine = engine_of(builder)
    batches, states = [], []
    for _ in range(2):
        ahead = None
        if builder.has_prefetched:
            builder.drain()
            states.append((builder.state_dict(), builder.kept_rollouts()))
            ahead = build(builder)
        engine.load_weights(iter(()))
        batches.append(ahead or build(builder))
        builder.prefetch()
    under_way = builder.state_dict()
    close(builder)
    return {"batches": batches, "states": states, "under_way": under_way}


def restored(path: Path, world: int, state: dict[str, Any], parts: list[dict[str, Any]]) -> list[StepBatch]:
    builder = make_builder(path, world, max_staleness=1)
    builder.load_state_dict(json.loads(json.dumps(state)), parts)
    assert builder.has_prefetched
    assert isinstance(builder.source, InFlightSource)
    assert builder.source.expected_share() == InformativeShare.of_batch(7, 4)  # the second batch took groups 7 to 13
    batches = [build(builder)]
    engine_of(builder).load_weights(iter(()))
    builder.prefetch()
    batches.append(build(builder))
    close(builder)
    return batches


def cancelled_early(path: Path, world: int) -> dict[str, Any]:
    """A batch of 1, 3, 4 and 6, whose group 0 is not finished before nothing behind group 6 is in flight any more.

    Of 12 groups those behind 6 never get a fourth token, and 3 and 6 are not finished before they have three.
    """
    builder = make_builder(path, world, slots=100, prompts_per_round=12, max_rounds=1)
    engine, replica, last = engine_of(builder), builder.topology.rank, BATCHES[0][-1]
    useless = [g for g in range(last + 1, 12) if g % world == replica]
    seen = []  # that all of them are in flight

    def stalls(request: Request, tokens: int) -> bool:
        group = engine.script.numbers[request.seed][0] // GROUP
        behind = [s for s in engine._serving if engine.script.numbers[s.request.seed][0] // GROUP > last]
        if len(behind) == len(useless) * GROUP:
            seen.append(True)
        if group in (3, 6):
            return tokens == 2 and not (seen and all(len(s.tokens) == 3 for s in behind))
        if group == 0:
            return tokens == 2 and (not seen or bool(behind))
        return group > last and tokens == 3

    engine.stalls = stalls
    engine.load_weights(iter(()))
    batch = build(builder)
    shared = engine.shared
    close(builder)
    return {"batch": batch, "shared": shared}


PARTIAL: dict[str, Any] = {"partial": True, "server": {"placement": "colocated"}, "max_staleness": 1, "slots": 16}


def partial(path: Path, world: int) -> dict[str, Any]:
    """Four batches, groups behind each of them coming no further than three tokens; what was kept after each."""
    builder = make_builder(path, world, **PARTIAL)
    engine = engine_of(builder)

    def behind(request: Request, tokens: int) -> bool:
        return tokens == 3 and engine.script.numbers[request.seed][0] // GROUP > BATCHES[engine.version - 1][-1]

    engine.stalls = behind
    batches, kept, states = [], [], []
    for _ in range(4):
        engine.load_weights(iter(()))
        batches.append(build(builder))
        kept.append(builder.kept_rollouts())
        states.append(builder.state_dict())
    close(builder)
    return {"batches": batches, "kept": kept, "states": states}


def partial_restored(path: Path, world: int, state: dict[str, Any], parts: list[dict[str, Any]]) -> dict[str, Any]:
    builder = make_builder(path, world, **PARTIAL)
    builder.load_state_dict(json.loads(json.dumps(state)), parts)
    again = builder.kept_rollouts()
    engine_of(builder).load_weights(iter(()))
    batch = build(builder)
    close(builder)
    return {"again": again, "batch": batch}


def interrupted(path: Path, world: int) -> list[str]:
    """The last rank is asked to stop while nothing can be finished; afterwards nothing is under way."""
    interrupt.install()
    builder = make_builder(path, world, slots=0)
    if builder.topology.rank == world - 1:
        os.kill(os.getpid(), signal.SIGUSR1)
    with pytest.raises(Interrupted):
        builder.build()
    engine = engine_of(builder)
    wait_until(lambda: not engine._serving)
    state = builder.state_dict()
    close(builder)
    return [str(state["next_group"]), str(state["stream"]["position"]), str(builder.has_prefetched)]


def with_another_source(path: Path, world: int) -> list[int]:
    """A run goes on with the other kind of builder, and back: next group, batches and prompts after each change."""
    builder = make_builder(path, world)
    builder.build()
    source = builder.source
    assert isinstance(source, InFlightSource)
    sampling = Sampling(1.0, 1.0, 0, LIMIT, ())
    in_rounds = RoundSource(builder.config, builder.topology, source.engine, source.score, sampling)
    rounds = BatchBuilder(builder.config, builder.topology, in_rounds, copy.copy(builder.stream))
    rounds.load_state_dict(json.loads(json.dumps(builder.state_dict())), [builder.kept_rollouts()] * world)
    state, part = rounds.state_dict(), rounds.kept_rollouts()
    close(builder)
    again = make_builder(path, world)
    again.load_state_dict(json.loads(json.dumps(state)), [part] * world)
    close(again)
    seen = [c.state_dict() for c in (rounds, again)]
    return [value for s in seen for value in (s["next_group"], s["batches"], s["stream"]["position"])]


def surplus_to_another_source(path: Path, world: int) -> dict[str, Any]:
    """Two batches, the first in rounds that leave a surplus, the second in flight; and one batch given up between."""
    kept: dict[str, Any] = {"surplus_groups": "keep", "prompts_per_round": 12}
    builder = make_builder(path, world, **kept)
    source = builder.source
    assert isinstance(source, InFlightSource)
    sampling = Sampling(1.0, 1.0, 0, LIMIT, ())
    in_rounds = RoundSource(builder.config, builder.topology, source.engine, source.score, sampling)
    rounds = BatchBuilder(builder.config, builder.topology, in_rounds, copy.copy(builder.stream))
    first = build(rounds)
    state, part = json.loads(json.dumps(rounds.state_dict())), rounds.kept_rollouts()
    parts: list[Any] = [None] * world
    torch.distributed.all_gather_object(parts, part)
    builder.load_state_dict(state, parts)
    source.score = lambda *_: 1 / 0  # type: ignore[assignment,return-value]
    with pytest.raises((ZeroDivisionError, RuntimeError)):
        builder.build()
    close(builder)
    again = make_builder(path, world)
    again.load_state_dict(state, parts)
    engine_of(again).load_weights(iter(()))
    second = build(again)
    close(again)
    return {"given_up": builder.state_dict() == state, "batches": [first, second]}


def failing(path: Path, world: int) -> list[str]:
    """The reward raises on replica 0, in its scoring thread."""
    builder = make_builder(path, world)

    def broken(*args: Any) -> Any:
        raise ZeroDivisionError("no verdict")

    if builder.topology.rank == 0:
        builder.source.score = broken  # type: ignore[attr-defined]
    with pytest.raises((ZeroDivisionError, RuntimeError)) as error:
        builder.build()
    close(builder)
    return [f"{type(error.value).__name__}: {error.value}"]


def all_cases(path: Path, world: int) -> dict[str, Any]:
    results = {name: collect(path, world, **case) for name, case in CASES.items()}
    results |= {"ahead": prefetched(path, world), "partial": partial(path, world)}
    results |= {"early": cancelled_early(path, world)}
    results |= {"interrupted": interrupted(path, world)}
    interrupt.install()
    results |= {"surplus": surplus_to_another_source(path, world)}
    return results | {"failing": failing(path, world), "changed": with_another_source(path, world)}
