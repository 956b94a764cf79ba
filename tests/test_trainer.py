"""Whole runs of two steps on a random policy: the same on every layout, and what they leave in their directory."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_fipo.actor import GradientError
from megatron_fipo.batching import StepBatch
from megatron_fipo.config import Config, load_config
from megatron_fipo.ops.reference import future_kl_loop
from megatron_fipo.parallel import topology as topologies
from megatron_fipo.reward import Score
from megatron_fipo.trainer import Trainer
from tests.support.policies import make_config, make_task
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

LAYOUTS = {
    "tp2_pp2": {"tensor": 2, "pipeline": 2, "world_size": 4},
    "dp2": {"world_size": 2},
}
UNTRAINED = ("time/", "throughput/", "eval/")
COLUMNS = [
    *("id", "prompt", "response", "response_tokens", "rollout_log_probs", "weight_versions"),
    *("reward", "accuracy", "failure", "advantage", "truncated"),
    *("old_log_probs", "new_log_probs", "future_kl", "influence_weights"),
]


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """Directory of a run that has ended, and the policy's weights on each rank."""

    directory: Path
    weights: list[dict[str, torch.Tensor]]

    def rows(self) -> list[dict[str, float]]:
        """Return the metrics of each step."""
        return [json.loads(line) for line in (self.directory / "metrics.jsonl").read_text().splitlines()]

    def rollouts(self, step: int) -> list[dict[str, Any]]:
        """Return the saved responses of a step, by id."""
        rows = pq.read_table(self.directory / "rollouts" / f"step_{step}.parquet").to_pylist()
        return sorted(rows, key=lambda row: row["id"])

    def summary(self) -> dict[str, Any]:
        return json.loads((self.directory / "summary.json").read_text())


@dataclasses.dataclass(frozen=True)
class OneRank:
    """Results of one rank: a run, the metrics of a dry run, and the error of a run with infinite advantages."""

    weights: dict[str, torch.Tensor]
    dry_run: dict[str, float]
    error: str


RunOf = Callable[[str], FinishedRun]


def parity(responses: Sequence[str], ground_truths: Sequence[str], data_sources: Sequence[str]) -> list[Score]:
    """A reward that an untrained policy gets half of the time, so that most groups are informative."""
    right = [sum(map(ord, response)) % 2 == 0 for response in responses]
    return [Score(1.0 if r else -1.0, float(r), answer=str(r)) for r in right]


def _config(task: Path, out: Path, parallel: dict[str, int] | None = None, **trainer: Any) -> Config:
    config = make_config(
        task,
        run={"name": out.name, "directory": str(out)},
        parallel=parallel or {},
        data={"train": f"{task}/train.parquet", "validation": f"{task}/validation.parquet", "max_prompt_tokens": 16},
        rollout={"max_response_tokens": 12, "max_rounds": 0},
        reward={"function": "tests.test_trainer:parity", "overlong_buffer_tokens": 4},
        # With Adam's usual eps, a weight whose gradient is nearly 0 moves by its sign: rounding would decide.
        optimizer={"distributed": True, "eps": 1e-4, "max_consecutive_skips": 2},
        trainer={"max_steps": 2, "tokens_per_micro_batch": 64, "tensorboard": False, **trainer},
        eval={"every": 0, "samples": 2, "max_problems": 4},
    )
    # Two epochs take the policy away from the old one, so that the loss is not DAPO's.
    return dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, epochs_per_batch=2))


def _train(config: Config) -> dict[str, torch.Tensor]:
    """The run, and its policy's weights."""
    trainer = Trainer(config)
    try:
        trainer.train()
        # The evaluation before and the first step sample with the same weights; each step's new ones are given once.
        assert trainer.engine.held_version == config.trainer.max_steps + 1
        return {name: tensor.clone() for name, tensor in trainer.actor.export_weights()}
    finally:
        trainer.close()
        topologies.destroy()


