"""Hidden states of a transformers model between its layers, with the rounding errors of each layer.

A layer's rounding error is measured: the layer is computed once more in a wider dtype, on the same input.

Letters: T input tokens of a sequence, R response tokens, L decoder layers, H hidden size, E experts of a layer, K
experts of a token. Points, as in `model.layer_probe`: 0 behind the embedding, k behind the k-th layer, L + 1 behind the
norm.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from megatron_fipo.parallel.device import nondeterministic_allowed
from megatron_fipo.rollout.routing import router_of

_HEAD_ROWS = 128  # tokens whose logits exist at a time


@dataclass(frozen=True)
class Rounding:
    """Errors of a model over one sequence against itself in a wider dtype, component by component; on the host.

    Attributes:
        hidden: `[L + 2, T]` float64, length of the error of each state relative to the state's; NaN where the wider
            layer chooses other experts.
        log_probs: `[R]` float64, absolute error of each response token's log-probability, nats.
        margins: `[L, T]` float64, logit of the last chosen expert less that of the first other one, in the wider dtype,
            in multiples of the layer's largest error of a logit; None without experts.
    """

    hidden: torch.Tensor
    log_probs: torch.Tensor
    margins: torch.Tensor | None


@dataclass(frozen=True)
class LayerStates:
    """States of a model over one sequence.

    Attributes:
        hidden: `[L + 2, T, H]` in the model's dtype, on its device.
        experts: `[L, T, K]` int64, sorted, on the host; None without experts.
        log_probs: `[R]` float32 of the response tokens, on the host.
        rounding: the errors of all of these.
    """

    hidden: torch.Tensor
    experts: torch.Tensor | None
    log_probs: torch.Tensor
    rounding: Rounding


@torch.no_grad()
def layer_states(model: PreTrainedModel, tokens: torch.Tensor, prompt: int, temperature: float) -> LayerStates:
    """Compute a sequence by itself, without padding and KV cache.

    Args:
        tokens: `[T + 1]` int64, prompt and response.
        prompt: tokens of the prompt.
        temperature: of the log-probabilities.
    """
    tokens = tokens.to(model.device)
    with nondeterministic_allowed():  # experts are added up by index
        recorded = _Recorded(model, tokens[:-1])
        wider = [_wider_layer(model, recorded, k) for k in range(len(model.model.layers))]
        norm = _widened(model.model.norm)(recorded.hidden[-2].to(wide_dtype(model.dtype)))
        hidden = [torch.zeros(len(tokens) - 1, dtype=torch.float64, device=model.device)]  # rows of a table are exact
        hidden += [w.error for w in wider] + [relative_difference(recorded.hidden[-1], norm)]
        targets, states = tokens[prompt:], recorded.hidden[-1][prompt - 1 :]
        log_probs = _log_probs(model.lm_head.weight, states, targets, temperature)
        exact = _log_probs(model.lm_head.weight, states, targets, temperature, wide_dtype(model.dtype))
    margins = [w.margin for w in wider if w.margin is not None]
    return LayerStates(
        hidden=torch.stack(recorded.hidden),
        experts=torch.stack(recorded.experts).sort(-1).values.cpu() if recorded.experts else None,
        log_probs=log_probs.float().cpu(),
        rounding=Rounding(
            hidden=torch.stack(hidden).cpu(),
            log_probs=(log_probs.double() - exact.double()).abs().cpu(),
            margins=torch.stack(margins).cpu() if margins else None,
        ),
    )


def relative_difference(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Return the length of each row's difference relative to the expected row's, `[n, H] x 2 -> [n]` float64.

    Infinite where a difference is NaN.
    """
    length = (found.double() - expected.double()).norm(dim=-1)
    relative = torch.where(length == 0, 0.0, length / expected.double().norm(dim=-1))
    return torch.nan_to_num(relative, nan=torch.inf, posinf=torch.inf)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which rounding errors of `dtype` do not count."""
    return torch.float64 if dtype in (torch.float32, torch.float64) else torch.float32


class _Recorded:
    """Forward pass of the whole model.

    Attributes:
        hidden: `[T, H]` at each point.
        logits: `[T, E]` of each layer's router.
        experts: `[T, K]` of each layer.
        arguments: keyword arguments of each decoder layer.
    """

    def __init__(self, model: PreTrainedModel, tokens: torch.Tensor) -> None:
        self.hidden: list[torch.Tensor] = []
        self.logits: list[torch.Tensor] = []
        self.experts: list[torch.Tensor] = []
        self.arguments: list[dict[str, Any]] = []
        base = model.model
        handles = [m.register_forward_hook(self._keep) for m in (base.embed_tokens, *base.layers, base.norm)]
        handles += [r.register_forward_hook(self._keep_routing) for r in map(router_of, base.layers) if r is not None]
        handles += [m.register_forward_pre_hook(self._keep_arguments, with_kwargs=True) for m in base.layers]
        try:
            base(input_ids=tokens[None], use_cache=False)
        finally:
            for handle in handles:
                handle.remove()

    def _keep(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        self.hidden.append((output[0] if isinstance(output, tuple) else output)[0])

    def _keep_routing(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        logits, _, experts = output
        self.logits.append(logits)
        self.experts.append(experts)

    def _keep_arguments(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.arguments.append(kwargs)


@dataclass(frozen=True)
class _WiderLayer:
    """Comparison of a layer with itself in a wider dtype, on the same input: `[T]` float64 each."""

    error: torch.Tensor
    margin: torch.Tensor | None


def _wider_layer(model: PreTrainedModel, recorded: _Recorded, number: int) -> _WiderLayer:
    dtype = wide_dtype(model.dtype)
    layer, hidden = _widened(model.model.layers[number]), recorded.hidden[number].to(dtype)[None]
    arguments = dict(recorded.arguments[number])
    arguments["position_embeddings"] = model.model.rotary_emb(hidden, position_ids=arguments["position_ids"])
    mask = arguments.get("attention_mask")
    if mask is not None and mask.is_floating_point():
        arguments["attention_mask"] = mask.to(dtype)
    router, found = router_of(layer), list[Any]()
    if router is not None:
        layer.mlp.experts.config._experts_implementation = "eager"  # grouped kernels have no wide dtype
        router.register_forward_hook(lambda module, args, output: found.append(output))
    output = layer(hidden, **arguments)
    error = relative_difference(recorded.hidden[number + 1], (output[0] if isinstance(output, tuple) else output)[0])
    if router is None:
        return _WiderLayer(error, None)
    ((logits, _, experts),) = found
    noise = (logits.double() - recorded.logits[number].double()).abs().max()
    best = logits.double().topk(min(experts.shape[-1] + 1, logits.shape[-1])).values
    gap = best[:, -2] - best[:, -1] if best.shape[-1] > experts.shape[-1] else torch.full_like(best[:, 0], torch.inf)
    same = (experts.sort(-1).values == recorded.experts[number].sort(-1).values).all(-1)
    return _WiderLayer(error.masked_fill(~same, torch.nan), gap / noise)


def _widened(module: torch.nn.Module) -> Any:
    """Return a copy in the wide dtype, its norms included, which transformers computes in float32."""
    copied = copy.deepcopy(module).to(wide_dtype(next(module.parameters()).dtype))
    norms: list[Any] = [m for m in copied.modules() if hasattr(m, "variance_epsilon")]
    for norm in norms:
        shape = norm.weight.shape
        norm.forward = functools.partial(
            F.rms_norm, normalized_shape=shape, weight=norm.weight, eps=norm.variance_epsilon
        )
    return copied


def _log_probs(
    head: torch.Tensor,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    temperature: float,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Return each target's log-probability, `[R]`; `dtype`: of the logits, None: the head's.

    In float32 at least behind the logits, as the engine's sampler does.
    """
    found = []
    weight = head if dtype is None else head.to(dtype)
    for some, ids in zip(hidden.split(_HEAD_ROWS), targets.split(_HEAD_ROWS), strict=True):
        logits = some.to(weight.dtype) @ weight.T
        scores = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
        found.append(scores.log_softmax(-1).gather(1, ids[:, None]).squeeze(1))
    return torch.cat(found)
