"""The specifications in examples/: arms, pairs and settings; and the guess-and-check task by its numbers."""

from __future__ import annotations

import json
import random
import sys
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_fipo.comparison.runs import PlannedRun, plan_runs
from megatron_fipo.comparison.spec import read_spec
from megatron_fipo.config import AlgorithmConfig, RewardConfig, load_config
from megatron_fipo.data import load_prompts
from megatron_fipo.reward import make_reward

ROOT = Path(__file__).parents[2]
SPECS = ("compare_quickstart", "compare_guess_and_check", "compare_ablations")


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """examples/quickstart/make_guess_and_check.py, which imports from beside it, as a module."""
    folder = ROOT / "examples" / "quickstart"
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "make_task", raising=False)
    spec = util.spec_from_file_location("make_guess_and_check", folder / "make_guess_and_check.py")
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _runs(name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, PlannedRun]:
    """The first seed's run of each arm."""
    monkeypatch.chdir(ROOT)
    spec = read_spec(Path("examples") / f"{name}.yaml")
    runs = plan_runs(spec)
    assert len(runs) == len(spec.arms) * len(spec.seeds)
    return {run.arm: run for run in runs[: len(spec.arms)]}


@pytest.mark.parametrize("name", SPECS[:2])
def test_four_arms_differ_in_what_they_should(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the loss, the placebo, the mini-batch and the veto alone; updates per step are the paper's 8, and 16."""
    found = {
        arm: (c.algorithm.loss, c.algorithm.influence, c.algorithm.max_dual_clipped_tokens, c.updates_per_step)
        for arm, c in ((arm, run.config) for arm, run in _runs(name, monkeypatch).items())
    }
    usual = AlgorithmConfig().influence
    assert found == {
        "D64": ("grpo", usual, 1, 8),
        "F": ("fipo", usual, 1, 8),
        "P": ("fipo", "placebo", 1, 8),
        "D32": ("grpo", usual, None, 16),
    }


@pytest.mark.parametrize("name", SPECS)
def test_specification_is_legal(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs name arms, and runs have every endpoint's steps and evaluations."""
    monkeypatch.chdir(ROOT)
    spec = read_spec(Path("examples") / f"{name}.yaml")
    runs = plan_runs(spec)
    assert len(runs) == len(spec.arms) * len(spec.seeds)
    assert len(spec.seeds) >= 6
    assert [(e.name, e.last, e.log) for e in spec.endpoints] == [("score", 5, False), ("length", 20, True)]
    words = spec.prepare.split()
    assert (ROOT / words[1]).is_file()
    for run in runs:
        assert run.config.model.hf_path == words[words.index("--out") + 1].replace("{seed}", str(run.seed))
        assert run.config.data.train.startswith(run.config.model.hf_path)
        assert run.config.data.validation == spec.settings["data.validation"]


def test_ablations_change_one_thing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is compared with FIPO, and differs from it in its own setting."""
    runs = _runs("compare_ablations", monkeypatch)
    assert runs["half_life_128"].config.algorithm.half_life == 128
    assert runs["clip_0.8_1.2"].config.algorithm.influence_clip == (0.8, 1.2)
    assert runs["no_clip"].config.algorithm.influence_clip is None
    assert (runs["no_filter"].config.algorithm.dual_clip, runs["fipo"].config.algorithm.dual_clip) == (1e8, 10.0)
    assert [runs[f"mini_batch_{n}"].config.trainer.mini_batch_prompts for n in (4, 16)] == [4, 16]
    assert len(runs) == 12


def test_problems_need_a_pareto_number_of_tries(task: ModuleType) -> None:
    """P(n or more) is n^-0.7, of those that need at most 30; the value is the target at the last try and not before."""
    problems = task.distinct_problems(random.Random(0), 2000, held=False)
    assert len({task.prompt_of(problem) for problem in problems}) == 2000
    beyond = 31**-0.7
    for n in (2, 3, 5, 10, 20):
        share = sum(problem[1] >= n for problem in problems) / 2000
        expected = (n**-0.7 - beyond) / (1 - beyond)
        assert abs(share - expected) < 4 * (expected * (1 - expected) / 2000) ** 0.5
    for problem in problems[:500]:
        target = task.value(problem, problem[1])
        assert [n for n in range(1, 1000) if task.value(problem, n) == target] == [problem[1]]
    with pytest.raises(ValueError, match="must be at most 200"):
        task.distinct_problems(random.Random(0), 201, held=True)


def test_responses_give_up_with_the_probability(task: ModuleType) -> None:
    """After 30% of the wrong tries; a right answer scores, `Answer:0` never; a try has 12 or 13 tokens."""
    rng = random.Random(1)
    problems = [task.sample_problem(rng, held=False) for _ in range(4000)]
    responses = [task.response_to(problem, rng) for problem in problems]
    found = task.behaviour(responses, problems)
    assert found["gives_up"] == pytest.approx(0.3, abs=0.02)
    assert found["correct_calculations"] == 1.0
    truths = [str(problem[1]) for problem in problems]
    scores = make_reward(RewardConfig(function="dapo"))(responses, truths, ["guess_and_check"] * len(truths))
    assert sum(s.accuracy for s in scores) / 4000 == found["accuracy"]
    assert all(s.accuracy == 0 for s, r in zip(scores, responses, strict=True) if r.endswith("Answer:0"))
    longest = task.response_to((0, task.MOST_TRIES), rng, give_up=0.0)
    assert 12 < len(longest) / task.MOST_TRIES < 13.2
    assert len(longest) + 1 <= task.LIMIT
    config = load_config(ROOT / "examples" / "guess_and_check.yaml")
    assert config.rollout.max_response_tokens >= task.LIMIT
    assert config.rollout.max_response_tokens + config.data.max_prompt_tokens <= task.POSITIONS


def test_length_pays(task: ModuleType) -> None:
    """The less a policy gives up, the longer its responses and the higher its accuracy: 0.6 to 1 in this corpus."""
    rng = random.Random(2)
    problems = [task.sample_problem(rng, held=False) for _ in range(3000)]
    found = [
        task.behaviour([task.response_to(p, rng, give_up) for p in problems], problems)
        for give_up in (0.3, 0.2, 0.1, 0.05, 0.0)
    ]
    accuracies, lengths = [one["accuracy"] for one in found], [one["mean_length"] for one in found]
    assert accuracies == sorted(accuracies)
    assert lengths == sorted(lengths)
    assert 0.52 < accuracies[0] < 0.64
    assert accuracies[-1] == 1.0
    assert lengths[-1] > 1.8 * lengths[0]


def test_guess_and_check_command(task: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It writes a checkpoint, different problems with their number of tries as the truth, and what the model does."""
    out = tmp_path / "base"
    sizes = ["--steps", "2", "--train-problems", "20", "--validation-problems", "4"]
    monkeypatch.setattr(sys, "argv", ["make_guess_and_check.py", "--out", str(out), *sizes])
    task.main()
    result: dict[str, Any] = json.loads((out / "task.json").read_text())
    assert result["arguments"]["steps"] == 2
    assert result.keys() >= {"accuracy", "gives_up", "mean_length", "correct_calculations"}
    assert AutoModelForCausalLM.from_pretrained(out).config.max_position_embeddings == task.POSITIONS
    tokenizer = AutoTokenizer.from_pretrained(out)
    for name, count in (("train", 20), ("validation", 4)):
        prompts = load_prompts(out / f"{name}.parquet", tokenizer, max_prompt_tokens=16)
        assert len(prompts) == count
        for prompt in prompts:
            start, target = (int(text[::-1]) for text in prompt.messages[0]["content"][:-1].split(","))
            assert (start + int(prompt.ground_truth)) % 1000 == target
