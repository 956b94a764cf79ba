"""Repeatedly killed runs must equal an undisturbed one: N kills at random moments, then a bitwise comparison.

    python benchmarks/kill_soak.py [N] [--layout tp2|dp2|pp2|one] [--seed 0] [--steps 8]

One run is undisturbed. Others, with the same configuration, are repeatedly ended: with SIGKILL to the launcher and
all its ranks, or, one time in four, with SIGUSR1 to the launcher as from Slurm. Each is restarted with the same
command until it finishes. One moment in four is uniform over the whole attempt, including start-up; the others are
uniform over its training, so they fall into generation, updates, evaluations and asynchronous checkpoints alike.
Metrics (except times), trained responses and the final weights are compared with those of the undisturbed run:
every difference is an error, and so is an attempt that fails on its own.
Prints a table, and as its last line one JSON object with the same figures.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

MAKE_TASK = Path(__file__).parents[1] / "examples" / "quickstart" / "make_task.py"
LAYOUTS = {
    "one": ["parallel.world_size=1"],
    "tp2": ["parallel.world_size=2", "parallel.tensor=2"],
    "pp2": ["parallel.world_size=2", "parallel.pipeline=2"],
    "dp2": ["parallel.world_size=2"],
}
# Small batches, several rounds a step, groups kept for the next step, a checkpoint every other step.
CONFIG = """
model: {hf_path: base, dtype: float32}
data: {train: base/train.parquet, validation: base/validation.parquet, max_prompt_tokens: 16}
rollout:
  {prompts_per_step: 4, prompts_per_round: 6, max_rounds: 0, surplus_groups: keep, group_size: 4,
   max_response_tokens: 24}
reward: {function: "soak_reward:parity", overlong_buffer_tokens: 0}
optimizer: {lr: 1.0e-4, warmup: 3}
trainer: {mini_batch_prompts: 2, tokens_per_micro_batch: 256, tensorboard: false}
eval: {every: 3, samples: 2}
checkpoint: {every: 2}
"""
UNREPEATABLE = ("time/", "throughput/", "wall_seconds")
# The base model is untrained; this reward is correct half of the time, so that groups are informative.
REWARD = """
def parity(responses, ground_truths, data_sources):
    return [1.0 if sum(map(ord, response)) % 2 == 0 else -1.0 for response in responses]
"""
ENDED_BY_REQUEST = 75  # exit code that requests a restart
ATTEMPT_LIMIT = 900.0  # seconds; a busy machine takes minutes for an attempt that takes 20 s on an idle one


@dataclass(frozen=True)
class Usual:
    """Durations of the undisturbed run in seconds: of the whole command, and of its training."""

    attempt: float
    training: float


@dataclass
class Soak:
    """Statistics of the disturbed runs."""

    kills: int = 0
    requests: int = 0
    runs: int = 0
    resumed_from: list[int] = field(default_factory=list)  # step of the checkpoint found by each attempt
    errors: list[str] = field(default_factory=list)


def make_task(directory: Path) -> None:
    """Create the quickstart's task with a barely trained model, and the reward above."""
    command = [sys.executable, str(MAKE_TASK), "--out", str(directory / "base"), "--steps", "1"]
    subprocess.run([*command, "--train-problems", "64", "--validation-problems", "4"], check=True, capture_output=True)
    (directory / "soak_reward.py").write_text(REWARD)
    (directory / "soak.yaml").write_text(CONFIG)


def command(run: str, layout: str, steps: int) -> list[str]:
    """Return the command that starts or restarts a run."""
    overrides = [f"run.directory={run}", f"trainer.max_steps={steps}", *LAYOUTS[layout]]
    return [sys.executable, "-m", "megatron_fipo.cli", "train", "soak.yaml", *overrides]


