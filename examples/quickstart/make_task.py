#!/usr/bin/env python3
"""Create the quickstart's task: a tiny base model that can add but often makes mistakes, and problems to train it on.

    python examples/quickstart/make_task.py --out runs/quickstart-base

A problem is a sum of two to four numbers, `12+7+30?`; a response ends with `Answer:49`. The corpus below shows three
ways to solve it, with more mistakes in the short ones. So does the model that imitates it, which is what
reinforcement learning needs: correct answers within reach, and a preference to learn. A tenth of all problems is held
out by a hash of its text and used neither here nor in training.

The output is an ordinary Hugging Face checkpoint with `train.parquet` and `validation.parquet` beside it.
"""

import argparse
import json
import math
import random
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.progress import track
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence as pad
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging

from megatron_fipo.config import RewardConfig
from megatron_fipo.reward import make_reward

MARKER = "task.json"  # written last: marks complete output
IGNORED = -100  # label ignored by the loss


def held_out(prompt: str) -> bool:
    """Return whether the problem is held out."""
    return zlib.crc32(prompt.encode()) % 10 == 0


def sample_problem(rng: random.Random, *, held: bool) -> list[int]:
    """Sample the numbers of a problem."""
    while True:
        numbers = [rng.randint(1, 49) for _ in range(rng.randint(2, 4))]
        if held_out(prompt_of(numbers)) == held:
            return numbers


def prompt_of(numbers: list[int]) -> str:
    """Return the problem's text."""
    return "+".join(map(str, numbers)) + "?"


def distinct_problems(rng: random.Random, count: int, *, held: bool) -> list[list[int]]:
    """Sample distinct problems."""
    problems: dict[str, list[int]] = {}
    while len(problems) < count:
        numbers = sample_problem(rng, held=held)
        problems[prompt_of(numbers)] = numbers
    return list(problems.values())


def write_problems(problems: list[list[int]], path: Path) -> None:
    """Write problems in the schema of DAPO-Math-17k and AIME 2024."""
    write_rows([(prompt_of(numbers), str(sum(numbers))) for numbers in problems], "quickstart_sum", path)


def write_rows(problems: list[tuple[str, str]], source: str, path: Path) -> None:
    """Write (prompt, ground truth) pairs in that schema."""
    rows = [
        {
            "data_source": source,
            "prompt": [{"role": "user", "content": prompt}],
            "ability": "MATH",
            "reward_model": {"ground_truth": truth, "style": "rule"},
            "extra_info": {"index": index},
        }
        for index, (prompt, truth) in enumerate(problems)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)


@dataclass(frozen=True)
class Corpus:
    """Probabilities of formats, and of a mistake in them. A mistake propagates, as it would on paper."""

    direct: float  # Answer:121
    long: float  # of the rest: 44+49:4+9=13,4+4=8=93;... ; the remainder is medium, 44+49=93;...
    slip: float = 0.0  # a mistake in a step of the direct or medium format
    long_slip: float = 0.0
    forgotten_term: float = 0.0


CLEAN = Corpus(direct=0.105, long=0.4)
SLOPPY = Corpus(direct=0.35, long=0.4, slip=0.3, long_slip=0.1, forgotten_term=0.1)
CLEAN_SHARE = 0.7  # share of steps without mistakes: the model first learns to add, then to make mistakes


def slipped(rng: random.Random, value: int, probability: float) -> int:
    """Return the value, or an incorrect one with the given probability."""
    if rng.random() >= probability:
        return value
    return max(0, value + rng.choice([-10, -2, -1, 1, 2, 10]))


