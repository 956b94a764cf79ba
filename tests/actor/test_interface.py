"""The actor through NeMo-Aligner's own interface, and without the package."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_fipo.actor import FIPOActor
from megatron_fipo.batch import TrainBatch
from megatron_fipo.rollout import Request, Response, Sampling
from tests.actor import references
from tests.support.actors import actor_of, batch_of, weights_of
from tests.support.policies import make_qwen2, make_rollouts
from tests.support.ranks import run_ranks

interface = pytest.importorskip("nemo_aligner.models.alignable_interface")

GREEDY = Sampling(temperature=0, top_p=1.0, top_k=0, max_tokens=12, stop_token_ids=(7,))
REQUESTS = [Request((3, 1, 4, 1, 5), seed=0), Request((9, 2), seed=1), Request((6, 5, 3), seed=2)]


class _Contract:
    """An actor of which only what NeMo-Aligner's interface names can be reached."""

    def __init__(self, actor: FIPOActor) -> None:
        self._actor = actor

    def __getattr__(self, name: str) -> Any:
        assert hasattr(interface.AlignableGenerativeInterface, name), f"{name} is not part of the interface"
        return getattr(self._actor, name)


def _prepared(actor: FIPOActor) -> TrainBatch:
    batch = batch_of(actor, make_rollouts(6))
    return batch.with_token_values(old_log_probs=[x - 0.2 for x in actor.log_probs(batch)])


def _one_step(path: Path, parallel: dict[str, int]) -> dict[str, Any]:
    """A training step, by interface methods alone, and what was seen on the way."""
    with actor_of(path, engine=True, parallel=parallel, algorithm={"kl_coefficient": 0.1}) as actor:
        seen: dict[str, Any] = {
            "is_aligner": isinstance(actor, interface.AlignableGenerativeInterface),
            "before": weights_of(actor),
        }
        batch, contract = _prepared(actor), _Contract(actor)
        contract.prepare_for_inference()
        seen["first_answers"] = contract.infer(REQUESTS, GREEDY)
        contract.finish_inference()
        reference = contract.get_init_policy_logprobs([batch])[0]
        batch = batch.with_token_values(reference_log_probs=reference)
        contract.prepare_for_validation_step()
        seen["validation"] = contract.get_loss_and_metrics(batch, forward_only=True)
        contract.finish_validation_step()
        contract.prepare_for_training()
        contract.prepare_for_training_step()
        seen["training"] = contract.get_loss_and_metrics(batch, forward_only=False)
        contract.finish_training_step()
        contract.finish_training()
        contract.prepare_for_inference()
        seen["answers"] = contract.infer(REQUESTS, GREEDY)
        contract.finish_inference()
        return {**seen, "after": weights_of(actor)}


def _pairs_and_contexts(path: Path) -> dict[str, Any]:
    """The same two updates and one generation, by pairs of calls and by context managers."""
    with actor_of(path, engine=True) as actor:
        batch = _prepared(actor)
        actor.prepare_for_training()
        for _ in range(2):
            actor.prepare_for_training_step()
            actor.get_loss_and_metrics(batch, forward_only=False)
            actor.finish_training_step()
        actor.finish_training()
        actor.prepare_for_inference()
        answers = actor.infer(REQUESTS, GREEDY)
        actor.finish_inference()
        pairs = {"weights": weights_of(actor), "answers": answers, "update": actor.last_update}
    with actor_of(path, engine=True) as actor:
        batch = _prepared(actor)
        with actor.training():
            for _ in range(2):
                with actor.training_step():
                    actor.get_loss_and_metrics(batch, forward_only=False)
        with actor.inference():
            generating = [chunk.training for chunk in actor.chunks]
            answers = actor.infer(REQUESTS, GREEDY)
        contexts = {"weights": weights_of(actor), "answers": answers, "update": actor.last_update}
        modes = {"generating": generating, "afterwards": [chunk.training for chunk in actor.chunks]}
        with pytest.raises(KeyError), actor.inference():
            raise KeyError
        modes["after_error"] = [chunk.training for chunk in actor.chunks]
    with actor_of(path) as actor:
        for call in (lambda: actor.infer(REQUESTS, GREEDY), lambda: actor.get_init_policy_logprobs([])):
            with pytest.raises(RuntimeError, match=r"no rollout engine|only with algorithm\.kl_coefficient"):
                call()
    return {"pairs": pairs, "contexts": contexts, "modes": modes}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen2(tmp_path_factory.mktemp("qwen2"))


