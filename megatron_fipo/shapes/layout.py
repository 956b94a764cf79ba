"""Layouts supported by Megatron-Core for a model, checked before any rank starts."""

from __future__ import annotations

from megatron_fipo.config import ParallelConfig
from megatron_fipo.shapes import pipeline_layout
from megatron_fipo.shapes.architecture import Architecture


def layout_problems(arch: Architecture, p: ParallelConfig) -> list[str]:
    """Return what prevents Megatron-Core from building the model with this layout; [] if nothing."""
    problems = [*_attention_problems(arch, p.tensor), *_mlp_problems(arch, p)]
    try:
        virtual_stage_layers(arch.num_layers, p)
    except ValueError as error:
        problems.append(str(error))
    return problems


def virtual_stage_layers(num_layers: int, p: ParallelConfig) -> list[int]:
    """Return the layers of each model chunk in the order of the model; chunk c of stage i at c * p.pipeline + i.

    Raises:
        ValueError: the layers cannot be split over the stages; the message shows the arithmetic, or the position in
            parallel.pipeline_layout.
    """
    if p.pipeline_layout is not None:
        return pipeline_layout.virtual_stage_layers(p.pipeline_layout, num_layers, p.pipeline, p.virtual_pipeline)
    return [n // p.virtual_pipeline for n in _equal_chunks(num_layers, p)] * p.virtual_pipeline


def stage_layers(num_layers: int, p: ParallelConfig) -> list[int]:
    """Return the layers of each pipeline stage, first to last.

    Raises:
        ValueError: as `virtual_stage_layers`.
    """
    layers = virtual_stage_layers(num_layers, p)
    return [sum(layers[stage :: p.pipeline]) for stage in range(p.pipeline)]


def _equal_chunks(num_layers: int, p: ParallelConfig) -> list[int]:
    """Return the layers of each pipeline stage without parallel.pipeline_layout, multiples of its model chunks."""
    fixed = [n for n in (p.first_stage_layers, p.last_stage_layers) if n is not None]
    left, stages = num_layers - sum(fixed), p.pipeline - len(fixed)
    if stages < 0:
        raise ValueError("parallel.first_stage_layers and last_stage_layers need parallel.pipeline > 1")
    per_stage, rest = divmod(left, stages) if stages else (0, left)
    uneven = f" - {' - '.join(map(str, fixed))} (first/last stage)" if fixed else ""
    arithmetic = f"{num_layers} layers{uneven} = {left} over {stages} pipeline stages"
    if rest or left < 0 or (stages and per_stage < 1) or min(fixed, default=1) < 1:
        raise ValueError(
            f"{arithmetic} leaves a remainder of {rest}: set parallel.first_stage_layers / last_stage_layers so that "
            f"the other stages are equal with at least one layer, or change parallel.pipeline"
        )
    first = [p.first_stage_layers] if p.first_stage_layers is not None else []
    last = [p.last_stage_layers] if p.last_stage_layers is not None else []
    layers = [*first, *[per_stage] * stages, *last]
    if any(n % p.virtual_pipeline for n in layers):
        raise ValueError(
            f"each stage must have a multiple of parallel.virtual_pipeline {p.virtual_pipeline} layers, got {layers}"
        )
    if both_ends_interleaved(p):
        raise ValueError(
            f"parallel.first_stage_layers {first[0]} and last_stage_layers {last[0]} leave no stage between them, "
            f"which Megatron-Core cannot interleave (virtual_pipeline {p.virtual_pipeline}): set only one of "
            "them"
        )
    return layers


def both_ends_interleaved(p: ParallelConfig) -> bool:
    """Return whether no stage lies between both ends, where Megatron-Core would divide by zero stages."""
    both = p.first_stage_layers is not None and p.last_stage_layers is not None
    return both and p.pipeline == 2 and p.virtual_pipeline > 1


def kv_heads_split(arch: Architecture, tensor: int) -> bool:
    """Return whether each tensor-parallel rank gets whole key/value heads, or whole groups of ranks share one.

    With fewer heads than ranks, Megatron-Core splits the rows of the fused QKV projection evenly, gathers its output,
    and each rank takes its key/value head and its share of that head's queries.
    """
    if tensor <= arch.num_kv_heads:
        return arch.num_kv_heads % tensor == 0
    return tensor % arch.num_kv_heads == 0 and _qkv_rows(arch) % tensor == 0


def _qkv_rows(arch: Architecture) -> int:
    return (arch.num_heads + 2 * arch.num_kv_heads) * arch.head_dim


def _attention_problems(arch: Architecture, tensor: int) -> list[str]:
    problems = []
    if arch.num_heads % arch.num_kv_heads:
        problems.append(
            f"{arch.num_heads} attention heads must be a multiple of the {arch.num_kv_heads} key/value heads"
        )
    if arch.num_heads % tensor:
        legal = [t for t in range(1, arch.num_heads + 1) if arch.num_heads % t == 0]
        problems.append(
            f"{arch.num_heads} attention heads cannot be split over parallel.tensor {tensor}: must be one of {legal}"
        )
    if not kv_heads_split(arch, tensor):
        heads = range(1, arch.num_heads + 1)
        legal = [t for t in heads if arch.num_heads % t == 0 and kv_heads_split(arch, t)]
        problems.append(
            f"{arch.num_kv_heads} key/value heads cannot be split over parallel.tensor {tensor}: must be one of {legal}"
        )
    return problems


def _mlp_problems(arch: Architecture, p: ParallelConfig) -> list[str]:
    """Return problems of splitting MLPs over tensor-parallel ranks, or experts over ranks."""
    if arch.experts is None:
        problems = []
        if arch.ffn_hidden_size % p.tensor:
            problems.append(f"MLP width {arch.ffn_hidden_size} must be a multiple of parallel.tensor {p.tensor}")
        if p.expert > 1:
            problems.append(f"parallel.expert {p.expert}: a {arch.model_type} model has no experts")
        return problems
    problems = []
    if p.sequence_chunks > 1:
        problems.append(
            f"parallel.sequence_chunks {p.sequence_chunks} is for models without experts: set it to 1 for a "
            f"{arch.model_type} model"
        )
    if arch.experts.count % p.expert:
        legal = [e for e in range(1, arch.experts.count + 1) if arch.experts.count % e == 0]
        problems.append(
            f"{arch.experts.count} experts cannot be split over parallel.expert {p.expert}: must be one of {legal}"
        )
    if p.tensor > 1 and not p.sequence:
        problems.append("a model with experts needs parallel.sequence=true with parallel.tensor > 1")
    if p.tensor > 1 and p.expert == 1:  # Megatron-Core would not sum an expert's gradients over these ranks
        problems.append(f"a model with experts needs parallel.expert > 1 with parallel.tensor {p.tensor}")
    return problems
