"""vLLM servers as the rollout engine: speed relative to the embedded engine, cost of weight updates, waiting time.

    python benchmarks/rollout.py [--pairs 3] [--steps 8] [--parts speed refit waiting]

speed: both engines alternately generate the same number of tokens from the same model and prompts; the result is the
median ratio of vLLM's tokens/s to those of `transformers` in the ranks. `transformers` has all cores; the
worker of a server has one thread, since its scheduler process keeps another core busy.
refit: seconds from exported weights to a server that generates with them, by transport and model size, relative to a
copy of the same bytes in memory. Includes pausing, version, prefix cache and resumption.
waiting: the share of a training step in which the trainer only waits for responses, with `rollout.max_staleness` 0 and
1, on examples/quickstart.yaml with one server. Where ranks and servers share cores, as here, overlap gains little.
Requires `make vllm-env`. Prints a table, and as its last line one JSON object with the same results.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import track
from transformers import PreTrainedModel

from megatron_fipo.config import Config, DataConfig, ModelConfig, ParallelConfig, RolloutConfig, RunConfig, ServerConfig
from megatron_fipo.parallel import topology as topologies
from megatron_fipo.parallel.topology import Topology
from megatron_fipo.rollout import HFEngine, Request, Sampling, VLLMEngine
from small_policy import VOCABULARY, make_model, show

ROOT = Path(__file__).parents[1]
PARTS = ("speed", "refit", "waiting")
SIZES = {"small": (256, 4), "medium": (1024, 8)}  # hidden size and layers
TRANSPORTS = ("file", "gloo")
PROMPTS, GROUP, RESPONSE = 8, 8, 128  # no stop token: all responses have the same length
REFITS = 5
CONSOLE = Console(stderr=True)


def weights_of(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the model's weights."""
    yield from ((name, parameter.detach()) for name, parameter in model.named_parameters())


@contextmanager
def server(directory: Path, topology: Topology, transport: str = "file") -> Iterator[VLLMEngine]:
    """Yield an engine with one server that has the first weights."""
    engine = VLLMEngine(
        Config(
            run=RunConfig(directory=str(directory / "run")),
            model=ModelConfig(hf_path=str(directory), dtype="float32"),
            data=DataConfig(max_prompt_tokens=64),
            rollout=RolloutConfig(
                engine="vllm",
                max_response_tokens=RESPONSE,
                server=ServerConfig(kv_cache_gb=0.25, weight_transport=transport),
            ),
        ),
        topology,
    )
    try:
        yield engine
    finally:
        engine.close()


def speed(directory: Path, topology: Topology, pairs: int) -> dict[str, float]:
    """Return tokens/s of both engines, and the median of their ratios."""
    model = make_model(directory, *SIZES["small"])
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, VOCABULARY, (PROMPTS, 32), generator=generator).tolist()
    requests = [Request(prompt, 100 * p + k) for p, prompt in enumerate(prompts) for k in range(GROUP)]
    sampling = Sampling(1.0, 1.0, 0, RESPONSE, ())
    embedded = HFEngine(model.config, torch.float32, torch.device("cpu"), batch_size=len(requests))
    with server(directory, topology) as servers:
        engines = {"hf": embedded, "vllm": servers}
        rates: dict[str, list[float]] = {name: [] for name in engines}
        for pair in track(range(pairs + 1), "speed", console=CONSOLE):
            for name, engine in engines.items():
                engine.load_weights(weights_of(model))
                started = time.perf_counter()
                responses = engine.generate(requests, sampling)
                seconds = time.perf_counter() - started
                if pair:  # the first pair is a warm-up
                    rates[name].append(sum(len(r.token_ids) for r in responses) / seconds)
    ratios = [v / h for v, h in zip(rates["vllm"], rates["hf"], strict=True)]
    return {
        "hf_tokens_per_second": round(statistics.median(rates["hf"]), 1),
        "vllm_tokens_per_second": round(statistics.median(rates["vllm"]), 1),
        "vllm_over_hf": round(statistics.median(ratios), 3),
    }


