"""Comparison of measured layouts: best layouts, efficiency, and layouts not measured yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from megatron_fipo.report.parts import figure_text
from megatron_fipo.scaling.cost.layout import Layout
from megatron_fipo.scaling.measure.row_reader import MeasuredRow


@dataclass(frozen=True)
class Best:
    """Fastest layout at a number of GPUs.

    Attributes:
        efficiency: its tokens/s/GPU relative to the best layout on the fewest GPUs.
        others: further layouts measured with that number of GPUs.
    """

    row: MeasuredRow
    efficiency: float
    others: int


@dataclass(frozen=True)
class LossPair:
    """One layout, trained with the FIPO loss and with plain cross-entropy."""

    fipo: MeasuredRow
    plain: MeasuredRow

    @property
    def ratio(self) -> float:
        assert self.fipo.seconds is not None
        assert self.plain.seconds is not None
        return self.fipo.seconds / self.plain.seconds


def settings(rows: Sequence[MeasuredRow]) -> list[tuple[str, str, str]]:
    """Return the settings (model, GPU and loss) within which layouts are compared."""
    return sorted({row.setting for row in rows})


def best_layouts(rows: Sequence[MeasuredRow]) -> list[Best]:
    """Return the best layouts of each setting by number of GPUs, by rate, since weak scaling grows the update."""
    rated = sorted((r for r in rows if r.ok and r.tokens_per_second_per_gpu), key=_by_setting_and_gpus)
    found: list[Best] = []
    for _, own in groupby(rated, key=lambda r: r.setting):
        base = None
        for _, same in groupby(own, key=lambda r: r.layout.gpus):
            candidates = list(same)
            best = min(candidates, key=lambda r: (-_rate(r), r.name))
            base = base or _rate(best)
            found.append(Best(best, _rate(best) / base, len(candidates) - 1))
    return found


def ranked(rows: Sequence[MeasuredRow]) -> list[MeasuredRow]:
    """Sort by setting and GPUs, fastest first, unmeasured last."""
    return sorted(rows, key=lambda r: (*_by_setting_and_gpus(r), not r.ok, -(r.tokens_per_second_per_gpu or 0), r.name))


def pending(planned: Sequence[Layout], rows: Sequence[MeasuredRow]) -> list[Layout]:
    """Return the plan's layouts without a row, in the plan's order."""
    done = {row.layout for row in rows}
    return [layout for layout in planned if layout not in done]


def loss_pairs(rows: Sequence[MeasuredRow]) -> list[LossPair]:
    """Pair rows of the same model, GPU and layout under both losses."""
    timed = {(r.model, r.gpu, r.layout, r.tokens, r.loss): r for r in rows if r.ok and r.seconds}
    pairs = []
    for (*where, loss), row in timed.items():
        plain = timed.get((*where, "lm"))  # type: ignore[arg-type]
        if loss == "fipo" and plain is not None:
            pairs.append(LossPair(row, plain))
    return sorted(pairs, key=lambda pair: pair.ratio)


def shown_timelines(rows: Sequence[MeasuredRow]) -> list[MeasuredRow]:
    """Return the fastest and the slowest layout, and the fastest for each number of stages."""
    timed = sorted((r for r in rows if r.ok and r.timeline is not None), key=lambda r: (-_rate(r), r.name))
    first_of = {row.layout.parallel.pipeline: row for row in reversed(timed)}
    chosen = {row.name for row in (*timed[:1], *first_of.values(), *timed[-1:])}
    return [row for row in timed if row.name in chosen]


def labels(rows: Sequence[MeasuredRow]) -> dict[str, str]:
    """Return row name -> label for figures: the layout, and what else distinguishes the row."""
    parts = {row.name: _parts(row) for row in rows}
    differing = [i for i in range(1, 6) if len({p[i] for p in parts.values()}) > 1]
    return {name: figure_text(", ".join([p[0], *(p[i] for i in differing)])) for name, p in parts.items()}


def _parts(row: MeasuredRow) -> tuple[str, ...]:
    layout = row.layout
    return (
        layout.label,
        f"{layout.gpus} GPUs",
        f"{layout.tokens_per_micro_batch:,} tokens",
        row.loss,
        row.model,
        row.gpu,
    )


def _rate(row: MeasuredRow) -> float:
    return row.tokens_per_second_per_gpu or 0.0


def _by_setting_and_gpus(row: MeasuredRow) -> tuple[tuple[str, str, str], int]:
    return row.setting, row.layout.gpus
