"""Files that a run leaves in its directory, written by rank 0, and its output on the terminal.

config.yaml            the resolved configuration
began.json             when the run began, for chat templates that contain the date
metrics.jsonl          one object a step, flushed at once
tensorboard/           the same numbers; wandb/ too, where trainer.wandb_project is set
rollouts/step_N.parquet  the responses trained on (a directory of parts where there are several replicas)
routing/step_N.parquet   of a mixture of experts: one row a layer, with the load of each expert
traces/rank_R.json     with profile.pipeline: what the rank's pipeline stage did in the newest update
evaluation/step_N.parquet  every response of an evaluation after N steps, with its score
summary.json           evaluation before and after, steps, seconds
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from rich.console import Console
from rich.text import Text

from megatron_fipo import run_lock
from megatron_fipo.atomic_file import read_json, time_in, write_atomically, write_table
from megatron_fipo.batch import FAILURES, Rollouts, TrainBatch
from megatron_fipo.config import Config, to_yaml
from megatron_fipo.data import Prompt
from megatron_fipo.evaluation import Evaluation, Sample
from megatron_fipo.evaluation.sample import full_table
from megatron_fipo.former_names import current_metrics
from megatron_fipo.health import MISMATCH_RULE, Limits, Watch
from megatron_fipo.parallel.topology import Topology
from megatron_fipo.printable import printable
from megatron_fipo.trackers import Tracker, make_trackers

_LEFT = (
    *("metrics.jsonl", "summary.json", "report.html", "credit.html", "began.json"),
    *("tensorboard", "rollouts", "routing", "policy", "figures", "evaluation", "traces", "wandb", "checkpoints"),
)


def leftovers(directory: Path) -> list[Path]:
    """Return what an earlier run left; without its logs, since this attempt is writing to them."""
    named = [directory / name for name in _LEFT]
    return [path for path in named if os.path.lexists(path)] + sorted(directory.glob("failed_step_*"))


def clear(directory: Path) -> None:
    """Remove what an earlier run left."""
    for path in leftovers(directory):
        _remove(path)


def began(directory: Path) -> datetime:
    """Return when the run in a directory began, now if there is none."""
    path = directory / "began.json"
    return time_in(path, read_json(path).get("began")) if path.exists() else datetime.now()


def _rewind(directory: Path, step: int) -> int:
    """Remove what was written of steps after `step`; return the number of metrics rows that stay.

    Metrics of an earlier release get their current names, so that all rows of the file have the same.
    """
    of_steps = ("rollouts/step_*", "routing/step_*.parquet", "evaluation/step_*.parquet", "failed_step_*")
    for path in (path for pattern in of_steps for path in directory.glob(pattern)):
        number = path.name.removesuffix(".parquet").rpartition("_")[2]
        if number.isdecimal() and int(number) > step:  # other names are not of a step
            _remove(path)
    (directory / "summary.json").unlink(missing_ok=True)
    metrics = directory / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    rows = [current_metrics(json.loads(line)) for line in lines if line.endswith("}")]
    finished = [row for row in rows if row["step"] <= step]
    write_atomically(metrics, "".join(f"{json.dumps(row)}\n" for row in finished))
    return len(finished)


def _keep_old_config(path: Path, text: str, step: int) -> None:
    """Write the configuration; keep a different one that was in force up to `step` under another name."""
    if step and path.exists() and path.read_text() != text:
        os.replace(path, path.with_name(f"config_until_step_{step}.yaml"))
    write_atomically(path, text)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():  # removes a link, not its target
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class RunLog:
    """Rank 0 writes; the others only take part in what is collective. `enabled=False` writes nothing at all."""

    def __init__(self, config: Config, rank: int, enabled: bool = True) -> None:
        self.config = config
        self.directory = config.run_directory
        self.rank = rank
        self.writes = enabled and rank == 0
        self.enabled = enabled
        self.console = Console(quiet=rank != 0, highlight=False, markup=False, soft_wrap=True)
        self._started = time.monotonic()
        self._metrics: Any = None
        self._trackers: list[Tracker] = []
        self._claim: int | None = None
        self._health = Watch(Limits(config.rollout.max_response_tokens, config.reward.overlong_buffer_tokens))

    def claim_directory(self) -> None:
        """Lock the run's directory for this process until it ends, before anything is changed there.

        Raises:
            ValueError: another process is training in it.
        """
        if self.writes:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._claim = run_lock.take(self.directory / ".lock", self.warn)

    def keep_beginning(self, time: datetime) -> None:
        """Keep the time at which the run began, for every later attempt."""
        path = self.directory / "began.json"
        if self.writes and not path.exists():
            write_atomically(path, json.dumps({"began": time.isoformat()}) + "\n")

    def open(self, step: int, seconds: float) -> None:
        """Start writing after `step` finished steps, which took `seconds`; what an attempt wrote of later ones goes."""
        self._started = time.monotonic() - seconds
        if not self.writes:
            return
        rows = _rewind(self.directory, step)
        if rows != step:
            self.warn(
                f"{self.directory / 'metrics.jsonl'} has {rows} rows of {step} finished steps; the others are lost"
            )
        _keep_old_config(self.directory / "config.yaml", to_yaml(self.config), step)
        metrics = self.directory / "metrics.jsonl"
        for row in metrics.read_text().splitlines():
            self._health.update(json.loads(row))  # printed by the attempt that found it
        self._metrics = metrics.open("a")
        self._trackers = make_trackers(self.config, step + 1)

    @property
    def seconds(self) -> float:
        """Wall seconds of the run, earlier attempts included."""
        return time.monotonic() - self._started

    def note(self, text: str) -> None:
        """Print a line; names and paths in it are no markup."""
        self.console.print(printable(text))

    def warn(self, text: str) -> None:
        """Print a warning."""
        self.console.print(Text.assemble(("warning:", "yellow"), " ", printable(text)))

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Record a step and print its line, with the time and the device-hours that are left."""
        seconds = self.seconds
        if self.writes:
            numbers = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
            self._metrics.write(json.dumps({"step": step, "wall_seconds": seconds, **numbers}) + "\n")
            self._metrics.flush()
            os.fsync(self._metrics.fileno())  # a checkpoint that counts this row may come to the disk before it does
        for tracker in self._trackers:
            tracker.log(step, metrics)
        begun = self._health.update({"step": step, **metrics})
        self.console.print(self._line(step, metrics, seconds))
        for finding in begun:
            self.warn(finding.text)

    def _line(self, step: int, m: dict[str, float], seconds: float) -> str:
        """Return the progress line: reward and length of the training batch, accuracy of all generated responses."""
        last = self.config.trainer.max_steps
        left = seconds / step * (last - step)
        hours = left * self.config.parallel.world_size / 3600
        weight = f"  f {m['policy/influence_weight']:.3f}" if "policy/influence_weight" in m else ""
        reward = f"{m['batch/reward']:.3f}" if "batch/reward" in m else "-"
        length = f"{m['batch/response_length/mean']:.0f}" if "batch/response_length/mean" in m else "-"
        accuracy = f"{m['generated/accuracy']:.3f}" if "generated/accuracy" in m else "-"
        mismatch = f"  mismatch {m['mismatch/abs_mean']:.2g}" if MISMATCH_RULE in self._health.holding else ""
        return (
            f"step {step:>{len(str(last))}}/{last}  reward {reward}  length {length}  accuracy {accuracy}"
            f"  kl {m['policy/approx_kl']:.1e}{weight}  clip {m['policy/ppo_clip_fraction']:.3f}"
            f"  grad {m['policy/grad_norm']:.2f}{mismatch}  {m['time/step']:.1f} s"
            f"  left {_clock(left)} = {hours:.1f} device-hours"
        )

    def evaluation(self, step: int, e: Evaluation) -> None:
        self.console.print(Text.assemble(("eval", "bold"), f" at step {step}: {_scores_line(e)}"))
        for name, of_one in e.benchmarks.items():
            self.note(f"  {name}: {_scores_line(of_one)}")
        for tracker in self._trackers:
            tracker.log(step, e.metrics())

    def rollouts(
        self, step: int, rollouts: Rollouts, tokenizer: Any, topology: Topology, credit: Mapping[str, torch.Tensor]
    ) -> None:
        """Keep this replica's responses of a step, one row each, written by the first rank of each replica.

        `credit`: more columns of a list a response, their values one response after another (`actor.credit`).
        """
        if not self.enabled or topology.replica.rank() != 0:
            return
        path = self.directory / "rollouts" / f"step_{step}.parquet"
        if topology.dp.size() > 1:
            path = path / f"part-{topology.dp.rank()}.parquet"
        table = _rollout_table(rollouts, tokenizer)
        offsets = pa.array([0, *rollouts.response_lengths.cumsum(0).tolist()], pa.int32())
        for name, values in credit.items():
            table = table.append_column(name, pa.ListArray.from_arrays(offsets, pa.array(values.numpy())))
        write_table(table, path)

    def routing(self, step: int, layers: Sequence[Mapping[str, Any]]) -> None:
        """Keep the routing of a step, one row a layer (`actor.routing`)."""
        if self.writes:
            write_table(pa.Table.from_pylist(list(layers)), self.directory / "routing" / f"step_{step}.parquet")

    def samples(self, step: int, samples: Sequence[Sample], benchmarks: Mapping[str, Sequence[Prompt]]) -> None:
        """Keep what was evaluated after a step, one row a response."""
        if self.writes:
            write_table(full_table(samples, benchmarks), self.directory / "evaluation" / f"step_{step}.parquet")

    def dump(self, step: int, batch: TrainBatch) -> str:
        """Save a mini-batch that broke training for inspection, one file per rank; return a text with its location."""
        if not self.enabled:
            return "the batch was not saved"
        path = self.directory / f"failed_step_{step}" / f"rank_{self.rank}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save([vars(m) for m in batch.micro_batches], path)
        return f"the batch is in {path}"

    def finish(self, before: Evaluation | None, after: Evaluation | None) -> None:
        """Write summary.json, the last file of a run."""
        if not self.writes:
            return
        summary = {
            "run": self.config.run.name,
            "steps": self.config.trainer.max_steps,
            "wall_seconds": self.seconds,
            "before": before.scores() if before else None,
            "after": after.scores() if after else None,
            "evaluation": {"before": asdict(before), "after": asdict(after)} if before and after else None,
        }
        write_atomically(self.directory / "summary.json", json.dumps(summary, indent=2) + "\n")

    def close(self) -> None:
        if self._claim is not None:
            os.close(self._claim)
            self._claim = None
        if self._metrics is not None:
            self._metrics.close()
        for tracker in self._trackers:
            tracker.close()


