"""Cost of FIPO relative to plain language modelling: forward and backward of an update against Megatron's own.

    python benchmarks/train_step.py [--layout tp2|pp2|one] [--recompute none|full] [--dtype float32|bfloat16]
        [--pairs 9] [--profile]

Both sides run Megatron's schedule over the same packed micro-batches, layers, layout and recomputation, and end with
reduced gradients. The baseline is GPTModel with Megatron's vocabulary-parallel cross-entropy; ours adds entropies,
the Future-KL scan, the FIPO loss and its metrics, and never materializes all logits. They are timed alternately; the
result is the median ratio. The model's LM head has the same share of parameters as at 7B (about 8%).
With --profile the baseline is the same update, and its overhead of profile.pipeline is measured: its timers, and a
trace written after each update. Prints a table, and as its last line one JSON object with the same figures.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_fipo import launch
from megatron_fipo.actor import FIPOActor
from megatron_fipo.actor.optimizer import wrap_for_training
from megatron_fipo.batch import MicroBatch, TrainBatch
from megatron_fipo.config import Config
from megatron_fipo.model.architecture import Architecture
from megatron_fipo.model.attention import PackedSequences
from megatron_fipo.model.build import transformer_config, use_transformer_engine
from megatron_fipo.model.check import check_model
from megatron_fipo.model.layer_spec import decoder_spec
from megatron_fipo.parallel import topology as topologies
from megatron_fipo.parallel.topology import Topology
from megatron_fipo.profiling.pipeline_recorder import PipelineProfile
from small_policy import make_batch, make_config, make_model, show

LAYOUTS = {"one": {}, "tp2": {"tensor": 2}, "pp2": {"pipeline": 2}}


class CrossEntropyModel(GPTModel):
    """Megatron's model with Megatron's loss, with the policy's micro-batches as input."""

    def forward(self, micro_batch: MicroBatch) -> torch.Tensor:
        packed = PackedSequences.of(micro_batch.cu_seqlens, micro_batch.padded_lengths)
        labels = micro_batch.input_ids.roll(-1)
        return super().forward(
            micro_batch.input_ids[None],
            micro_batch.position_ids[None],
            None,
            labels=labels[None],
            packed_seq_params=packed,
        )


def cross_entropy(output: torch.Tensor, micro_batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Return the mean over response positions, in the form of Megatron's per-token loss."""
    mask = torch.zeros(output.numel(), device=output.device)
    mask[micro_batch.hidden_index] = 1
    loss = (output.view(-1).float() * mask).sum()
    return loss, mask.sum().int(), {"loss": loss.detach()}


def baseline_step(arch: Architecture, config: Config, topology: Topology, batch: TrainBatch) -> Callable[[], None]:
    """Return a function that runs forward and backward of the language-modelling loss over the batch."""
    megatron_config = transformer_config(arch, config)
    fused = use_transformer_engine(config.model.transformer_engine)
    model = CrossEntropyModel(
        config=megatron_config,
        transformer_layer_spec=decoder_spec(megatron_config, fused, None, topology.pp.rank(), own_attention=False),
        vocab_size=arch.padded_vocab_size(topology.tp.size()),
        max_sequence_length=arch.max_position_embeddings,
        pre_process=topology.is_first_stage,
        post_process=topology.is_last_stage,
        position_embedding_type="rope",
        rotary_base=arch.rope_theta,
        pg_collection=topology.groups,
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    wrapped = wrap_for_training([model.to(topology.device)], config.optimizer, topology)  # type: ignore[list-item]

    def forward_step(micro_batches: Iterator[MicroBatch], chunk: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        micro_batch = next(micro_batches).to(topology.device)
        return chunk(micro_batch), partial(cross_entropy, micro_batch=micro_batch)

    def step() -> None:
        wrapped[0].zero_grad_buffer()
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(batch.micro_batches),
            model=wrapped[0],
            num_microbatches=len(batch.micro_batches),
            seq_length=1,
            micro_batch_size=1,
            forward_only=False,
        )

    return step


def profiled_step(actor: FIPOActor, step: Callable[[], None], directory: Path) -> Callable[[], None]:
    """Return the step with profile.pipeline."""
    profile = PipelineProfile(actor.chunks[0].config, actor.topology.pp, directory)
    unrecorded = actor.recorder

    def profiled() -> None:
        actor.recorder = profile.recorder
        step()
        profile.finish_step()
        actor.recorder = unrecorded

    return profiled


def timed(action: Callable[[], object]) -> float:
    """Return the seconds until all ranks and their devices have finished; a host barrier is not enough."""
    torch.cuda.synchronize()
    dist.barrier()
    started = time.perf_counter()
    action()
    torch.cuda.synchronize()
    dist.barrier()
    return time.perf_counter() - started


def measure(config: Config, pairs: int, profile: bool, out: str) -> None:
    """Measure on one rank; rank 0 writes the seconds of each pair to `out`."""
    arch = check_model(config)
    topology = topologies.initialize(config.parallel, seed=1)
    actor = FIPOActor(config, arch, topology)
    batch = make_batch(actor)

    def ours() -> None:
        actor.prepare_for_training_step()
        actor.get_loss_and_metrics(batch, forward_only=False)

    measured, baseline = ours, ours
    if profile:
        measured = profiled_step(actor, ours, Path(out).parent / "traces")
    else:
        baseline = baseline_step(arch, config, topology, batch)
    seconds: list[tuple[float, float]] = []
    for _ in range(pairs + 1):
        times = []
        for step in (measured, baseline):
            times.append(timed(step))
        seconds.append((times[0], times[1]))
    if topology.rank == 0:
        tokens = sum(m.input_ids.numel() for m in batch.micro_batches)
        Path(out).write_text(json.dumps({"tokens": tokens, "seconds": seconds[1:]}))  # the first pair is a warm-up


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout", choices=LAYOUTS, default="one")
    parser.add_argument("--recompute", choices=["none", "selective", "full"], default="none")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="dtype of weights and activations"
    )
    parser.add_argument("--pairs", type=int, default=9, help="timed pairs, after a warm-up pair")
    parser.add_argument("--profile", action="store_true", help="measure the cost of profile.pipeline instead")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        make_model(Path(directory), hidden=512, layers=8)
        config = make_config(Path(directory), LAYOUTS[args.layout], args.dtype, args.recompute)
        launch.run(measure, config.parallel, (config, args.pairs, args.profile, f"{directory}/result.json"))
        result = json.loads(Path(directory, "result.json").read_text())
    report(args, result)


def report(args: argparse.Namespace, result: dict[str, Any]) -> None:
    """Print the results."""
    ours, baseline = (statistics.median(times) for times in zip(*result["seconds"], strict=True))
    ratios = sorted(a / b for a, b in result["seconds"])
    names = ("profiled", "plain") if args.profile else ("fipo", "cross_entropy")
    figures = {
        "layout": args.layout,
        "recompute": args.recompute,
        "dtype": args.dtype,
        "tokens": result["tokens"],
        "pairs": len(ratios),
        f"{names[0]}_seconds": round(ours, 4),
        f"{names[1]}_seconds": round(baseline, 4),
        "ratio_median": round(statistics.median(ratios), 4),
        "ratio_min": round(ratios[0], 4),
        "ratio_max": round(ratios[-1], 4),
    }
    against = "the same with profile.pipeline" if args.profile else "Megatron cross-entropy"
    show(f"FIPO update against {against} (forward + backward)", figures)


if __name__ == "__main__":
    main()
