"""Rank all layouts of a model on a number of GPUs by the time of one optimizer update."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from megatron_fipo.config import ParallelConfig
from megatron_fipo.scaling.cost.hardware import Hardware
from megatron_fipo.scaling.cost.layout import Layout, Recompute
from megatron_fipo.scaling.cost.memory import StageMemory
from megatron_fipo.scaling.cost.model_shapes import ModelShape
from megatron_fipo.scaling.cost.sequence_lengths import Sequences
from megatron_fipo.scaling.cost.step_cost import CostModel, StepCost
from megatron_fipo.scaling.cost.workload import Batch, estimated_batch, packed_batch
from megatron_fipo.scaling.pipeline.pipeline_time import pipeline_estimate, pipeline_time
from megatron_fipo.scaling.planner.legal_layouts import enumerate_layouts, layout_problems
from megatron_fipo.scaling.planner.memory_fit import fullest_stage

_REPLAYED = 64  # fastest layouts by estimate that are packed and replayed
_PACKED_AT_MOST = 4096  # sequences; with more, one replica's share of the distribution is packed


@dataclass(frozen=True)
class Candidate:
    """A layout and its cost.

    Attributes:
        memory: peak memory of the fullest stage, `stage`.
        log_prob_seconds: one forward pass over the same sequences, as for old log-probabilities.
        replayed: sequences were packed and the pipeline replayed, instead of estimated.
    """

    layout: Layout
    batch: Batch
    cost: StepCost
    stage: int
    memory: StageMemory
    gpu_memory: float
    log_prob_seconds: float
    replayed: bool

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.gpu_memory

    @property
    def spare(self) -> float:
        """Free bytes; negative: the missing bytes."""
        return self.gpu_memory - self.memory.total


@dataclass(frozen=True)
class Plan:
    """Result of planning.

    Attributes:
        candidates: layouts that fit, fastest first; the first ones replayed, the others estimated.
        rejected: number of legal layouts that do not fit.
        nearest: the layout closest to fitting if none fits.
    """

    candidates: tuple[Candidate, ...]
    rejected: int
    nearest: Candidate | None


@dataclass
class Planner:
    """Planner for one model on one kind of GPU.

    Attributes:
        engine_bytes: bytes per GPU held by a sleeping rollout engine.
    """

    model: ModelShape
    hardware: Hardware
    sequences: Sequences
    precision: str = "bfloat16"
    engine_bytes: float = 0.0
    _packed: dict[tuple[int, ...], Batch] = field(default_factory=dict)

    @cached_property
    def cost_model(self) -> CostModel:
        return CostModel(self.model, self.hardware, self.precision)

    def plan(
        self,
        gpus: int,
        max_tokens: int | None = None,
        recompute: Sequence[Recompute] = ("none", "full"),
    ) -> Plan:
        """Plan over all legal layouts.

        Args:
            max_tokens: per micro-batch; None: one and two times the longest sequence.

        Raises:
            ValueError: there is no legal layout, or a sequence is longer than max_tokens.
        """
        legal = self.layouts(gpus, max_tokens, recompute)
        rough = [self._estimate(layout) for layout in legal]
        fitting = sorted((c for c in rough if c.fits), key=_rank)
        rejected = [c for c in rough if not c.fits]
        best = [self.evaluate(c.layout) for c in fitting[:_REPLAYED]]
        return Plan(
            candidates=(*sorted(best, key=_rank), *fitting[_REPLAYED:]),
            rejected=len(rejected),
            nearest=max(rejected, key=lambda c: c.spare, default=None),
        )

    def layouts(self, gpus: int, max_tokens: int | None, recompute: Sequence[Recompute]) -> list[Layout]:
        """Return the legal layouts whose micro-batches hold every sequence."""
        if gpus < 1:
            raise ValueError(f"{gpus} GPUs: must be at least 1")
        longest = self.sequences.longest
        if max_tokens is not None and max_tokens < longest:
            raise ValueError(f"--max-tokens {max_tokens} must be at least the longest sequence, {longest} tokens")
        budgets = [max_tokens] if max_tokens is not None else [_rounded_up(longest), 2 * _rounded_up(longest)]
        link = min(self.hardware.gpu.link_gpus, 8)
        found = [
            layout
            for layout in enumerate_layouts(self.model, gpus, budgets, recompute, link, len(self.sequences))
            if -(-longest // layout.parallel.sequence_alignment) * layout.parallel.sequence_alignment
            <= layout.tokens_per_micro_batch
        ]
        if not found:
            layout = ParallelConfig(world_size=gpus, pipeline=gpus)
            problems = layout_problems(self.model, layout) or [
                f"{len(self.sequences)} sequences are fewer than the replicas"
            ]
            raise ValueError(f"no legal layout on {gpus} GPUs; e.g. with pp {gpus}: {'; '.join(problems)}")
        return found

    def evaluate(self, layout: Layout) -> Candidate:
        """Evaluate one layout with packed sequences and a replayed pipeline.

        Raises:
            ValueError: the layers cannot be split over the stages, or a sequence does not fit into a micro-batch.
        """
        return self._candidate(layout, self.batch(layout), replayed=True)

    def _estimate(self, layout: Layout) -> Candidate:
        return self._candidate(layout, estimated_batch(self.sequences, layout), replayed=False)

    def _candidate(self, layout: Layout, batch: Batch, replayed: bool) -> Candidate:
        stage, memory = fullest_stage(self.model, self.hardware, layout, self.peak_tokens(layout))
        return Candidate(
            layout=layout,
            batch=batch,
            cost=self.cost_model.step(layout, batch, pipeline_time if replayed else pipeline_estimate),
            stage=stage,
            memory=memory,
            gpu_memory=self.hardware.gpu.memory - self.engine_bytes,
            log_prob_seconds=self.cost_model.forward_seconds(layout, batch),
            replayed=replayed,
        )

    def peak_tokens(self, layout: Layout) -> float:
        """Return the tokens of the largest micro-batch: full, unless a replica's sequences are fewer."""
        share = self.sequences.tokens / layout.parallel.data
        return float(min(layout.tokens_per_micro_batch, max(share, self.sequences.longest)))

    def batch(self, layout: Layout) -> Batch:
        """Pack once for all layouts that pack equally."""
        p = layout.parallel
        multiple = p.pipeline if p.virtual_pipeline > 1 else 1
        key = (p.data, layout.tokens_per_micro_batch, p.sequence_alignment, multiple)
        if key not in self._packed:
            self._packed[key] = self._pack(layout)
        return self._packed[key]

    def _pack(self, layout: Layout) -> Batch:
        p, knee = layout.parallel, self.cost_model.attention_tokens(layout)
        if len(self.sequences) <= _PACKED_AT_MOST or p.data == 1:
            return packed_batch(self.sequences, layout, knee)
        one = self.sequences.resampled(-(-len(self.sequences) // p.data))
        return packed_batch(one, layout, knee, copies=p.data)


@dataclass(frozen=True)
class ScalingRow:
    """Best layout at one number of GPUs.

    Attributes:
        best: the fastest layout.
        efficiency: tokens/s/GPU relative to the first row.
    """

    gpus: int
    best: Candidate
    efficiency: float


def scaling(planner: Planner, counts: Sequence[int], weak: bool, max_tokens: int | None = None) -> Iterator[ScalingRow]:
    """Yield the best layout at each number of GPUs; sizes without a legal layout that fits are skipped.

    Args:
        weak: the batch grows with the GPUs, from the first row's; otherwise it is constant.
    """
    base, first = len(planner.sequences), None
    for gpus in counts:
        sequences = planner.sequences.resampled(base * gpus // counts[0]) if weak else planner.sequences
        at = Planner(planner.model, planner.hardware, sequences, planner.precision, planner.engine_bytes)
        try:
            found = at.plan(gpus, max_tokens).candidates
        except ValueError:
            continue
        if found:
            rate = found[0].cost.tokens_per_second_per_gpu
            first = first or rate
            yield ScalingRow(gpus, found[0], rate / first)


def _rank(c: Candidate) -> tuple[float, float]:
    return c.cost.seconds, c.memory.total


def _rounded_up(tokens: int, multiple: int = 256) -> int:
    return -(-tokens // multiple) * multiple
