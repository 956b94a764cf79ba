"""Specifications: defaults, and everything that is wrong in one, before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_fipo.comparison.runs import plan_runs
from megatron_fipo.comparison.spec import LENGTH, SCORE, Endpoint, read_spec

Write = Callable[..., Path]


def test_a_legal_specification(write_spec: Write) -> None:
    """Seeds are counted from 1, endpoints take what they leave out from the defaults, `out` is named as the file."""
    spec = read_spec(write_spec(out=None))
    assert (spec.seeds, spec.pairs, spec.out) == ((1, 2, 3), (("F", "D"),), Path("runs/comparison"))
    assert spec.endpoints == (
        Endpoint("score", "eval/avg@k", 2, 0.01),
        Endpoint("length", "batch/response_length/mean", 3, 0.05, log=True),
    )
    assert read_spec(write_spec(endpoints=None)).endpoints == (SCORE, LENGTH)
    assert (SCORE.last, LENGTH.last) == (5, 20)
    assert spec.error_rate == 0.05


def test_runs_are_planned_seed_by_seed(write_spec: Write) -> None:
    """Each run has its arm's settings over those of all, its seed, name and directory; {seed} stands for the seed."""
    path = write_spec(settings={"model.hf_path": "base-{seed}", "optimizer.lr": 1e-05}, seeds=[7, 2])
    spec = read_spec(path)
    runs = plan_runs(spec)
    assert [(r.name, r.number, r.seed) for r in runs] == [
        ("F-seed7", 1, 7),
        ("D-seed7", 2, 7),
        ("F-seed2", 3, 2),
        ("D-seed2", 4, 2),
    ]
    assert [r.config.algorithm.loss for r in runs] == ["fipo", "grpo"] * 2
    assert [r.config.model.hf_path for r in runs] == ["base-7", "base-7", "base-2", "base-2"]
    assert {(r.config.run.seed, r.directory) for r in runs} == {(r.seed, spec.out / r.name) for r in runs}
    assert {r.config.optimizer.lr for r in runs} == {1e-5}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arm": {}}, "unknown key arm; did you mean 'arms'"),
        ({"config": "nowhere.yaml"}, "config: nowhere.yaml does not exist"),
        ({"config": None}, "config: expected text, got None"),
        ({"arms": {"F": {}}}, "arms: expected a mapping of at least two names"),
        ({"arms": {"F": {}, "a/b": {}}}, "the name 'a/b' must consist of"),
        ({"arms": {"F": {}, "D-seed1": {}}}, "not end in -seedN"),
        ({"arms": {"F": {}, "D": {"run.seed": 1}}}, "arms.D must not set run.seed"),
        ({"arms": {"F": {}, "D": {"loss": "grpo"}}}, "arms.D: 'loss' must have the form section.key"),
        ({"arms": {"F": {}, "D": ["algorithm.loss=grpo"]}}, "arms.D: expected a mapping of section.key"),
        ({"settings": {"run.name": "x"}}, "settings must not set run.name"),
        ({"pairs": []}, "pairs: expected a list such as [[F, D]]"),
        ({"pairs": [["F", "G"]]}, "must be two of the arms F, D"),
        ({"pairs": [["F", "D"], ["D", "F"]]}, "each pair once"),
        ({"pairs": [["F", "F"]]}, "must be two different arms"),
        ({"seeds": 1}, "seeds = 1 must be a number of seeds from 2"),
        ({"seeds": [1, 1]}, "seeds = [1, 1] must be"),
        ({"seeds": True}, "seeds = True must be"),
        ({"endpoints": {"score": {"metric": "eval/avg"}}}, "did you mean 'eval/avg@k'"),
        ({"endpoints": {"score": {"last": 0}}}, "endpoints.score.last = 0 must be"),
        ({"endpoints": {"score": {"log": "yes"}}}, "endpoints.score.log = 'yes' must be true or false"),
        ({"endpoints": {"score": {"best": 5}}}, "unknown key endpoints.score.best"),
        ({"endpoints": {"entropy": {"metric": "policy/entropy", "last": 2}}}, "endpoints.entropy.smallest = None"),
        ({"error_rate": 0}, "error_rate = 0 must be a number greater than 0 and less than 0.5"),
    ],
)
def test_illegal_specifications(changes: dict, message: str, write_spec: Write) -> None:
    """Each is refused with what is wrong and what is allowed."""
    with pytest.raises(ValueError, match="is not a legal comparison") as refused:
        read_spec(write_spec(**changes))
    assert message in str(refused.value)


def test_everything_wrong_is_listed(write_spec: Write) -> None:
    """All at once."""
    with pytest.raises(ValueError, match="legal comparison") as refused:
        read_spec(write_spec(seeds=0, pairs=[["F", "G"]], error_rate=2))
    assert str(refused.value).count("\n  - ") == 3


def test_a_file_that_is_none(tmp_path: Path) -> None:
    """A missing file, a list and broken YAML are named."""
    with pytest.raises(ValueError, match="does not exist"):
        read_spec(tmp_path / "x.yaml")
    for text in ("- 1", "a: [", "arms: {F: {}, F: {}}"):
        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(ValueError, match=r"cannot read .*x\.yaml"):
            read_spec(tmp_path / "x.yaml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": {"F": {}, "D": {"algorithm.los": "grpo"}}}, "arm D, seed 1: unknown config key 'algorithm.los'"),
        ({"arms": {"F": {}, "D": {"trainer.mini_batch_prompts": 3}}}, "arm D, seed 1: illegal configuration"),
        ({"arms": {"F": {}, "D": {"model.hf_path": "x"}}}, "arms F and D differ in model.hf_path"),
        ({"arms": {"F": {}, "D": {"eval.samples": 9}}}, "arms F and D differ in eval.samples: 2 and 9"),
        ({"arms": {"F": {}, "D": {"trainer.max_steps": 5}}}, "arms F and D differ in trainer.max_steps"),
        ({"endpoints": None}, "mean of the last 5 values of eval/avg@k, but a run has 2 evaluations"),
        ({"endpoints": {"length": {}}}, "last 20 values of batch/response_length/mean, but a run has 4 training steps"),
        ({"settings": {"data.validation": None}}, "endpoint score is of evaluations: set data.validation"),
    ],
)
def test_runs_that_cannot_be_compared(changes: dict, message: str, write_spec: Write) -> None:
    """Illegal arms, arms that a seed would not pair, and endpoints that the runs do not reach."""
    with pytest.raises(ValueError, match=r".") as refused:
        plan_runs(read_spec(write_spec(**changes)))
    assert message in str(refused.value)
