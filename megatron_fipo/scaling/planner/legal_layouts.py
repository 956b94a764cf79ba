"""Legal layouts: enumeration, and explanations of illegal ones with the nearest legal choices."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from megatron_fipo.config import ParallelConfig
from megatron_fipo.scaling.cost.layout import Layout, Recompute
from megatron_fipo.scaling.cost.model_shapes import ModelShape
from megatron_fipo.shapes.layout import both_ends_interleaved, kv_heads_split, virtual_stage_layers

_MOST_CHUNKS = 16  # per stage; more only adds messages
_SEQUENCE_CHUNKS = (2, 4, 8, 16)  # choices beside 1
_MOST_CONTEXT = 64


def layout_problems(model: ModelShape, p: ParallelConfig) -> list[str]:
    """Return what is illegal about a layout, with the arithmetic and the nearest legal choices; [] if nothing."""
    problems = list(_world_problems(model, p))
    problems += _split_problems(model, p)
    if model.experts is None and p.expert > 1:
        problems.append(f"parallel.expert {p.expert}: the model has no experts; use 1")
    if model.experts is not None:
        problems += _expert_problems(model, p)
    return problems + list(_stage_problems(model.num_layers, p))


def _world_problems(model: ModelShape, p: ParallelConfig) -> Iterator[str]:
    parallel = p.tensor * p.pipeline * p.context
    if p.world_size % parallel:
        below = p.world_size // parallel * parallel
        counts = [str(n) for n in (below, below + parallel) if n]
        yield (
            f"tp {p.tensor} x pp {p.pipeline} x cp {p.context} = {parallel} does not divide the {p.world_size} GPUs; "
            f"use {' or '.join(counts)} GPUs, or {_nearest_factors(model, p)}"
        )


def _nearest_factors(model: ModelShape, p: ParallelConfig) -> str:
    """Return the nearest layout on each axis that divides the world size and the model."""
    legal = []
    for t in divisors(p.world_size):
        for pp in divisors(p.world_size // t):
            for c in divisors(p.world_size // t // pp):
                other = ParallelConfig(world_size=p.world_size, tensor=t, pipeline=pp, context=c)
                if not [*_split_problems(model, other), *_stage_problems(model.num_layers, other)]:
                    far = sum(max(a, b) / min(a, b) for a, b in ((t, p.tensor), (pp, p.pipeline), (c, p.context)))
                    legal.append((far, f"tp {t} x pp {pp} x cp {c}"))
    return min(legal)[1]


def _split_problems(model: ModelShape, p: ParallelConfig) -> Iterator[str]:
    parts = [("attention heads", model.num_heads)]
    if model.experts is None:
        parts.append(("MLP columns", model.ffn_hidden_size))
    for name, size in parts:
        if size % p.tensor:
            legal = _around(divisors(size), p.tensor)
            yield (
                f"{size} {name} / tp {p.tensor} = {size / p.tensor:.2f} is not an integer; nearest legal tp: "
                f"{' or '.join(map(str, legal))}"
            )
    if not kv_heads_split(model, p.tensor):
        legal = _around([t for t in divisors(model.num_heads) if kv_heads_split(model, t)], p.tensor)
        yield (
            f"{model.num_kv_heads} key/value heads must be a multiple or a divisor of tp {p.tensor}; nearest "
            f"legal tp: {' or '.join(map(str, legal))}"
        )
    if p.sequence and p.tensor == 1:
        yield "sequence parallelism needs tp > 1"
    if p.sequence_chunks > 1 and (p.virtual_pipeline > 1 or p.context > 1 or model.experts is not None):
        yield f"{p.sequence_chunks} sequence chunks are for vpp 1, cp 1 and models without experts"


def _expert_problems(model: ModelShape, p: ParallelConfig) -> Iterator[str]:
    assert model.experts is not None
    count, stage = model.experts.count, p.world_size // p.pipeline
    if count % p.expert:
        legal = _around(divisors(count), p.expert)
        yield (
            f"{count} experts / ep {p.expert} = {count / p.expert:.2f} is not an integer; nearest legal ep: "
            f"{' or '.join(map(str, legal))}"
        )
    if stage % p.expert:
        yield f"ep {p.expert} does not divide the {stage} GPUs of a stage ({p.world_size} / pp {p.pipeline})"
    if p.tensor > 1 and p.expert == 1:
        yield f"a model with experts needs ep > 1 with tp {p.tensor}"
    if p.tensor > 1 and not p.sequence:
        yield f"a model with experts needs sequence parallelism with tp {p.tensor}"


def _stage_problems(layers: int, p: ParallelConfig) -> Iterator[str]:
    if p.pipeline_layout is not None:
        try:
            virtual_stage_layers(layers, p)
        except ValueError as error:
            yield str(error)
    fixed = [n for n in (p.first_stage_layers, p.last_stage_layers) if n is not None]
    if fixed and p.pipeline_layout is not None:
        yield "pipeline_layout has the layers of every stage, so first_stage_layers and last_stage_layers must be null"
    if p.pipeline == 1:
        if p.virtual_pipeline > 1:
            yield f"vpp {p.virtual_pipeline} needs pp > 1"
        if fixed:
            yield "first_stage_layers and last_stage_layers need pp > 1"
    if p.pipeline == 1 or p.pipeline_layout is not None:
        return
    rest, stages, chunks = layers - sum(fixed), p.pipeline - len(fixed), p.virtual_pipeline
    if any(n < 1 or n % chunks for n in fixed):
        yield f"first or last stage of {fixed} layers cannot be split into {chunks} equal chunks of at least 1"
    if both_ends_interleaved(p):
        yield f"pp 2 x vpp {chunks} takes first_stage_layers or last_stage_layers, not both; one determines the other"
    if rest >= stages * chunks and not (rest % (stages * chunks) if stages else rest):
        return
    uneven = f" - {' - '.join(map(str, fixed))}" if fixed else ""
    choices = [f"pp {n}" for n in _around([n for n in divisors(layers) if n <= layers // chunks], p.pipeline)]
    legal_chunks = [v for v in divisors(layers) if layers % (p.pipeline * v) == 0]
    if chunks > 1 and legal_chunks:
        choices += [f"vpp {v}" for v in _around(legal_chunks, chunks)]
    if stages_layers := next(iter(uneven_stages(layers, p.pipeline)), None):
        choices.append(f"first_stage_layers {stages_layers[0]} with last_stage_layers {stages_layers[1]}")
    yield (
        f"{layers}{uneven} layers / ({stages} stages x {chunks} chunks) = {rest / max(1, stages * chunks):.2f}: "
        f"must be an integer and at least 1; nearest legal: {', '.join(choices)}"
    )


def uneven_stages(layers: int, stages: int) -> Iterator[tuple[int, int]]:
    """Yield (first, last) stage layers with equal stages in between and a lighter last one, which has the LM head."""
    if stages < 2:
        return
    seen = set()
    for lighter in range(5):
        most = -(-(layers + lighter) // stages)
        last = most - lighter
        first = layers - (stages - 2) * most - last
        if last >= 1 and 1 <= first <= most and (first, last) not in seen and (first != most or lighter):
            seen.add((first, last))
            yield first, last


def enumerate_layouts(
    model: ModelShape,
    gpus: int,
    budgets: Sequence[int],
    recompute: Iterable[Recompute] = ("none", "full"),
    most_tensor: int = 8,
    most_replicas: int | None = None,
) -> Iterator[Layout]:
    """Yield every legal layout of `gpus` GPUs; uneven stages only with a lighter last one.

    Args:
        budgets: choices of tokens per micro-batch.
        most_tensor: GPUs of an NVLink domain; tensor parallelism beyond it is never best.
        most_replicas: the number of sequences in an update.
    """
    recompute = tuple(recompute)
    for p in _parallel_configs(model, gpus, most_tensor):
        if p.data <= (most_replicas or gpus):
            for budget in budgets:
                yield from (Layout(p, budget, mode) for mode in recompute)


def _parallel_configs(model: ModelShape, gpus: int, most_tensor: int) -> Iterator[ParallelConfig]:
    tensors = [t for t in divisors(gpus) if t <= most_tensor and model.num_heads % t == 0 and kv_heads_split(model, t)]
    for t in tensors:
        if model.experts is None and model.ffn_hidden_size % t:
            continue
        for pp in [n for n in divisors(gpus // t) if n <= model.num_layers]:
            for c in [n for n in divisors(gpus // t // pp) if n <= _MOST_CONTEXT]:
                base = ParallelConfig(world_size=gpus, tensor=t, pipeline=pp, context=c, sequence=t > 1)
                for staged in _stagings(model, base):
                    for ep in _expert_sizes(model, staged):
                        yield replace(staged, expert=ep)


def _stagings(model: ModelShape, p: ParallelConfig) -> Iterator[ParallelConfig]:
    if p.pipeline == 1:
        yield p
        return
    layers, chunked = model.num_layers, _SEQUENCE_CHUNKS if model.experts is None and p.context == 1 else ()
    if layers % p.pipeline == 0:
        each = layers // p.pipeline
        yield from (replace(p, virtual_pipeline=v) for v in divisors(each) if v <= _MOST_CHUNKS)
        yield from (replace(p, sequence_chunks=n) for n in chunked)
    for first, last in uneven_stages(layers, p.pipeline):
        uneven = replace(p, first_stage_layers=first, last_stage_layers=last)
        yield from (replace(uneven, sequence_chunks=n) for n in (1, *chunked))


def _expert_sizes(model: ModelShape, p: ParallelConfig) -> list[int]:
    if model.experts is None:
        return [1]
    stage = p.world_size // p.pipeline
    return [e for e in divisors(model.experts.count) if stage % e == 0 and (p.tensor == 1 or e > 1)]


def _around(legal: Sequence[int], wanted: int) -> list[int]:
    """Return the nearest legal values on both sides."""
    below, above = [n for n in legal if n < wanted], [n for n in legal if n > wanted]
    return [*below[-1:], *above[:1]]


def divisors(n: int) -> list[int]:
    """Return the divisors of n, smallest first."""
    small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})
