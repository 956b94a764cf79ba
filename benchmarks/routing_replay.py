"""Changes of routing and Future-KL of a mixture of experts by a step's updates, and the cost of replaying.

    python benchmarks/routing_replay.py [--base runs/quickstart-moe] [--steps 3] [--repeats 5]

The first time, a model of 16 experts a layer, 4 of them for a token, is pre-trained on the quick start's sums and saved
in BASE (a minute). Then the quick start's first steps are trained on one rank with `moe.routing_replay=rollout` and the
`hf` engine. After the updates of each step its log-probabilities are computed twice with the same weights: with the
experts of the engine, and with those that the routers choose now. Reported are, over all response tokens of the step,

- changed: share of tokens, mean over layers, for which a router would choose other experts;
- log-ratio: mean |new - old log-probability|, replayed; difference: mean change of it when routers choose, nats;
- Future-KL: mean |S_t|, replayed; difference: mean change of it, nats;
- weights: share of tokens whose influence weight changes by more than 0.01.

The second table has the seconds of old log-probabilities and of an update with each setting, as ratios to
`none` in alternating order, of a larger random model: 8 layers of 32 experts, 4 for a token, hidden size 256.
Prints both tables, and as its last line one JSON object with the same figures.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from megatron_fipo import launch, ops
from megatron_fipo.actor import FIPOActor
from megatron_fipo.batch import TrainBatch
from megatron_fipo.batching.distribute import distribute
from megatron_fipo.batching.random_rollouts import random_routing
from megatron_fipo.config import Config, MoEConfig, load_config
from megatron_fipo.model.check import check_model
from megatron_fipo.parallel import topology as topologies
from megatron_fipo.trainer import Trainer
from small_policy import make_batch, make_config

ROOT = Path(__file__).parents[1]
SETTINGS = ("none", "update", "rollout")


def make_base(directory: Path) -> None:
    """Pre-train the mixture of experts in `directory`, unless it is there."""
    if (directory / "config.json").exists():
        return
    spec = importlib.util.spec_from_file_location("make_task", ROOT / "examples" / "quickstart" / "make_task.py")
    assert spec is not None
    assert spec.loader is not None
    task: Any = importlib.util.module_from_spec(spec)
    sys.modules["make_task"] = task
    spec.loader.exec_module(task)
    torch.manual_seed(0)
    directory.mkdir(parents=True, exist_ok=True)
    task.write_problems(task.distinct_problems(random.Random(0), 4000, held=False), directory / "train.parquet")
    tokenizer = task.make_tokenizer()
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    shape = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    experts = {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 64, "norm_topk_prob": True}
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=len(tokenizer), head_dim=32, max_position_embeddings=512, **shape, **experts, **special
        )
    )
    task.pretrain(model, tokenizer, task.sum_example, steps=900, seed=0)
    tokenizer.save_pretrained(directory)
    model.save_pretrained(directory)


def study_config(base: Path, out: str, steps: int) -> Config:
    """Return the quick start's config on one rank, with the engine's experts replayed."""
    return load_config(
        ROOT / "examples" / "quickstart.yaml",
        [
            *(f"model.hf_path={base.resolve()}", f"run.directory={out}", f"trainer.max_steps={steps}"),
            *("parallel.world_size=1", "parallel.tensor=1", "parallel.pipeline=1", "data.validation=null"),
            *("moe.routing_replay=rollout", "checkpoint.every=0", "rollout.save=false"),
        ],
    )


def study(config: Config, out: str) -> None:
    """Train on one rank, and write the figures of each step to `out`."""
    trainer, rows = Trainer(config), []
    actor = trainer.actor
    for step in range(1, config.trainer.max_steps + 1):
        sampled = trainer._sample(is_last=False)
        batch = trainer.with_advantages(sampled, policy_version=step - 1)
        _, mini_batches = distribute(batch.rollouts, batch.groups, step, config, trainer.topology, actor.pack)
        with actor.training():
            prepared = trainer._with_old_log_probs(mini_batches)
            actor.routing.metrics()
            for mini_batch in prepared:
                with actor.training_step():
                    actor.get_loss_and_metrics(mini_batch, forward_only=False)
        rows.append({"step": step, **effect_of_replay(actor, prepared)})
    trainer.close()
    Path(out).write_text(json.dumps(rows))


def effect_of_replay(actor: FIPOActor, batches: list[TrainBatch]) -> dict[str, float]:
    """Return the figures of a step after its updates, as the module says."""
    actor.routing.metrics()
    values = {"replayed": of_tokens(actor, batches)}
    changed = actor.routing.metrics()["moe/replayed_changed"]
    values["chosen"] = of_tokens(actor, [batch.without_routing() for batch in batches])
    (ratio, future, weights), others = values["replayed"], values["chosen"]
    return {
        "changed": changed,
        "log_ratio": float(ratio.abs().mean()),
        "log_ratio_difference": float((others[0] - ratio).abs().mean()),
        "future_kl": float(future.abs().mean()),
        "future_kl_difference": float((others[1] - future).abs().mean()),
        "weights_changed": float(((others[2] - weights).abs() > 0.01).double().mean()),
    }


def of_tokens(actor: FIPOActor, batches: list[TrainBatch]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return log-ratio, Future-KL and influence weight of every response token under the current weights."""
    half_life, columns = actor.config.algorithm.half_life, []
    for batch in batches:
        computed = zip(batch.micro_batches, actor.log_probs(batch), actor.influence(batch), strict=True)
        for m, new, (weights, _) in computed:
            assert m.old_log_probs is not None
            ratio = torch.where(m.loss_mask, new - m.old_log_probs, 0.0)
            future = ops.future_kl(ratio, m.loss_mask, m.response_offsets, half_life)
            columns.append(torch.stack([ratio, future, weights])[:, m.loss_mask])
    ratio, future, weights = torch.cat(columns, dim=1)
    return ratio, future, weights


