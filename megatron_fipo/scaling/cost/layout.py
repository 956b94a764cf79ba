"""Layout of a training job: parallel sizes, tokens per micro-batch, and recomputation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, TypeAlias, get_args

from megatron_fipo.config import Config, ParallelConfig
from megatron_fipo.scaling.cost.model_shapes import ModelShape
from megatron_fipo.shapes.layout import virtual_stage_layers
from megatron_fipo.shapes.pipeline_layout import compact

Recompute: TypeAlias = Literal["none", "selective", "full"]
RECOMPUTE: tuple[Recompute, ...] = get_args(Recompute)
# Fields of a layout's record, in files of plans and of measured rows, beside recompute and sequence
COUNTS = ("gpus", "tensor", "pipeline", "virtual_pipeline", "context", "expert", "tokens_per_micro_batch")
END_STAGES = ("first_stage_layers", "last_stage_layers")
OPTIONAL_COUNTS = (*END_STAGES, "sequence_chunks")  # absent: the setting's default
PIPELINE_LAYOUT = "pipeline_layout"  # the same, but text
_SIZES = ("tensor", "pipeline", "virtual_pipeline", "context", "expert")
_COMPARED = ("world_size", "sequence", *_SIZES, *OPTIONAL_COUNTS, PIPELINE_LAYOUT)


@dataclass(frozen=True)
class Layout:
    """Parallel layout of the ranks.

    Attributes:
        parallel: sizes; the other settings have their defaults, so that layouts compare equal by their sizes.
        tokens_per_micro_batch: maximum packed tokens of a micro-batch on one context-parallel group.
        chunk_layers: layers of each model chunk in the order that a micro-batch visits them; None: by `parallel`.
        expert_tensor: ranks that shard each expert; 1 in this package.
        split_head: the LM head is sharded over all stages (vocabulary parallelism) instead of on the last.
    """

    parallel: ParallelConfig
    tokens_per_micro_batch: int
    recompute: Recompute = "none"
    chunk_layers: tuple[int, ...] | None = None
    expert_tensor: int = 1
    split_head: bool = False

    @staticmethod
    def of(config: Config) -> Layout:
        """Return the layout of a run's config."""
        sizes = {name: getattr(config.parallel, name) for name in _COMPARED}
        return Layout(ParallelConfig(**sizes), config.trainer.tokens_per_micro_batch, config.model.recompute)

    @staticmethod
    def from_record(
        counts: Mapping[str, int],
        optional: Mapping[str, int | None],
        pipeline_layout: str | None,
        recompute: Recompute,
        sequence: bool | None,
    ) -> Layout:
        """Return the layout of a record.

        Args:
            counts: the record's `COUNTS`.
            optional: the record's `OPTIONAL_COUNTS`.
            pipeline_layout: the record's `PIPELINE_LAYOUT`.
            sequence: None: sequence parallelism wherever there is tensor parallelism.

        Raises:
            ValueError: the pipeline layout is not in its notation.
        """
        if pipeline_layout is not None:
            compact(pipeline_layout)
        parallel = ParallelConfig(
            world_size=counts["gpus"],
            sequence=counts["tensor"] > 1 if sequence is None else sequence,
            first_stage_layers=optional["first_stage_layers"],
            last_stage_layers=optional["last_stage_layers"],
            sequence_chunks=optional["sequence_chunks"] or 1,
            pipeline_layout=pipeline_layout,
            **{name: counts[name] for name in _SIZES},
        )
        return Layout(parallel, counts["tokens_per_micro_batch"], recompute)

    def record(self) -> dict[str, Any]:
        """Return the layout's fields as named in plans and measured rows."""
        p = self.parallel
        return {
            "gpus": p.world_size,
            "tensor": p.tensor,
            "pipeline": p.pipeline,
            "virtual_pipeline": p.virtual_pipeline,
            "context": p.context,
            "expert": p.expert,
            "data": max(1, p.data),
            "sequence": p.sequence,
            "first_stage_layers": p.first_stage_layers,
            "last_stage_layers": p.last_stage_layers,
            "sequence_chunks": p.sequence_chunks,
            PIPELINE_LAYOUT: p.pipeline_layout,
            "tokens_per_micro_batch": self.tokens_per_micro_batch,
            "recompute": self.recompute,
        }

    def applied(self, config: Config) -> Config:
        """Return the config with this layout, without validation."""
        sizes = {name: getattr(self.parallel, name) for name in _COMPARED}
        return replace(
            config,
            parallel=replace(config.parallel, **sizes),
            model=replace(config.model, recompute=self.recompute),
            trainer=replace(config.trainer, tokens_per_micro_batch=self.tokens_per_micro_batch),
        )

    @property
    def gpus(self) -> int:
        """Number of GPUs."""
        return self.parallel.world_size

    def layers(self, model: ModelShape) -> list[int]:
        """Return the layers of each model chunk; chunk c of stage i at c * stages + i.

        Raises:
            ValueError: they cannot be split over the stages.
        """
        if self.chunk_layers is not None:
            return list(self.chunk_layers)
        return list(_chunk_layers(model.num_layers, self.parallel))

    def __str__(self) -> str:
        return f"{self._axes} DP{self.parallel.data}"

    @property
    def label(self) -> str:
        """Short text that distinguishes layouts of one number of GPUs and of tokens per micro-batch."""
        ends, text = [getattr(self.parallel, name) for name in END_STAGES], self._axes
        if any(n is not None for n in ends):
            text += f" {'..'.join('-' if n is None else str(n) for n in ends)}"
        if self.parallel.pipeline_layout is not None:
            text += f" {self.parallel.pipeline_layout}"
        return text + ("" if self.recompute == "none" else f" {self.recompute}")

    @property
    def _axes(self) -> str:
        p = self.parallel
        axes = (
            *(("TP", p.tensor), ("PP", p.pipeline), ("VPP", p.virtual_pipeline), ("SC", p.sequence_chunks)),
            *(("CP", p.context), ("EP", p.expert)),
        )
        return " ".join(f"{name}{n}" for name, n in axes if n > 1 or name in ("TP", "PP"))


@lru_cache(maxsize=4096)
def _chunk_layers(layers: int, p: ParallelConfig) -> tuple[int, ...]:
    return tuple(virtual_stage_layers(layers, p))