def _one_rank(config: Config, dry: Config, broken: Config) -> OneRank:
    """A run, a dry run, and a run whose advantages are infinite in step 2."""
    weights = _train(config)
    trainer = Trainer(dry, write=False)
    metrics = trainer.dry_run()
    trainer.close()
    topologies.destroy()
    trainer = Trainer(broken)
    with_advantages, steps = trainer.with_advantages, iter([False, True])

    def spoiled(batch: StepBatch, policy_version: int) -> StepBatch:
        batch = with_advantages(batch, policy_version)
        advantages = batch.rollouts.advantages * (torch.inf if next(steps) else 1)
        return dataclasses.replace(batch, rollouts=batch.rollouts.replace(advantages=advantages))

    trainer.with_advantages = spoiled  # type: ignore[method-assign]
    with pytest.raises(GradientError) as error:
        trainer.train()
    trainer.close()
    topologies.destroy()
    return OneRank(weights, metrics, str(error.value))


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_task(tmp_path_factory.mktemp("task") / "base")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def config(task: Path, runs: Path) -> Config:
    return _config(task, runs / "one", tensorboard=True)


@pytest.fixture(scope="module")
def one_rank(task: Path, runs: Path, config: Config) -> OneRank:
    return run_ranks(_one_rank, 1, config, _config(task, runs / "dry"), _config(task, runs / "broken"))[0]


@pytest.fixture(scope="module")
def finished(one_rank: OneRank, runs: Path) -> FinishedRun:
    return FinishedRun(runs / "one", [one_rank.weights])


@pytest.fixture(scope="module")
def run_of(task: Path, runs: Path, finished: FinishedRun) -> RunOf:
    """run_of(name): the run on one rank, or the one on the layout of this name, which is made once."""

    @functools.cache
    def run(name: str) -> FinishedRun:
        if name == "one":
            return finished
        weights = run_ranks(_train, LAYOUTS[name]["world_size"], _config(task, runs / name, LAYOUTS[name]))
        return FinishedRun(runs / name, weights)

    return run


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_gives_the_same_run(name: str, finished: FinishedRun, run_of: RunOf) -> None:
    """A layout samples the same responses, logs the same metrics and ends with the same weights as one rank.

    What comes out of sampling is equal. What comes out of the policy differs by rounding: 1e-4 of a log-probability
    after the updates; the ratios' quantiles are read from bins 0.4 % wide, and one token of about a hundred may
    cross a clip.
    """
    run = run_of(name)
    for step in (1, 2):
        for row, expected in zip(run.rollouts(step), finished.rollouts(step), strict=True):
            for column in ("id", "prompt", "response_tokens", "reward", "accuracy", "truncated"):
                assert row[column] == expected[column], (step, column)
            assert row["advantage"] == pytest.approx(expected["advantage"], abs=1e-6)
            assert row["rollout_log_probs"] == pytest.approx(expected["rollout_log_probs"], abs=1e-4)
            for column in ("old_log_probs", "new_log_probs", "influence_weights"):
                assert row[column] == pytest.approx(expected[column], abs=5e-4), (step, column)
            assert row["future_kl"] == pytest.approx(expected["future_kl"], abs=5e-3)  # a sum over the response
    for row, expected in zip(run.rows(), finished.rows(), strict=True):
        assert row.keys() == expected.keys()
        for metric in (m for m in expected if not m.startswith(UNTRAINED) and m != "wall_seconds"):
            tolerance = 0.01 if "fraction" in metric else 1e-4
            assert row[metric] == pytest.approx(expected[metric], rel=5e-3, abs=tolerance), metric
    for local in run.weights:
        for parameter, weight in finished.weights[0].items():
            torch.testing.assert_close(local[parameter], weight, rtol=1e-3, atol=1e-4, msg=lambda m, p=parameter: p + m)


@pytest.mark.parametrize("name", ["one", *LAYOUTS])
def test_old_log_probs_are_the_first_update_s_own(name: str, run_of: RunOf) -> None:
    """Before the first update of every step, no log-ratio differs from 0 by a single bit."""
    rows = run_of(name).rows()
    assert len(rows) == 2
    assert [row["policy/first_log_ratio_abs_max"] for row in rows] == [0.0, 0.0]
    assert all(row["policy/log_ratio_abs_max"] > 1e-3 for row in rows)


def test_saved_config_is_the_run_s(config: Config, finished: FinishedRun) -> None:
    """config.yaml reloads to the very config."""
    assert load_config(finished.directory / "config.yaml") == config


