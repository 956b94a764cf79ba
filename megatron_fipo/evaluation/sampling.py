"""Which samples an evaluation wants, who draws them, and how they come in."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass

from megatron_fipo.config import Config
from megatron_fipo.data import Prompt
from megatron_fipo.evaluation.sample import Key
from megatron_fipo.parallel import interrupt
from megatron_fipo.rollout import Request, Response, RolloutEngine, Sampling
from megatron_fipo.rollout.collect import derive_seed
from megatron_fipo.rollout.protocol import StreamingEngine

_LOOK_SECONDS = 0.2  # for a request to stop, while responses are drawn
_HANDED_ON = 64  # responses of servers that are judged and kept together ...
_HANDED_ON_SECONDS = 20.0  # ... or however many have come in this time


@dataclass(frozen=True)
class Draw:
    """A sample to be drawn."""

    key: Key
    seed: int
    prompt: Prompt


def wanted(benchmarks: Mapping[str, Sequence[Prompt]], config: Config) -> list[Draw]:
    """All samples of an evaluation. A seed depends on the problem's place and the sample's number only, so that two
    policies are compared on the same draws, and more samples, problems or benchmarks leave those before as they are."""
    return [
        Draw((name, place, number), derive_seed(config.run.seed, "eval", place, number), prompt)
        for name, prompts in benchmarks.items()
        for place, prompt in enumerate(prompts[: config.eval.max_problems])
        for number in range(config.eval.samples)
    ]


def share(draws: Sequence[Draw], finished: Collection[Key], rank: int, ranks: int, batch_size: int) -> list[list[Draw]]:
    """The chunks that a rank draws. They are the same whatever is finished, but for its samples: a response may depend
    on its neighbours in the engine's batch, in the last bits of its probabilities."""
    size = max(1, min(batch_size, -(-len(draws) // ranks)))
    chunks = [draws[start : start + size] for start in range(0, len(draws), size)]
    left = [[draw for draw in chunk if draw.key not in finished] for chunk in chunks[rank::ranks]]
    return [chunk for chunk in left if chunk]


def responses(
    engine: RolloutEngine | None, chunks: Sequence[Sequence[Draw]], sampling: Sampling
) -> Iterator[list[tuple[Draw, Response]]]:
    """Draw, and hand on what is finished: chunk by chunk, or from servers as the responses come. Without chunks no
    engine is needed.

    Raises:
        Interrupted: this rank was asked to stop before all were drawn.
    """
    if isinstance(engine, StreamingEngine):
        yield from _as_they_come(engine, [draw for chunk in chunks for draw in chunk], sampling)
        return
    for chunk in chunks:
        assert engine is not None
        drawn = engine.generate([_request(draw) for draw in chunk], sampling)
        yield list(zip(chunk, drawn, strict=True))


def _as_they_come(
    engine: StreamingEngine, draws: Sequence[Draw], sampling: Sampling
) -> Iterator[list[tuple[Draw, Response]]]:
    futures: dict[Future[Response], Draw] = {engine.submit(_request(draw), sampling): draw for draw in draws}
    try:
        pending, ready, since = set(futures), list[tuple[Draw, Response]](), time.monotonic()
        while pending:
            if interrupt.requested():
                raise interrupt.Interrupted
            done, pending = wait(pending, timeout=_LOOK_SECONDS, return_when=FIRST_COMPLETED)
            ready += [(futures[future], future.result()) for future in done]
            late = time.monotonic() - since > _HANDED_ON_SECONDS
            if ready and (len(ready) >= _HANDED_ON or late or not pending):
                yield ready
                ready, since = [], time.monotonic()
    finally:
        for future in futures:
            future.cancel()


def _request(draw: Draw) -> Request:
    return Request(draw.prompt.token_ids, draw.seed)