def start(arguments: list[str], directory: Path) -> subprocess.Popen[bytes]:
    """Start the command."""
    environment = {**os.environ, "PYTHONPATH": f"{directory}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    log = (directory / "attempts.log").open("ab")
    return subprocess.Popen(arguments, stdout=log, stderr=log, env=environment, cwd=directory)


def end(process: subprocess.Popen[bytes], politely: bool) -> None:
    """Send SIGUSR1 to the launcher, or SIGKILL to it and all its processes."""
    if politely:
        process.send_signal(signal.SIGUSR1)
        process.wait(ATTEMPT_LIMIT)
        return
    try:
        victims = [*psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        victims = []
    process.kill()
    for victim in victims:
        try:
            victim.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()
    psutil.wait_procs(victims, timeout=10)


def outcome(run: Path) -> dict[str, Any]:
    """Return everything of a finished run that must be reproducible."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found: dict[str, Any] = {
        f"step {row['step']}, {name}": value
        for row in rows
        for name, value in row.items()
        if not name.startswith(UNREPEATABLE)
    }
    found["rows"] = [row["step"] for row in rows]
    for file in sorted((run / "policy").glob("*.safetensors")):
        found[f"policy/{file.name}"] = hashlib.sha256(file.read_bytes()).hexdigest()
    for step in found["rows"]:
        found[f"rollouts of step {step}"] = pq.read_table(run / "rollouts" / f"step_{step}.parquet").to_pylist()
    return found


def differences(expected: dict[str, Any], seen: dict[str, Any]) -> list[str]:
    """Return the names of the differences."""
    return [name for name in sorted(expected.keys() | seen.keys()) if expected.get(name) != seen.get(name)]


def survives_until_its_moment(process: subprocess.Popen[bytes], run: Path, usual: Usual, rng: random.Random) -> bool:
    """Wait for a random moment of an attempt; return False if the attempt ended before."""
    if rng.random() < 0.25:
        return _still_runs_after(process, rng.uniform(0.0, usual.attempt))
    before = _rows(run)
    deadline = time.monotonic() + usual.attempt * 3
    while _rows(run) == before and time.monotonic() < deadline:
        if not _still_runs_after(process, 0.05):
            return False
    return _still_runs_after(process, rng.uniform(0.0, usual.training))


def _rows(run: Path) -> bytes:
    metrics = run / "metrics.jsonl"
    return metrics.read_bytes() if metrics.exists() else b""


def _still_runs_after(process: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return True
    return False


def disturbed_run(arguments: list[str], run: Path, kills: int, usual: Usual, rng: random.Random, soak: Soak) -> None:
    """Restart a run until it finishes, ending up to `kills` attempts at random moments."""
    soak.runs += 1
    while True:
        whole = [int(p.parent.name.partition("_")[2]) for p in run.glob("checkpoints/step_*/complete.json")]
        soak.resumed_from.append(max(whole, default=0))
        process = start(arguments, run.parent)
        if kills > 0 and survives_until_its_moment(process, run, usual, rng):
            kills -= 1
            disturb(process, politely=rng.random() < 0.25, soak=soak)
            continue
        if _still_runs_after(process, ATTEMPT_LIMIT):
            end(process, politely=False)
            soak.errors.append(f"{run.name}: an attempt took more than {ATTEMPT_LIMIT:.0f} s")
        elif process.returncode != 0:
            soak.errors.append(f"{run.name}: an attempt failed on its own with {process.returncode}")
        return


def disturb(process: subprocess.Popen[bytes], politely: bool, soak: Soak) -> None:
    """End an attempt and record it."""
    end(process, politely)
    soak.requests += politely
    soak.kills += not politely
    # A request before the launcher handles signals ends it like any program; one at the very end is too late.
    if politely and process.returncode not in (0, ENDED_BY_REQUEST, -signal.SIGUSR1):
        soak.errors.append(f"after a stop request, an attempt exited with {process.returncode}")


def main() -> None:
    """Run the soak test."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kills", type=int, nargs="?", default=4)
    parser.add_argument("--layout", choices=LAYOUTS, default="tp2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--kills-per-run", type=int, default=5)
    options = parser.parse_args()
    if options.kills < 1 or options.steps < 1 or options.kills_per_run < 1:
        parser.error("the numbers of kills and steps must be positive")
    rng, soak = random.Random(options.seed), Soak()
    with tempfile.TemporaryDirectory(prefix="kill-soak-") as name, Progress(console=Console(stderr=True)) as bar:
        directory = Path(name)
        task = bar.add_task("kills", total=options.kills)
        make_task(directory)
        started = time.monotonic()
        if start(command("undisturbed", options.layout, options.steps), directory).wait(ATTEMPT_LIMIT) != 0:
            sys.exit("the undisturbed run failed:\n" + (directory / "attempts.log").read_text()[-4000:])
        undisturbed = directory / "undisturbed"
        training = json.loads(_rows(undisturbed).splitlines()[-1])["wall_seconds"]
        usual = Usual(attempt=time.monotonic() - started, training=training)
        expected = outcome(undisturbed)
        while soak.kills + soak.requests < options.kills and not soak.errors:
            run = directory / f"run-{soak.runs}"
            left = min(options.kills - soak.kills - soak.requests, options.kills_per_run)
            disturbed_run(command(run.name, options.layout, options.steps), run, left, usual, rng, soak)
            if not soak.errors:
                soak.errors += [f"{run.name}: {d} differs" for d in differences(expected, outcome(run))]
            bar.update(task, completed=soak.kills + soak.requests)
        if soak.errors:
            sys.stderr.write((directory / "attempts.log").read_text()[-8000:])
    report(soak, options, usual)
    sys.exit(1 if soak.errors else 0)


def report(soak: Soak, options: argparse.Namespace, usual: Usual) -> None:
    """Print the results."""
    table = Table(title=f"kill soak, layout {options.layout}, {options.steps} steps, seed {options.seed}")
    table.add_column("what")
    table.add_column("number", justify="right")
    figures = {
        "SIGKILL": soak.kills,
        "SIGUSR1": soak.requests,
        "runs": soak.runs,
        "attempts": len(soak.resumed_from),
        "attempts that found a checkpoint": sum(step > 0 for step in soak.resumed_from),
        "wrong or failed": len(soak.errors),
    }
    for what, number in figures.items():
        table.add_row(what, str(number))
    console = Console()
    console.print(table)
    for error in soak.errors[:20]:
        console.print(f"[red]{error}")
    line = {
        **figures,
        "undisturbed_seconds": round(usual.attempt, 1),
        "layout": options.layout,
        "errors": soak.errors[:20],
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