def test_metrics_rows(finished: FinishedRun) -> None:
    """One row a step, of finite numbers, with what a user of the recipe watches; 2 mini-batches x 2 epochs updates."""
    rows = finished.rows()
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert all(torch.isfinite(torch.tensor(float(value))) for value in row.values())
        assert row["policy/updates"] == 4
        assert row["batch/responses"] == 16
        sides = row["policy/ppo_clip_fraction_low"], row["policy/ppo_clip_fraction_high"]
        assert sum(sides) == pytest.approx(row["policy/ppo_clip_fraction"], abs=1e-12)
        assert min(sides) > 0
        assert row["policy/lr"] == 1e-3
        assert row["mismatch/abs_mean"] < 1e-5
        assert 0 < row["time/rollout"] + row["time/old_log_probs"] + row["time/update"] <= row["time/step"]
        assert row["throughput/tokens_per_second"] == row["throughput/tokens_per_second_per_rank"] > 0
    watched = {"policy/influence_weight", "policy/entropy", "policy/grad_norm", "policy/approx_kl", "sampling/rounds"}
    assert (
        watched | {"batch/response_length/median", "advantage/length_weighted_mean", "batch/reward"} <= rows[0].keys()
    )
    assert list((finished.directory / "tensorboard").glob("events*"))


def test_evaluation_keys_only_where_evaluated(finished: FinishedRun) -> None:
    """Rows of steps without an evaluation have no eval/ key; the last step has."""
    first, last = finished.rows()
    assert not [key for key in first if key.startswith("eval/") or key == "time/eval"]
    assert {
        "eval/avg@k",
        "eval/cons@k",
        "eval/cons_answered@k",
        "eval/answered",
        "eval/pass@k",
        "time/eval",
    } <= last.keys()


def test_rollouts_file(task: Path, finished: FinishedRun) -> None:
    """A row a trained response: its tokens decode to its text, its length counts, its advantage is the group's."""
    tokenizer = AutoTokenizer.from_pretrained(task)
    for step in (1, 2):
        table = pq.read_table(finished.directory / "rollouts" / f"step_{step}.parquet")
        assert table.column_names == COLUMNS
        rows = finished.rollouts(step)
        assert len(rows) == 16
        for row in rows:
            tokens = row["response_tokens"]
            assert tokenizer.decode(tokens) == row["response"]
            assert row["prompt"].startswith("<bos>")
            assert row["prompt"].endswith("?")
            assert len(row["rollout_log_probs"]) == len(tokens) <= 12
            assert row["weight_versions"] == [step - 1] * len(tokens)
            assert row["truncated"] == (tokens[-1] != tokenizer.eos_token_id)
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            penalty = min(-(len(tokens) - 8) / 4, 0.0)
            assert row["reward"] == pytest.approx(parity([text], [""], [""])[0].reward + penalty)
        for group in (rows[i : i + 4] for i in range(0, 16, 4)):
            rewards = torch.tensor([row["reward"] for row in group])
            expected = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
            torch.testing.assert_close(torch.tensor([row["advantage"] for row in group]), expected)
            assert len({row["prompt"] for row in group}) == 1
            assert 0 < sum(row["accuracy"] for row in group) < 4


def test_batch_figures_are_of_the_saved_responses(finished: FinishedRun) -> None:
    """batch/ in a step's row is what numpy makes of the responses that it trained on."""
    for step, row in enumerate(finished.rows(), start=1):
        saved = finished.rollouts(step)
        lengths = np.array([len(response["response_tokens"]) for response in saved])
        found = [row[f"batch/response_length/{name}"] for name in ("min", "q25", "median", "q75", "max")]
        assert found == pytest.approx(np.quantile(lengths, [0, 0.25, 0.5, 0.75, 1]))
        assert row["batch/response_length/mean"] == pytest.approx(lengths.mean())
        for name in ("reward", "accuracy", "truncated"):
            assert row[f"batch/{name}"] == pytest.approx(np.mean([response[name] for response in saved]))


def test_entropy_before_the_updates() -> None:
    """It is that of the first update's forward pass; policy/entropy is the mean over all of them."""
    entropies = iter([2.0, 1.0, 0.5, 0.5])
    metrics: Any = lambda batch, forward_only: (0.0, {"entropy": next(entropies), "log_ratio_abs_max": 0.0})  # noqa: E731
    update = SimpleNamespace(skipped=False, grad_norm=1.0, lr=0.1)
    actor = SimpleNamespace(training_step=nullcontext, get_loss_and_metrics=metrics, last_update=update, records=False)
    config = make_config("unused", trainer={"epochs_per_batch": 2})
    weighted = lambda batch, *further: batch  # noqa: E731
    trainer: Any = SimpleNamespace(config=config, actor=actor, _with_influence_weights=weighted)
    batches: Any = [None, None]
    summary, _ = Trainer._update_policy(trainer, 1, batches, batches)
    assert (summary["policy/first_entropy"], summary["policy/entropy"]) == (2.0, 1.0)


