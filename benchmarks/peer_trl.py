"""Seconds of a training step relative to TRL's GRPOTrainer, on the quick start's model and problems.

    python benchmarks/peer_trl.py --venv runs/trl-venv [--pairs 7] [--steps 10] [--ranks 1]

Both sides train the same base model on the same problems, on the CPU in float32, with the same number of prompts,
responses a prompt, updates a step, learning rate, longest response, cores and data-parallel processes. They run
alternately, and each pair begins with the other side; the result is the median over pairs of TRL's seconds a step
divided by this recipe's. TRL runs in an environment of its own, which is made in `--venv` if it is not there (1 GB).

What is not equal is printed with the result. Nothing else should run on the machine. The last line is one JSON object
with the same results.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import track

from megatron_fipo.config import load_config
from small_policy import show

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "examples" / "quickstart.yaml"
PACKAGES = (
    *("trl==1.16.0", "accelerate==1.15.0", "datasets==5.2.0", "pyarrow"),
    f"transformers=={transformers.__version__}",
)
CPU_TORCH = "https://download.pytorch.org/whl/cpu"
WARM_UP = 2  # first steps of a run that do not count
EQUAL = (
    "model, problems, float32, prompts, responses a prompt, updates a step, learning rate, longest response, "
    "cores, processes, versions of torch and transformers"
)
NOT_EQUAL = (
    "this recipe's loss is FIPO, TRL's is DAPO's; both train on all groups (rollout.dynamic_sampling=false)",
    "this recipe computes old log-probabilities of every batch and compares them with the engine's",
    "this recipe writes metrics and all responses at each step, TRL writes nothing",
    "the order of the problems, and with it the responses; their mean length is among the results",
)
CONSOLE = Console(stderr=True)


def make_environment(directory: Path) -> Path:
    """Return the Python of TRL's environment, which is made if it is not there.

    Raises:
        ValueError: the directory holds something else, or packages of other versions.
    """
    python, marker = directory / "bin" / "python", directory / ".peer_trl"
    version = torch.__version__.partition("+")[0]
    wanted = "\n".join([*PACKAGES, f"torch=={version}"])
    if directory.exists():
        found = marker.read_text() if marker.exists() else "nothing that this benchmark has installed"
        if found != wanted:
            raise ValueError(f"--venv {directory} has {found!r}, expected {wanted!r}: name another directory")
        return python
    subprocess.run([sys.executable, "-m", "venv", str(directory)], check=True)
    install = [str(python), "-m", "pip", "install", "-q"]
    with CONSOLE.status(f"installing TRL into {directory}"):
        if subprocess.run([*install, f"torch=={version}+cpu"], check=False, capture_output=True).returncode:
            subprocess.run([*install, f"torch=={version}", "--index-url", CPU_TORCH], check=True)
        subprocess.run([*install, *PACKAGES], check=True)
    marker.write_text(wanted)
    return python


def fipo_seconds(base: Path, directory: Path, ranks: int, cores: int, steps: int) -> tuple[list[float], float]:
    """Train with this recipe; return the seconds of each step behind the warm-up, and the mean response length."""
    overrides = [
        *(f"run.directory={directory}", f"model.hf_path={base}", f"data.train={base}/train.parquet"),
        *("data.validation=null", f"parallel.world_size={ranks}", "parallel.tensor=1", "parallel.pipeline=1"),
        *(f"parallel.threads_per_rank={max(1, cores // ranks)}", "rollout.dynamic_sampling=false"),
        *(f"trainer.max_steps={steps}", "checkpoint.every=0", "trainer.export_policy=false"),
    ]
    run([sys.executable, "-m", "megatron_fipo.cli", "train", str(RECIPE), *overrides])
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert all(row["batch/responses"] == rows[0]["batch/responses"] for row in rows), "a group was left out"
    length = statistics.mean(row["batch/response_length/mean"] for row in rows)
    return intervals([row["wall_seconds"] for row in rows]), length


def trl_seconds(
    python: Path, base: Path, directory: Path, ranks: int, cores: int, steps: int
) -> tuple[list[float], float]:
    """Train with GRPOTrainer; return the same as `fipo_seconds`."""
    config = load_config(RECIPE)
    out = directory / "times"
    directory.mkdir()
    algorithm, rollout = config.algorithm, config.rollout
    options = {
        "base": str(base),
        "out": str(out),
        "ranks": ranks,
        "threads": max(1, cores // ranks),
        "steps": steps,
        "prompts": rollout.prompts_per_step,
        "group": rollout.group_size,
        "updates": rollout.prompts_per_step // config.trainer.mini_batch_prompts,
        "response": rollout.max_response_tokens,
        "lr": config.optimizer.lr,
        "clip_low": algorithm.clip_ratio_low,
        "clip_high": algorithm.clip_ratio_high,
    }
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    script = Path(__file__).with_name("peer_trl_steps.py")
    printed = run([str(python), *launcher, str(script), json.dumps(options)])
    times = [float(line) for line in out.read_text().splitlines()]
    assert len(times) == steps, f"TRL made {len(times)} of {steps} steps"
    return intervals(times), json.loads(printed.splitlines()[-1])["length"]


def run(command: list[str]) -> str:
    """Run a command; return what it printed.

    Raises:
        RuntimeError: it failed.
    """
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if ended.returncode:
        raise RuntimeError(f"{' '.join(command[:4])} ... failed:\n{ended.stdout[-1500:]}\n{ended.stderr[-3000:]}")
    return ended.stdout


def intervals(ends: list[float]) -> list[float]:
    """Return the seconds of each step behind the warm-up, from the times at which steps ended."""
    return [b - a for a, b in itertools.pairwise(ends)][WARM_UP - 1 :]


def compare(python: Path, base: Path, options: argparse.Namespace, cores: int) -> dict[str, float | str]:
    """Run all pairs; return seconds a step of both sides, and their ratios."""
    seconds: dict[str, list[float]] = {"fipo": [], "trl": []}
    lengths: dict[str, list[float]] = {"fipo": [], "trl": []}
    with tempfile.TemporaryDirectory(prefix="peer-trl-") as name:
        for pair in track(range(options.pairs), "pairs", console=CONSOLE):
            sides: dict[str, Callable[[Path], tuple[list[float], float]]] = {
                "fipo": lambda out: fipo_seconds(base, out, options.ranks, cores, options.steps),
                "trl": lambda out: trl_seconds(python, base, out, options.ranks, cores, options.steps),
            }
            for side in list(sides) if pair % 2 == 0 else reversed(sides):
                steps, length = sides[side](Path(name) / f"{side}-{pair}")
                seconds[side].append(statistics.median(steps))
                lengths[side].append(length)
    ratios = [trl / fipo for trl, fipo in zip(seconds["trl"], seconds["fipo"], strict=True)]
    return {
        **{f"{side}_seconds_per_step": round(statistics.median(of), 3) for side, of in seconds.items()},
        "trl_over_fipo": round(statistics.median(ratios), 2),
        "trl_over_fipo_min": round(min(ratios), 2),
        "trl_over_fipo_max": round(max(ratios), 2),
        "confidence_of_min_to_max": round(1 - 2 ** (1 - len(ratios)), 3),  # that the true median is between them
        **{f"{side}_response_length": round(statistics.mean(of), 1) for side, of in lengths.items()},
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, required=True, help="directory of TRL's environment; made if missing")
    parser.add_argument("--base", type=Path, default=ROOT / "runs/quickstart-base", help="base model; made if missing")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument(
        "--steps", type=int, default=10, help=f"steps of a run, of which the first {WARM_UP} do not count"
    )
    parser.add_argument("--ranks", type=int, default=1, help="data-parallel processes of either side")
    options = parser.parse_args()
    if options.pairs < 2 or options.steps <= WARM_UP or options.ranks < 1:
        parser.error(f"--pairs must be at least 2, --steps at least {WARM_UP + 1}, --ranks at least 1")
    try:
        python = make_environment(options.venv.absolute())
    except ValueError as error:
        parser.error(str(error))
    base = options.base.absolute()
    run([sys.executable, str(ROOT / "examples/quickstart/make_task.py"), "--out", str(base)])
    cores = len(os.sched_getaffinity(0))
    print(f"equal: {EQUAL}")
    print("\n".join(f"not equal: {text}" for text in NOT_EQUAL))
    figures = {"cores": cores, "ranks": options.ranks, "pairs": options.pairs, "steps": options.steps - WARM_UP}
    show("a step of TRL's GRPOTrainer against this recipe's", figures | compare(python, base, options, cores))


if __name__ == "__main__":
    main()
