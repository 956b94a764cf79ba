"""GRPOTrainer's side of benchmarks/peer_trl.py; it runs in TRL's own environment, without megatron_fipo.

    VENV/bin/python benchmarks/peer_trl_steps.py '{"base": ..., "out": ..., "steps": 8, ...}'

Writes the time at which each step ended, one JSON number a line, to the file `out`.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

ANSWER = re.compile(r"answer\s*:\s*([^\n]+)", re.IGNORECASE)


def exact_answer(completions: list[Any], truth: list[str], **kwargs: Any) -> list[float]:
    """Return +1 for a completion whose last `Answer:` is the sum, else -1."""
    texts = [completion[0]["content"] for completion in completions]
    found = [ANSWER.findall(text) for text in texts]
    return [1.0 if f and f[-1].strip() == t else -1.0 for f, t in zip(found, truth, strict=True)]


class StepTimes(TrainerCallback):
    """Write the time after every `updates` optimizer updates, which are one step."""

    def __init__(self, out: Path, updates: int) -> None:
        self.out, self.updates = out, updates

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the end of a step."""
        if state.is_world_process_zero and state.global_step % self.updates == 0:
            with self.out.open("a") as file:
                file.write(f"{time.monotonic()}\n")


def main() -> None:
    """Train for the given number of steps."""
    options = json.loads(sys.argv[1])
    torch.set_num_threads(options["threads"])
    base, group, updates = options["base"], options["group"], options["updates"]
    responses = options["prompts"] * group
    rows = pq.read_table(f"{base}/train.parquet").to_pylist()
    data = Dataset.from_list([{"prompt": r["prompt"], "truth": r["reward_model"]["ground_truth"]} for r in rows])
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    with tempfile.TemporaryDirectory() as directory:
        config = GRPOConfig(
            output_dir=directory,
            use_cpu=True,
            ddp_backend="gloo" if options["ranks"] > 1 else None,
            ddp_find_unused_parameters=False if options["ranks"] > 1 else None,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=responses // updates // options["ranks"],
            steps_per_generation=updates,
            gradient_accumulation_steps=1,
            num_generations=group,
            max_completion_length=options["response"],
            temperature=1.0,
            beta=0.0,
            loss_type="dapo",
            epsilon=options["clip_low"],
            epsilon_high=options["clip_high"],
            learning_rate=options["lr"],
            lr_scheduler_type="constant",
            adam_beta1=0.9,
            adam_beta2=0.95,
            weight_decay=0.0,
            max_steps=options["steps"] * updates,
            logging_steps=updates,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_num_workers=0,
            seed=0,
        )
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
            reward_funcs=exact_answer,
            args=config,
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=[StepTimes(Path(options["out"]), updates)],
        )
        trainer.train()
    if not trainer.is_world_process_zero():
        return
    history = [row for row in trainer.state.log_history if "reward" in row]
    lengths = [row["completions/mean_length"] for row in history]
    rewards = [row["reward"] for row in history]
    print(json.dumps({"length": sum(lengths) / len(lengths), "reward": sum(rewards) / len(rewards)}))


if __name__ == "__main__":
    main()