@pytest.mark.parametrize("name", ["one", *LAYOUTS])
def test_saved_credit_follows_from_the_saved_log_probs(name: str, run_of: RunOf) -> None:
    """Future-KL by its definition, token by token, and the clipped weight, are what the file says the loss used."""
    run, weights = run_of(name), []
    for row in (row for step in (1, 2) for row in run.rollouts(step)):
        new, old = torch.tensor(row["new_log_probs"]), torch.tensor(row["old_log_probs"])
        regular = new - old <= math.log(10.0)
        expected = future_kl_loop(new - old, regular, torch.tensor([0, len(new)]), half_life=32.0)
        torch.testing.assert_close(torch.tensor(row["future_kl"]), expected, rtol=1e-5, atol=1e-6)
        weight = torch.tensor(row["influence_weights"])
        torch.testing.assert_close(weight, expected.exp().clamp(1.0, 1.2), rtol=1e-5, atol=1e-6)
        assert row["old_log_probs"] == pytest.approx(row["rollout_log_probs"], abs=1e-4)
        weights.append(weight)
    everything = torch.cat(weights)
    assert 0.05 < (everything > 1.001).float().mean() < 0.95


def test_summary(finished: FinishedRun) -> None:
    """summary.json holds both evaluations; the last one is the last row's."""
    summary = finished.summary()
    assert summary["steps"] == 2
    assert summary["wall_seconds"] > 0
    assert summary["before"].keys() == {"avg@k", "cons@k", "cons_answered@k", "pass@k"}
    assert summary["after"] == {name: finished.rows()[-1][f"eval/{name}"] for name in summary["after"]}
    assert (summary["evaluation"]["before"]["samples"], summary["evaluation"]["before"]["problems"]) == (2, 4)


def test_evaluated_samples_are_kept(finished: FinishedRun) -> None:
    """evaluation/step_N.parquet has every response of the evaluations before and after, which give their scores."""
    tables = sorted(path.name for path in (finished.directory / "evaluation").iterdir())
    assert tables == ["step_0.parquet", "step_2.parquet"]
    summary = finished.summary()
    for table, when in zip(tables, ("before", "after"), strict=True):
        rows = pq.read_table(finished.directory / "evaluation" / table).to_pylist()
        assert [(row["problem"], row["number"]) for row in rows] == [(p, k) for p in range(4) for k in range(2)]
        assert sum(row["accuracy"] for row in rows) / len(rows) == summary[when]["avg@k"]
        assert {row["answer_class"] == 0 for row in rows if row["accuracy"]} <= {True}


def test_exported_policy(task: Path, finished: FinishedRun) -> None:
    """policy/ loads in transformers with its tokenizer and holds the trained weights bit for bit."""
    model = AutoModelForCausalLM.from_pretrained(finished.directory / "policy", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(task, dtype=torch.float32).state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, finished.weights[0][name])
        assert not torch.equal(weight, base[name])
    tokenizer = AutoTokenizer.from_pretrained(finished.directory / "policy")
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(task).get_vocab()
    assert tokenizer.chat_template


def test_dry_run_writes_nothing(runs: Path, one_rank: OneRank) -> None:
    """A dry run makes its updates, sees log-ratios of 0 first, and leaves no directory."""
    assert one_rank.dry_run["policy/first_log_ratio_abs_max"] == 0.0
    assert one_rank.dry_run["policy/grad_norm"] > 0
    assert not (runs / "dry").exists()


def test_non_finite_loss_names_the_step(runs: Path, one_rank: OneRank) -> None:
    """Infinite advantages in step 2 end the run there, say where, and leave the batch and the row of step 1."""
    message = one_rank.error
    dump = runs / "broken" / "failed_step_2" / "rank_0.pt"
    assert message.startswith("step 2, epoch 1, mini-batch 2 of 2: 2 updates in a row had a gradient norm")
    assert message.endswith(f"the batch is in {dump}")
    micro_batches = torch.load(dump)
    advantages = torch.cat([m["advantages"] for m in micro_batches])
    assert len(advantages) == 8
    assert not advantages.isfinite().any()
    assert [row["step"] for row in FinishedRun(runs / "broken", []).rows()] == [1]
    assert not (runs / "broken" / "summary.json").exists()
