#!/usr/bin/env python3
"""Create a task in which length pays by construction: guess, check, and try again or give up.

    python examples/quickstart/make_guess_and_check.py --out runs/guess-and-check-base

A problem `425,725?` asks how often 1 must be added to 524, modulo 1000, to get 527; numbers are written ones first,
which a tiny model learns to count sooner. A response tries 1, 2, 3, ... and compares each digit of their values with
the target's, `1:57-22=55=;2:67-22=55=;3:77=22=55=;Answer:3`: twelve or thirteen tokens a try. The number of tries that
a problem needs has a Pareto distribution with exponent 0.7, cut off at 30: P(n or more) is about n^-0.7.

The base model imitates a corpus that gives up after each wrong try with probability 0.3, by `Answer:0`, which is never
right. Reinforcement learning can only learn not to give up, so that rewards rise with length, ever more slowly.

Problems with the same hash as in make_task.py are held out. The output is as make_task.py's.
"""

import argparse
import random
from collections.abc import Container
from pathlib import Path
from typing import Any

import torch
from make_task import (
    Example,
    create,
    held_out,
    make_model,
    make_tokenizer,
    pretrain,
    sample_responses,
    write_rows,
)
from transformers.utils import logging

EXPONENT = 0.7
MOST_TRIES = 30
GIVE_UP = 0.3
GAVE_UP = "0"  # answer of a response that gives up
LIMIT = 13 * MOST_TRIES + 10  # tokens of the longest response: its tries and its answer
POSITIONS = 512
CALCULATING_SHARE = 0.75  # share of pre-training steps without giving up
NUMBERS = 1000
MOST_PROBLEMS = {False: 2000, True: 200}  # 42% of them need one try, of which there are 1000, a tenth held out

Problem = tuple[int, int]  # start, tries needed


def sample_tries(rng: random.Random) -> int:
    """Sample the number of tries that a problem needs."""
    while True:
        tries = int((1.0 - rng.random()) ** (-1.0 / EXPONENT))
        if tries <= MOST_TRIES:
            return tries


def sample_problem(rng: random.Random, *, held: bool, seen: Container[str] = ()) -> Problem:
    """Sample a problem of the held-out ones, or of the others, that has not been seen."""
    tries = sample_tries(rng)  # once, so that its distribution is the same among problems not seen
    while True:
        problem = rng.randrange(NUMBERS), tries
        prompt = prompt_of(problem)
        if held_out(prompt) == held and prompt not in seen:
            return problem


def distinct_problems(rng: random.Random, count: int, *, held: bool) -> list[Problem]:
    """Sample different problems.

    Raises:
        ValueError: more than there are with a single try.
    """
    if count > MOST_PROBLEMS[held]:
        raise ValueError(f"{count} different problems must be at most {MOST_PROBLEMS[held]}")
    problems: dict[str, Problem] = {}
    while len(problems) < count:
        problem = sample_problem(rng, held=held, seen=problems)
        problems[prompt_of(problem)] = problem
    return list(problems.values())


def value(problem: Problem, tries: int) -> int:
    """Return the value after so many tries."""
    return (problem[0] + tries) % NUMBERS


def written(number: int) -> str:
    """Return a number below 1000, ones first."""
    return f"{number:03d}"[::-1]


def prompt_of(problem: Problem) -> str:
    """Return the problem's text."""
    return f"{written(problem[0])},{written(value(problem, problem[1]))}?"


def try_text(problem: Problem, tries: int) -> str:
    """Return a try: its number, and each digit of its value beside the target's, whether they are equal."""
    pairs = zip(written(value(problem, tries)), written(value(problem, problem[1])), strict=True)
    return f"{tries}:" + "".join(f"{a}{b}{'=' if a == b else '-'}" for a, b in pairs)


def response_to(problem: Problem, rng: random.Random, give_up: float = GIVE_UP) -> str:
    """Sample a response."""
    parts: list[str] = []
    for tries in range(1, problem[1] + 1):
        parts.append(try_text(problem, tries))
        if tries == problem[1]:
            return ";".join([*parts, f"Answer:{tries}"])
        if rng.random() < give_up:
            break
    return ";".join([*parts, f"Answer:{GAVE_UP}"])