def _rollout_table(r: Rollouts, tokenizer: Any) -> pa.Table:
    sequences = [t.tolist() for t in r.tokens.split(r.lengths.tolist())]
    prompts = r.prompt_lengths.tolist()
    log_probs = [t.tolist() for t in r.rollout_log_probs.split(r.lengths.tolist())]
    versions = [t.tolist() for t in r.weight_versions.split(r.lengths.tolist())]
    return pa.table(
        {
            "id": r.ids.tolist(),
            "prompt": [tokenizer.decode(s[:p]) for s, p in zip(sequences, prompts, strict=True)],
            "response": [tokenizer.decode(s[p:]) for s, p in zip(sequences, prompts, strict=True)],
            "response_tokens": [s[p:] for s, p in zip(sequences, prompts, strict=True)],
            "rollout_log_probs": [x[p:] for x, p in zip(log_probs, prompts, strict=True)],
            "weight_versions": [v[p:] for v, p in zip(versions, prompts, strict=True)],
            "reward": r.rewards.tolist(),
            "accuracy": r.accuracy.tolist(),
            "failure": pa.array([FAILURES[i] for i in r.failures.tolist()], pa.string()),
            "advantage": r.advantages.tolist(),
            "truncated": r.truncated.tolist(),
        }
    )


def _scores_line(e: Evaluation) -> str:
    """Scores, of Avg@k with the ends of its 95% interval."""
    between = "  [{:.3f}, {:.3f}]".format(*e.intervals["avg@k"]) if e.intervals else ""
    cons = "-" if e.cons is None else f"{e.cons:.3f}"
    answered = "" if e.answered is None else f"  answered {e.answered:.0%}"
    return (
        f"avg@{e.samples} {e.avg:.3f}{between}  cons@{e.samples} {cons}  pass@{e.samples} {e.pass_:.3f}"
        f"{answered}  length {e.length:.0f}  ({e.problems} problems)"
    )


def _clock(seconds: float) -> str:
    if not 0 <= seconds < 1e12:
        return "-"
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
