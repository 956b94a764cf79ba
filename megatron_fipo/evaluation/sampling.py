"""Samples of an evaluation: planning, distribution over ranks, and generation."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass

from megatron_fipo.config import Config
from megatron_fipo.data import Prompt
from megatron_fipo.evaluation.sample import Key
from megatron_fipo.parallel import interrupt
from megatron_fipo.rollout import Request, Response, RolloutEngine, Sampling, derive_seed
from megatron_fipo.rollout.protocol import StreamingEngine

_POLL_SECONDS = 0.2  # interval of checking for a stop request
_FLUSH_RESPONSES = 64  # responses of servers that are scored and saved together ...
_FLUSH_SECONDS = 20.0  # ... or all that arrived within this time


@dataclass(frozen=True)
class SampleSpec:
    """Sample to be generated."""

    key: Key
    seed: int
    prompt: Prompt


def plan_samples(benchmarks: Mapping[str, Sequence[Prompt]], config: Config) -> list[SampleSpec]:
    """Return all samples of an evaluation.

    A seed depends only on the problem's and the sample's index, so that policies are compared on the same seeds, and
    more samples, problems or benchmarks do not change earlier ones.
    """
    return [
        SampleSpec((name, index, number), derive_seed(config.run.seed, "eval", index, number), prompt)
        for name, prompts in benchmarks.items()
        for index, prompt in enumerate(prompts[: config.eval.max_problems])
        for number in range(config.eval.samples)
    ]


def local_chunks(
    specs: Sequence[SampleSpec], finished: Collection[Key], rank: int, ranks: int, batch_size: int
) -> list[list[SampleSpec]]:
    """Return the chunks of a rank.

    Chunks do not depend on `finished`, apart from the omitted samples: a response may depend on its neighbours in the
    engine's batch, in the last bits of its probabilities.
    """
    size = max(1, min(batch_size, -(-len(specs) // ranks)))
    chunks = [specs[start : start + size] for start in range(0, len(specs), size)]
    left = [[spec for spec in chunk if spec.key not in finished] for chunk in chunks[rank::ranks]]
    return [chunk for chunk in left if chunk]


def responses(
    engine: RolloutEngine | None,
    chunks: Sequence[Sequence[SampleSpec]],
    sampling: Sampling,
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[list[tuple[SampleSpec, Response]]]:
    """Generate, and yield finished responses: chunk by chunk, or as they arrive from servers.

    Without chunks no engine is needed.

    Args:
        rank, ranks: of those that generate at the same time, and share the servers.

    Raises:
        Interrupted: this rank received a stop signal before all were generated.
    """
    if isinstance(engine, StreamingEngine):
        engine.share_servers(rank, ranks)
        yield from _stream(engine, [spec for chunk in chunks for spec in chunk], sampling)
        return
    for chunk in chunks:
        assert engine is not None
        generated = engine.generate([_request(spec) for spec in chunk], sampling)
        yield list(zip(chunk, generated, strict=True))


def _stream(
    engine: StreamingEngine, specs: Sequence[SampleSpec], sampling: Sampling
) -> Iterator[list[tuple[SampleSpec, Response]]]:
    futures: dict[Future[Response], SampleSpec] = {engine.submit(_request(spec), sampling): spec for spec in specs}
    try:
        pending, ready, since = set(futures), list[tuple[SampleSpec, Response]](), time.monotonic()
        while pending:
            if interrupt.requested():
                raise interrupt.Interrupted
            done, pending = wait(pending, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
            ready += [(futures[future], future.result()) for future in done]
            late = time.monotonic() - since > _FLUSH_SECONDS
            if ready and (len(ready) >= _FLUSH_RESPONSES or late or not pending):
                yield ready
                ready, since = [], time.monotonic()
    finally:
        for future in futures:
            future.cancel()


def _request(spec: SampleSpec) -> Request:
    return Request(spec.prompt.token_ids, spec.seed)