def example(rng: random.Random, share_done: float) -> Example:
    """Sample a problem and a response: first without giving up, from which the model learns to calculate."""
    problem = sample_problem(rng, held=False)
    if share_done >= CALCULATING_SHARE:
        return prompt_of(problem), response_to(problem, rng)
    tries = rng.randint(1, 12) if rng.random() < 0.8 else rng.randint(13, MOST_TRIES)
    while held_out(prompt_of(problem := (rng.randrange(NUMBERS), tries))):
        pass
    return prompt_of(problem), response_to(problem, rng, give_up=0.0)


def behaviour(responses: list[str], problems: list[Problem]) -> dict[str, Any]:
    """Return how often responses give up after a wrong try, are right, and how long each kind is, in tokens."""
    wrong_tries = gave_up = 0
    correct = [r.endswith(f"Answer:{p[1]}") for r, p in zip(responses, problems, strict=True)]
    for response in responses:
        *tries, answer = response.split(";")
        wrong_tries += sum(not _is_match(one) for one in tries)
        gave_up += bool(tries) and answer == f"Answer:{GAVE_UP}" and not _is_match(tries[-1])
    lengths = [len(response) + 1 for response in responses]  # a character is a token; with <eos>
    return {
        "accuracy": sum(correct) / len(correct),
        "gives_up": gave_up / max(1, wrong_tries),
        "mean_length": sum(lengths) / len(lengths),
        "correct_calculations": _correct_calculations(responses, problems),
    }


def _is_match(text: str) -> bool:
    """Return whether a try says that its value is the target."""
    return ":" in text and "-" not in text


def _correct_calculations(responses: list[str], problems: list[Problem]) -> float:
    """Return the share of tries whose number, value and target are right."""
    right = total = 0
    for response, problem in zip(responses, problems, strict=True):
        for number, text in enumerate(response.split(";")[:-1], start=1):
            total += 1
            right += text == try_text(problem, number)
    return right / max(1, total)


def make(
    directory: Path, *, seed: int, layers: int, steps: int, train_problems: int, validation_problems: int
) -> dict[str, Any]:
    """Create the task in `directory`; return the base model's behaviour on the held-out problems."""
    logging.disable_progress_bar()
    torch.manual_seed(seed)
    rng = random.Random(seed)
    validation = distinct_problems(rng, validation_problems, held=True)
    train = distinct_problems(rng, train_problems, held=False)
    for name, problems in (("validation", validation), ("train", train)):
        rows = [(prompt_of(problem), str(problem[1])) for problem in problems]
        write_rows(rows, "guess_and_check", directory / f"{name}.parquet")
    model = make_model(tokenizer := make_tokenizer(), layers, POSITIONS)
    pretrain(model, tokenizer, example, steps=steps, seed=seed, at_once=4)
    tokenizer.save_pretrained(directory)
    model.save_pretrained(directory)
    prompts, k = [prompt_of(problem) for problem in validation], 8
    responses = sample_responses(model, tokenizer, prompts, k, LIMIT)
    return behaviour(responses, [problem for problem in validation for _ in range(k)])


def main() -> None:
    """Create the task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="output directory")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=400, help="pre-training steps")
    parser.add_argument("--train-problems", type=int, default=1500)
    parser.add_argument("--validation-problems", type=int, default=128)
    arguments = vars(parser.parse_args())
    out: Path = arguments.pop("out")
    if result := create(out, arguments, make):
        print(
            f"{out}: accuracy {result['accuracy']:.3f}, gives up {result['gives_up']:.3f} after a wrong try, "
            f"{result['mean_length']:.0f} tokens, {result['correct_calculations']:.4f} of the tries are calculated "
            f"correctly, {result['seconds']:.0f} s"
        )


if __name__ == "__main__":
    main()
