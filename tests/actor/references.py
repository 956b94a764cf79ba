"""Results of `transformers` for the same checkpoint and responses, one sequence at a time, in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from megatron_fipo.batch import Rollouts
from megatron_fipo.model.architecture import load_hf_config


def load(path: Path, overrides: dict[str, Any] | None = None) -> PreTrainedModel:
    config = load_hf_config(str(path), overrides or {})
    return AutoModelForCausalLM.from_pretrained(path, config=config, dtype=torch.float32, attn_implementation="eager")


@contextmanager
def routers(
    model: PreTrainedModel, forced: Sequence[Sequence[torch.Tensor]] | None = None
) -> Iterator[list[list[torch.Tensor]]]:
    """Collect the router's logits of each layer and sequence, `[tokens, E]`; `forced`: their experts, `[tokens, K]`.

    For models like Qwen3-MoE that divide the probabilities of a token's experts by their sum.
    """
    gates = [module for name, module in model.named_modules() if name.endswith("mlp.gate")]
    collected: list[list[torch.Tensor]] = [[] for _ in gates]

    def hook(layer: int) -> Callable[..., Any]:
        def collect(module: Any, inputs: Any, output: tuple[torch.Tensor, ...]) -> Any:
            logits = output[0]
            collected[layer].append(logits)
            if forced is None:
                return output
            experts = forced[layer][len(collected[layer]) - 1]
            scores = logits.softmax(-1).gather(1, experts)
            return logits, scores / scores.sum(-1, keepdim=True), experts

        return collect

    handles = [gate.register_forward_hook(hook(layer)) for layer, gate in enumerate(gates)]
    yield collected
    for handle in handles:
        handle.remove()


def experts_of(model: PreTrainedModel, rollouts: Rollouts) -> list[list[torch.Tensor]]:
    """Return the experts that the routers choose, `[tokens, K]` of each layer and sequence."""
    with routers(model) as logits, torch.no_grad():
        token_statistics(model, rollouts)
    return [[values.topk(model.config.num_experts_per_tok).indices for values in of_layer] for of_layer in logits]


def balance_loss(logits: list[list[torch.Tensor]], experts: list[list[torch.Tensor]]) -> torch.Tensor:
    """Return the routers' load-balancing loss by its definition, summed over layers: E x sum of f x P, over all tokens.

    Args:
        logits: as of `routers`; P is of them.
        experts: as of `experts_of`; f is of them.
    """
    total = torch.zeros(())
    for of_layer, chosen in zip(logits, experts, strict=True):
        probs, tokens = torch.cat(of_layer).softmax(-1), torch.cat(chosen)  # [T, E], [T, K]
        f = torch.nn.functional.one_hot(tokens, probs.shape[1]).sum(1).float().mean(0) / tokens.shape[1]
        total = total + probs.shape[1] * (f * probs.mean(0)).sum()
    return total


def token_statistics(
    model: PreTrainedModel, rollouts: Rollouts, temperature: float = 1.0
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Log-probability of each response token, and entropy of the distribution it comes from: `[response]` each."""
    log_probs, entropies = [], []
    sequences = rollouts.tokens.split(rollouts.lengths.tolist())
    for sequence, prompt in zip(sequences, rollouts.prompt_lengths.tolist(), strict=True):
        logits = model(input_ids=sequence[None, :-1], use_cache=False).logits[0, prompt - 1 :]
        log_p = (logits / temperature).log_softmax(-1)  # [response, V]
        log_probs.append(log_p.gather(1, sequence[prompt:, None]).squeeze(1))
        entropies.append(-(log_p.exp() * log_p).sum(-1))
    return log_probs, entropies


def gradients(
    model: PreTrainedModel, rollouts: Rollouts, loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Autograd's gradient of `loss(log_probs, entropies)`, both `[R]` over all responses in order."""
    model.zero_grad()
    log_probs, entropies = token_statistics(model, rollouts)
    loss(torch.cat(log_probs), torch.cat(entropies)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