def refit(directory: Path, topology: Topology) -> dict[str, float]:
    """Return seconds of a weight update by transport and size, and its ratio to copying the same bytes."""
    figures: dict[str, float] = {}
    cases = [(size, transport) for size in SIZES for transport in TRANSPORTS]
    for size, transport in track(cases, "refit", console=CONSOLE):
        model = make_model(directory / size, *SIZES[size])
        megabytes = sum(p.nbytes for p in model.parameters()) / 1e6
        with server(directory / size, topology, transport) as engine:
            engine.load_weights(weights_of(model))
            updates, copies = [], []
            for _ in range(REFITS):
                started = time.perf_counter()
                copied = [parameter.detach().clone() for parameter in model.parameters()]
                copies.append(time.perf_counter() - started)
                del copied
                started = time.perf_counter()
                engine.load_weights(weights_of(model))
                updates.append(time.perf_counter() - started)
        ratio = statistics.median(u / c for u, c in zip(updates, copies, strict=True))
        figures[f"refit_{transport}_{megabytes:.0f}MB_seconds"] = round(statistics.median(updates), 3)
        figures[f"refit_{transport}_{megabytes:.0f}MB_over_copy"] = round(ratio, 1)
    return figures


def waiting(directory: Path, steps: int) -> dict[str, float]:
    """Return the share of time spent waiting for responses, without the first two steps, and seconds per step."""
    task = [sys.executable, str(ROOT / "examples/quickstart/make_task.py"), "--out", str(directory / "base")]
    subprocess.run(task, check=True, capture_output=True)
    figures: dict[str, float] = {}
    for staleness in track((0, 1), "waiting", console=CONSOLE):
        run = directory / f"staleness-{staleness}"
        overrides = [
            *(f"run.directory={run}", f"model.hf_path={directory}/base", f"data.train={directory}/base/train.parquet"),
            *(
                "data.validation=null",
                "rollout.engine=vllm",
                "rollout.server.kv_cache_gb=0.125",
                "rollout.surplus_groups=drop",
            ),
            *(f"rollout.max_staleness={staleness}", f"trainer.max_steps={steps}", "parallel.world_size=1"),
            *("parallel.tensor=1", "parallel.pipeline=1", "checkpoint.every=0", "trainer.export_policy=false"),
        ]
        command = [sys.executable, "-m", "megatron_fipo.cli", "train", str(ROOT / "examples/quickstart.yaml")]
        ended = subprocess.run([*command, *overrides], capture_output=True, text=True, check=False, cwd=ROOT)
        if ended.returncode:
            raise RuntimeError(f"training with max_staleness={staleness} failed:\n{ended.stderr[-3000:]}")
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][2:]
        step = [row["time/step"] for row in rows]
        share = sum(row["time/rollout"] for row in rows) / sum(step)
        figures[f"waiting_share_staleness_{staleness}"] = round(share, 3)
        figures[f"step_seconds_staleness_{staleness}"] = round(statistics.mean(step), 2)
    return figures


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3, help="timed pairs of the two engines, after a warm-up pair")
    parser.add_argument("--steps", type=int, default=8, help="training steps per staleness")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    options = parser.parse_args()
    if options.pairs < 1 or options.steps < 3:
        parser.error("--pairs must be at least 1 and --steps at least 3")
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    topology = topologies.initialize(ParallelConfig(), seed=0)
    figures: dict[str, float] = {"cores": cores}
    with tempfile.TemporaryDirectory(prefix="rollout-benchmark-") as name:
        directory = Path(name)
        if "speed" in options.parts:
            figures |= speed(directory / "speed", topology, options.pairs)
        if "refit" in options.parts:
            figures |= refit(directory, topology)
        if "waiting" in options.parts:
            figures |= waiting(directory, options.steps)
    dist.destroy_process_group()
    show("vLLM as the rollout engine", figures)


if __name__ == "__main__":
    main()