def response_to(numbers: list[int], rng: random.Random, corpus: Corpus) -> str:
    """Sample a response."""
    if rng.random() < corpus.direct:
        return f"Answer:{slipped(rng, sum(numbers), corpus.slip)}"
    spelled_out = rng.random() < corpus.long
    total, *terms = numbers
    if len(terms) > 1 and rng.random() < corpus.forgotten_term:
        terms.pop(rng.randrange(len(terms)))
    steps = []
    for term in terms:
        step = f"{total}+{term}"
        if spelled_out:
            ones = slipped(rng, total % 10 + term % 10, corpus.long_slip)
            tens = total // 10 + term // 10
            step += f":{total % 10}+{term % 10}={ones},{total // 10}+{term // 10}={tens}"
            total = 10 * tens + ones
        else:
            total = slipped(rng, total + term, corpus.slip)
        steps.append(f"{step}={total}")
    return ";".join([*steps, f"Answer:{total}"])


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per character."""
    symbols = ["<pad>", "<bos>", "<eos>", *"0123456789+-*%=;:,.? Answer"]
    tokenizer = Tokenizer(models.WordLevel({symbol: i for i, symbol in enumerate(symbols)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<pad>",  # set explicitly, since loading would otherwise add a token without a row in the model
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template="{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}",
    )


def make_model(tokenizer: PreTrainedTokenizerFast, layers: int = 2, positions: int = 512) -> Qwen2ForCausalLM:
    """Return the untrained base model."""
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=4,  # 32 dimensions each
        num_key_value_heads=2,
        max_position_embeddings=positions,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        initializer_range=0.05,
        tie_word_embeddings=False,
        **special,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, **special)
    return model


Example = tuple[str, str]  # prompt and response


def pretrain(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    example: Callable[[random.Random, float], Example],
    *,
    steps: int,
    seed: int,
    at_once: int = 16,
) -> None:
    """Train next-token prediction on batches of 32 examples, with the loss on the response only.

    Args:
        example: samples a prompt and a response, given the share of finished steps.
        at_once: examples that are padded to the same length.
    """
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    model.train()
    for step in track(range(steps), description="pre-training the base model"):
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 50) * (0.1 + 0.9 * cosine)
        batch = as_batch(tokenizer, [example(rng, step / steps) for _ in range(32)], at_once)
        num_targets = sum((labels != IGNORED).sum() for _, labels in batch)
        optimizer.zero_grad()
        for ids, labels in batch:
            model(input_ids=ids, labels=labels, num_items_in_batch=num_targets, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()


def sum_example(rng: random.Random, share_done: float) -> Example:
    """Sample a sum and a response to it: without mistakes first, so that the model learns to add."""
    numbers = sample_problem(rng, held=False)
    return prompt_of(numbers), response_to(numbers, rng, CLEAN if share_done < CLEAN_SHARE else SLOPPY)


def as_batch(tokenizer: PreTrainedTokenizerFast, examples: list[Example], at_once: int) -> list[tuple[Tensor, Tensor]]:
    """Return token ids and labels, as [at_once, T] each, the short examples first, to save padding."""
    vocabulary = tokenizer.get_vocab()
    rows = []
    for prompt, response in examples:
        ids = [tokenizer.bos_token_id, *(vocabulary[c] for c in prompt + response), tokenizer.eos_token_id]
        labels = [IGNORED] * (1 + len(prompt)) + ids[1 + len(prompt) :]
        rows.append((torch.tensor(ids), torch.tensor(labels)))
    rows.sort(key=lambda row: len(row[0]))
    parts = [tuple(zip(*rows[n : n + at_once], strict=True)) for n in range(0, len(rows), at_once)]
    return [(pad(ids, True, tokenizer.pad_token_id), pad(labels, True, IGNORED)) for ids, labels in parts]


@torch.inference_mode()
def sample_responses(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str], k: int, limit: int
) -> list[str]:
    """Return `k` responses per prompt at temperature 1, greedy if `k` is 1, of at most `limit` tokens."""
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    render = partial(tokenizer.apply_chat_template, add_generation_prompt=True, return_dict=True)
    inputs = render(chats, padding=True, return_tensors="pt")
    sampling = {"do_sample": True, "num_return_sequences": k} if k > 1 else {"do_sample": False}
    ids = model.generate(**inputs, max_new_tokens=limit, **sampling)
    return tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def accuracy(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: list[list[int]], k: int) -> float:
    """Return the share of correct answers of `k` responses per problem."""
    responses = sample_responses(model, tokenizer, [prompt_of(numbers) for numbers in problems], k, limit=96)
    truths = [str(sum(numbers)) for numbers in problems for _ in range(k)]
    scores = make_reward(RewardConfig(function="dapo"))(responses, truths, ["quickstart_sum"] * len(truths))
    return sum(score.accuracy for score in scores) / len(scores)


def make_task(
    directory: Path, *, seed: int, layers: int, steps: int, train_problems: int, validation_problems: int
) -> dict:
    """Create the task in `directory`; return the base model's accuracy on the held-out problems."""
    logging.disable_progress_bar()  # for the one-second save
    torch.manual_seed(seed)
    rng = random.Random(seed)
    validation = distinct_problems(rng, validation_problems, held=True)
    write_problems(validation, directory / "validation.parquet")
    write_problems(distinct_problems(rng, train_problems, held=False), directory / "train.parquet")
    model = make_model(tokenizer := make_tokenizer(), layers)
    pretrain(model, tokenizer, sum_example, steps=steps, seed=seed)
    tokenizer.save_pretrained(directory)
    model.save_pretrained(directory)
    return {name: accuracy(model, tokenizer, validation, k) for name, k in (("greedy", 1), ("avg@8", 8))}


def main() -> None:
    """Create the task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="output directory")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=900, help="pre-training steps")
    parser.add_argument("--train-problems", type=int, default=4000)
    parser.add_argument("--validation-problems", type=int, default=128)
    arguments = vars(parser.parse_args())
    out: Path = arguments.pop("out")
    if result := create(out, arguments, make_task):
        print(f"{out}: greedy {result['greedy']:.3f}, avg@8 {result['avg@8']:.3f}, {result['seconds']:.0f} s")


def create(out: Path, arguments: dict[str, Any], make: Callable[..., dict[str, Any]]) -> dict[str, Any] | None:
    """Create a task in `out`, which appears when it is complete; return its result, None if it was complete already."""
    marker = out / MARKER
    if marker.exists() and json.loads(marker.read_text())["arguments"] == arguments:
        print(f"{out} is complete: {marker.read_text()}")
        return None
    if out.exists() and not marker.exists():
        raise SystemExit(f"{out} exists and was not created by this script; choose another --out")
    started = time.monotonic()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
        made = Path(temporary) / "made"
        made.mkdir()
        result = make(made, **arguments)
        (made / MARKER).write_text(json.dumps({"arguments": arguments, **result}, indent=2) + "\n")
        shutil.rmtree(out, ignore_errors=True)
        made.rename(out)
    return {**result, "seconds": time.monotonic() - started}


if __name__ == "__main__":
    main()
