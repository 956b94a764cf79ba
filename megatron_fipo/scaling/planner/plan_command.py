"""`megatron-fipo scaling plan`: rank layouts before spending node-hours."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_fipo.config import Config, load_config

if TYPE_CHECKING:
    from megatron_fipo.scaling.cost.hardware import Hardware
    from megatron_fipo.scaling.cost.layout import Recompute
    from megatron_fipo.scaling.planner.planner import Candidate, Plan, Planner

_SCALED = [2**k for k in range(3, 15)]  # 8..16384


def plan(
    config: Annotated[str | None, typer.Argument(help="Run config (YAML): plan it and evaluate its layout.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    model: Annotated[str | None, typer.Option(help="Published name, e.g. qwen2.5-32b, or checkpoint path.")] = None,
    gpu: Annotated[str, typer.Option(help="E.g. A100-80, H100-80, H200, B200, GB200.")] = "H100-80",
    gpus: Annotated[str | None, typer.Option(help="Number of GPUs; 8,16,32 plans each.")] = None,
    global_batch: Annotated[
        int | None, typer.Option(help="Sequences per update; default without CONFIG: 1024.")
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(help="Sequence lengths in tokens: 4096, or 800,1200,..., or p50=3000,p90=9000,p100=20480."),
    ] = None,
    rollouts: Annotated[
        Path | None, typer.Option(help="Sequence lengths from rollouts/step_N.parquet of a run.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Tokens per micro-batch; default: 1x and 2x the longest sequence.")
    ] = None,
    recompute: Annotated[str, typer.Option(help="none, full, or both: none,full.")] = "none,full",
    precision: Annotated[str, typer.Option(help="Matmul dtype: bfloat16, float8, float4.")] = "bfloat16",
    calibration: Annotated[Path | None, typer.Option(help="Calibration file, YAML or JSON.")] = None,
    rows: Annotated[int, typer.Option(help="Rows in the table.")] = 15,
    explain: Annotated[int | None, typer.Option(help="Break down the layout in this row; 0: CONFIG's layout.")] = None,
    scale: Annotated[str | None, typer.Option(help="strong or weak: best layout at 8..16384 GPUs.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write all layouts that fit to this file.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the table's rows with full breakdown to this file.")] = None,
) -> None:
    """Rank all legal layouts that fit into GPU memory by time per update. Runs nothing."""
    from megatron_fipo.scaling.cost.hardware import find_hardware
    from megatron_fipo.scaling.planner import plan_tables

    settings = load_config(config, overrides or []) if config is not None else None
    hardware = find_hardware(gpu, calibration=calibration)
    planner = _planner(settings, model, hardware, global_batch, lengths, rollouts, precision)
    counts, modes = _counts(gpus, settings), _modes(recompute)
    if scale is not None:
        everything = _scale(planner, scale, _SCALED if gpus is None else counts, max_tokens, gpu)
        shown = everything
    else:
        everything, shown = [], []
        for count in counts:
            made = planner.plan(count, max_tokens, modes)
            everything += made.candidates
            shown += made.candidates[:rows]
            name = model or (settings.model.hf_path if settings else "")
            _show(made, planner, f"{name} on {count} x {gpu}", rows, explain)
            if settings is not None and count == settings.parallel.world_size:
                _evaluate_config_layout(settings, planner, made, explain == 0)
    if csv is not None:
        plan_tables.write_csv(csv, everything)
    if json is not None:
        plan_tables.write_json(json, {"gpu": gpu, "layouts": [plan_tables.details(c) for c in shown]})


def _scale(planner: Planner, kind: str, counts: list[int], max_tokens: int | None, gpu: str) -> list[Candidate]:
    from megatron_fipo.scaling.planner import plan_tables
    from megatron_fipo.scaling.planner.planner import scaling as scaled

    if kind not in ("strong", "weak"):
        raise ValueError(f"--scale {kind!r} must be strong or weak")
    found = list(scaled(planner, counts, kind == "weak", max_tokens))
    plan_tables.show([plan_tables.scaling_table(found, f"{kind} scaling on {gpu}, best layout at each size")])
    return [row.best for row in found]


def _show(made: Plan, planner: Planner, title: str, rows: int, explain: int | None) -> None:
    from megatron_fipo.scaling.planner import plan_tables

    title = f"{title}: {len(made.candidates)} layouts fit, {made.rejected} do not"
    if made.candidates:
        plan_tables.show([plan_tables.plan_table(made, title, rows)])
    else:
        typer.echo(title)
    if not made.candidates and made.nearest is not None:
        typer.echo(f"no layout fits; the closest, {made.nearest.layout}, lacks {-made.nearest.spare / 1e9:.1f} GB")
        plan_tables.show(plan_tables.explain_tables(made.nearest))
    if explain:
        if explain > len(made.candidates):
            raise ValueError(
                f"--explain {explain}: must be at most {len(made.candidates)}, the number of layouts that fit"
            )
        plan_tables.show(plan_tables.explain_tables(planner.evaluate(made.candidates[explain - 1].layout)))


def _planner(
    settings: Config | None,
    model: str | None,
    hardware: Hardware,
    global_batch: int | None,
    lengths: str | None,
    rollouts: Path | None,
    precision: str,
) -> Planner:
    from megatron_fipo.scaling.cost.model_shapes import find_model
    from megatron_fipo.scaling.cost.sequence_lengths import parse_lengths, read_rollouts
    from megatron_fipo.scaling.planner import run_inputs
    from megatron_fipo.scaling.planner.planner import Planner

    if (settings is None) == (model is None):
        raise ValueError("scaling plan needs either a CONFIG.yaml or --model NAME")
    if lengths is not None and rollouts is not None:
        raise ValueError("--lengths and --rollouts are mutually exclusive")
    if global_batch is not None and global_batch < 1:
        raise ValueError(f"--global-batch {global_batch} must be at least 1")
    count = global_batch or (run_inputs.update_sequences(settings) if settings else 1024)
    if rollouts is not None:
        sequences = read_rollouts(rollouts, count)
    elif lengths is not None or settings is None:
        sequences = parse_lengths(lengths or "4096", count)
    else:
        sequences = run_inputs.sequences_of(settings).resampled(count)
    if settings is not None:
        return run_inputs.planner_of(settings, hardware, sequences)
    assert model is not None
    return Planner(find_model(model), hardware, sequences, precision)


def _counts(gpus: str | None, settings: Config | None) -> list[int]:
    if gpus is None:
        if settings is None:
            return [8]
        return [settings.parallel.world_size]
    try:
        counts = [int(n) for n in gpus.split(",")]
    except ValueError:
        raise ValueError(f"--gpus {gpus!r} must be numbers, e.g. 8,16,32") from None
    if min(counts) < 1:
        raise ValueError(f"--gpus {gpus!r} must be positive")
    return counts


def _modes(recompute: str) -> list[Recompute]:
    modes: list[Recompute] = []
    for name in recompute.split(","):
        if name == "none":
            modes.append("none")
        elif name == "full":
            modes.append("full")
        else:
            raise ValueError(f"--recompute {recompute!r} must be none, full, or none,full")
    return modes


def _evaluate_config_layout(settings: Config, planner: Planner, made: Plan, explain: bool) -> None:
    """Evaluate the config's own layout."""
    from megatron_fipo.scaling.cost.layout import Layout
    from megatron_fipo.scaling.planner import memory_check, plan_tables
    from megatron_fipo.scaling.planner.legal_layouts import layout_problems

    problems = memory_check.recipe_problems(settings, planner.hardware)
    for problem in problems:
        typer.secho(f"problem: {problem}", fg="yellow")
    layout = Layout.of(settings)
    if layout_problems(planner.model, settings.parallel):
        return
    own = planner.evaluate(layout)
    faster = sum(c.cost.seconds < own.cost.seconds for c in made.candidates)
    fits = f"fits with {own.spare / 1e9:.1f} GB to spare" if own.fits else f"lacks {-own.spare / 1e9:.1f} GB"
    typer.echo(
        f"the config's own {layout}: {own.cost.seconds:.2f} s per update, {own.cost.mfu:.1%} MFU, "
        f"{own.cost.bubble_fraction:.1%} bubble, {fits}; {faster} layouts are faster"
    )
    if made.candidates and faster:
        gain = own.cost.seconds / made.candidates[0].cost.seconds - 1
        typer.echo(f"{gain:.0%} slower than the fastest")
    if explain:
        plan_tables.show(plan_tables.explain_tables(own))
