"""Tiny policies and rollouts that the tests share."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import random
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from megatron_fipo.batch import Rollouts
from megatron_fipo.config import Config


def tiny_qwen2(**changes: Any) -> Qwen2Config:
    """Return the config of a tiny Qwen2, whose weights are large enough that logits differ between tokens."""
    sizes: dict[str, Any] = {
        "vocab_size": 250,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
        "initializer_range": 0.15,
    }
    return Qwen2Config(**{**sizes, **changes})


def make_qwen2(directory: Path, *, layers: int = 4, vocab: int = 250, tied: bool = False, seed: int = 0) -> Path:
    """Write a random Qwen2 checkpoint, float32."""
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(tiny_qwen2(num_hidden_layers=layers, vocab_size=vocab, tie_word_embeddings=tied))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "norm.weight")):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(directory)
    return directory


def make_config(hf_path: Path | str, **sections: dict[str, Any]) -> Config:
    """A float32 config of one rank; `sections` replace fields, e.g. `parallel={"tensor": 2, "world_size": 2}`."""
    defaults: dict[str, dict[str, Any]] = {
        "model": {"hf_path": str(hf_path), "dtype": "float32", "lm_head_chunk_tokens": 64},
        "data": {"train": "unused", "max_prompt_tokens": 64},
        "rollout": {"prompts_per_step": 4, "group_size": 4, "max_response_tokens": 128},
        "reward": {"overlong_buffer_tokens": 0},
        "optimizer": {"lr": 1e-3, "warmup": 0, "distributed": False},
        "trainer": {"mini_batch_prompts": 2, "tokens_per_micro_batch": 256},
    }
    base = Config()
    changed = {name: {**defaults.get(name, {}), **sections.get(name, {})} for name in {*defaults, *sections}}
    return _replaced(base, changed)


def _replaced(node: Any, changes: dict[str, Any]) -> Any:
    """Replace fields of a dataclass, those of a nested one by a dict."""
    values = {}
    for name, value in changes.items():
        inner = getattr(node, name)
        values[name] = _replaced(inner, value) if dataclasses.is_dataclass(inner) and isinstance(value, dict) else value
    return dataclasses.replace(node, **values)


def make_rollouts(count: int, *, vocab: int = 250, seed: int = 0, longest: int = 60) -> Rollouts:
    """Random responses of very different lengths, with holes in some loss masks and advantages of both signs."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    prompts = [integers(0, vocab, int(integers(1, 12, 1))).tolist() for _ in range(count)]
    responses = [integers(0, vocab, int(integers(1, longest, 1))).tolist() for _ in range(count)]
    rollouts = Rollouts.from_responses(
        ids=range(count),
        prompts=prompts,
        responses=responses,
        log_probs=[[-1.0] * len(r) for r in responses],
        truncated=[False] * count,
    )
    holes = torch.rand(rollouts.tokens.numel(), generator=generator) < 0.1
    return rollouts.replace(advantages=torch.randn(count, generator=generator), loss_mask=rollouts.loss_mask & ~holes)


def make_task(directory: Path, *, seed: int = 0) -> Path:
    """Make the quick start's task: a random checkpoint with tokenizer, chat template and problem files."""
    quickstart = quickstart_script()
    torch.manual_seed(seed)
    directory.mkdir(parents=True, exist_ok=True)
    quickstart.make_model(save_tokenizer(directory)).save_pretrained(directory)
    rng = random.Random(seed)
    for name, count, held in (("train", 32, False), ("validation", 8, True)):
        quickstart.write_problems(quickstart.distinct_problems(rng, count, held=held), directory / f"{name}.parquet")
    return directory


def save_tokenizer(directory: Path) -> Any:
    """Put the quickstart's tokenizer, 30 tokens and a chat template, beside a checkpoint; returns it."""
    tokenizer = quickstart_script().make_tokenizer()
    tokenizer.save_pretrained(directory)
    return tokenizer


@functools.cache
def quickstart_script() -> Any:
    """examples/quickstart/make_task.py as a module."""
    path = Path(__file__).parents[2] / "examples" / "quickstart" / "make_task.py"
    spec = importlib.util.spec_from_file_location("quickstart_make_task", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