def make_larger(directory: Path) -> None:
    """Save the model of the second table."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=4096,
        hidden_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=32,
        num_experts_per_tok=4,
        moe_intermediate_size=128,
        norm_topk_prob=True,
        max_position_embeddings=1024,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(directory)


def cost_config(directory: Path, setting: str) -> Config:
    """Return the config that times an update with a setting."""
    return replace(make_config(directory, {}, "float32"), moe=MoEConfig(routing_replay=setting))  # type: ignore[arg-type]


def cost(configs: list[Config], repeats: int, out: str) -> None:
    """Time old log-probabilities and updates of all settings on one rank, alternating; write the seconds to `out`."""
    topology = topologies.initialize(configs[0].parallel, seed=1)
    actors = [FIPOActor(config, check_model(config), topology) for config in configs]
    batches = [with_routing(actor, make_batch(actor)) for actor in actors]
    seconds: dict[str, list[tuple[float, float]]] = {setting: [] for setting in SETTINGS}
    for repeat in range(repeats + 1):
        for setting, actor, batch in zip(SETTINGS, actors, batches, strict=True):
            started = time.perf_counter()
            prepared = actor.with_old_log_probs(batch)
            between = time.perf_counter()
            with actor.training(), actor.training_step():
                actor.get_loss_and_metrics(prepared, forward_only=False)
            if repeat:  # the first one warms up
                seconds[setting].append((between - started, time.perf_counter() - between))
    Path(out).write_text(json.dumps(seconds))


def with_routing(actor: FIPOActor, batch: TrainBatch) -> TrainBatch:
    """Return the batch with random experts, as if they were an engine's, where these are replayed."""
    if actor.config.moe.routing_replay != "rollout":
        return batch
    generator = torch.Generator().manual_seed(1)
    routing = [random_routing(len(m.input_ids), actor.arch, generator).transpose(0, 1) for m in batch.micro_batches]
    return TrainBatch(tuple(m.replace(routing=(r,)) for m, r in zip(batch.micro_batches, routing, strict=True)))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path("runs/quickstart-moe"), help="pre-trained here if missing")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    make_base(args.base)
    with tempfile.TemporaryDirectory() as directory:
        out = f"{directory}/result"
        config = study_config(args.base, f"{directory}/run", args.steps)
        launch.run(study, config.parallel, (config, out))
        rows = json.loads(Path(out).read_text())
        make_larger(Path(directory) / "larger")
        configs = [cost_config(Path(directory) / "larger", setting) for setting in SETTINGS]
        launch.run(cost, configs[0].parallel, (configs, args.repeats, out))
        seconds = json.loads(Path(out).read_text())
    report(rows, seconds)


def report(rows: list[dict[str, float]], seconds: dict[str, list[tuple[float, float]]]) -> None:
    """Print the results."""
    console = Console(width=120)
    table = Table(*rows[0], title="after the updates of a step, with the experts of the engine and the routers' own")
    for row in rows:
        table.add_row(*(f"{value:.4g}" for value in row.values()))
    console.print(table)
    medians = {s: [statistics.median(column) for column in zip(*pairs, strict=True)] for s, pairs in seconds.items()}
    ratios = {
        s: [
            statistics.median(x / y for x, y in zip(column, base, strict=True))
            for column, base in zip(zip(*seconds[s], strict=True), zip(*seconds["none"], strict=True), strict=True)
        ]
        for s in SETTINGS
    }
    table = Table("moe.routing_replay", "old log-probs s", "ratio", "update s", "ratio", title="cost")
    for setting in SETTINGS:
        (old, update), (old_ratio, update_ratio) = medians[setting], ratios[setting]
        table.add_row(setting, f"{old:.2f}", f"{old_ratio:.3f}", f"{update:.2f}", f"{update_ratio:.3f}")
    console.print(table)
    print(json.dumps({"effect": rows, "seconds": medians, "ratios": ratios}))


if __name__ == "__main__":
    main()