@pytest.fixture(scope="module")
def steps(path: Path) -> list[dict[str, Any]]:
    return run_ranks(_one_step, 2, path, {"pipeline": 2, "world_size": 2})


@pytest.fixture(scope="module")
def compared(path: Path) -> dict[str, Any]:
    return run_ranks(_pairs_and_contexts, 1, path)[0]


@torch.no_grad()
def _greedy(path: Path, weights: dict[str, torch.Tensor]) -> list[list[int]]:
    model = references.load(path)
    model.load_state_dict(weights)
    answers = []
    for request in REQUESTS:
        prompt = torch.tensor([request.prompt_ids])
        ids = model.generate(
            prompt, max_new_tokens=GREEDY.max_tokens, do_sample=False, eos_token_id=7, attention_mask=prompt * 0 + 1
        )
        answers.append(ids[0, len(request.prompt_ids) :].tolist())
    return answers


@pytest.mark.distributed
def test_step_through_the_interface_alone(path: Path, steps: list[dict[str, Any]]) -> None:
    """The interface's methods alone train: loss and metrics on every rank, weights moved, engine has the new ones."""
    for seen in steps:
        assert seen["is_aligner"]
        for loss, metrics in (seen["validation"], seen["training"]):
            assert loss == metrics["loss"] == steps[0]["training"][0]
            assert metrics["reference_kl"] == pytest.approx(0.0, abs=1e-9)
        before, after = seen["before"], seen["after"]
        assert all(not torch.equal(after[name], weight) for name, weight in before.items())
        assert [r.token_ids for r in seen["first_answers"]] == _greedy(path, before)
        assert [r.token_ids for r in seen["answers"]] == _greedy(path, after)
        assert seen["answers"] != seen["first_answers"]


@pytest.mark.distributed
def test_context_managers_equal_the_pairs(compared: dict[str, Any]) -> None:
    """`training()`, `training_step()` and `inference()` leave the very weights and answers that the pairs leave."""
    pairs, contexts = compared["pairs"], compared["contexts"]
    assert pairs["update"] == contexts["update"]
    assert pairs["answers"] == contexts["answers"]
    assert all(isinstance(answer, Response) for answer in contexts["answers"])
    assert all(torch.equal(contexts["weights"][name], weight) for name, weight in pairs["weights"].items())


@pytest.mark.distributed
def test_inference_context_restores_training_mode(compared: dict[str, Any]) -> None:
    """The policy is in evaluation mode while it generates, and back in training mode after, even after an error."""
    assert compared["modes"] == {"generating": [False], "afterwards": [True], "after_error": [True]}


def _verbs_without_the_package() -> list[str]:
    for name in [name for name in sys.modules if name.startswith(("nemo_aligner", "megatron_fipo.actor"))]:
        del sys.modules[name]
    sys.modules["nemo_aligner"] = None  # type: ignore[assignment]
    actor = importlib.import_module("megatron_fipo.actor")
    base = importlib.import_module("megatron_fipo.actor.interface").AlignableGenerativeInterface
    assert base.__module__ == "megatron_fipo.actor.interface"
    assert issubclass(actor.FIPOActor, base)
    return [name for name in dir(actor.FIPOActor) if not name.startswith("_")]


@pytest.mark.distributed
def test_stand_in_without_the_package() -> None:
    """Without nemo-aligner the actor has the same verbs, over a base class of our own."""
    contract = {name for name in dir(interface.AlignableGenerativeInterface) if not name.startswith("_")}
    assert contract <= set(run_ranks(_verbs_without_the_package, 1)[0])
