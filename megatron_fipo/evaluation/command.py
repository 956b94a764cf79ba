"""`megatron-fipo eval`: evaluate a checkpoint's weights without an optimizer, and keep all samples."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_fipo.config import Config
from megatron_fipo.convert.export import export_weights
from megatron_fipo.convert.policy import load_policy
from megatron_fipo.evaluation.evaluate import Benchmarks, evaluate, load_benchmarks
from megatron_fipo.evaluation.sample import Key, Sample
from megatron_fipo.evaluation.sampling import plan_samples
from megatron_fipo.evaluation.store import Store, settings_of
from megatron_fipo.evaluation.summary import Evaluation
from megatron_fipo.evaluation.table import show
from megatron_fipo.exit_codes import note_running
from megatron_fipo.model.architecture import load_hf_config
from megatron_fipo.model.check import check_model
from megatron_fipo.model.stop_tokens import load_tokenizer, stop_token_ids
from megatron_fipo.parallel import topology as topologies
from megatron_fipo.parallel.collectives import broadcast
from megatron_fipo.parallel.topology import Topology
from megatron_fipo.reward import make_reward
from megatron_fipo.rollout import RolloutEngine, make_engine

_REPORT_SECONDS = 10.0


def check(config: Config, out: Path) -> None:
    """Check, before any rank starts, that the evaluation can use `out`.

    Raises:
        ValueError: `out` contains samples of other weights, problems or settings, or the problems cannot be read.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file, but must be a directory")
    store = Store(out)
    began = store.began()
    store.claim(
        settings_of(config, load_benchmarks(config, load_tokenizer(config.model.hf_path), began), began), write=False
    )


def run(config: Config, out: Path) -> None:
    """Evaluate on this rank; collective. Rank 0 prints a table and, as its last line, one JSON object.

    Raises:
        Interrupted: a rank received a stop signal; finished samples are kept, and the same command continues.
    """
    tokenizer, store = load_tokenizer(config.model.hf_path), Store(out)
    began = broadcast(store.began())
    benchmarks = load_benchmarks(config, tokenizer, began)
    if dist.get_rank() == 0:
        store.claim(settings_of(config, benchmarks, began))
        finished = store.read()
    else:
        finished = []
    dist.barrier()  # all ranks have read the directory before any adds to it
    result, samples = _evaluate(config, benchmarks, tokenizer, store, finished)
    if dist.get_rank() == 0:
        store.finish(result, samples, benchmarks, config.model.weights)
        show(result, next(iter(benchmarks)))
        print(json.dumps({"weights": config.model.weights, "out": str(out), **asdict(result), **result.scores()}))


def _evaluate(
    config: Config, benchmarks: Benchmarks, tokenizer: Any, store: Store, finished: Sequence[Sample]
) -> tuple[Evaluation, list[Sample]]:
    topology = topologies.initialize(config.parallel, config.run.seed)
    progress = _Progress({spec.key for spec in plan_samples(benchmarks, config)}, finished, store)
    complete = broadcast(progress.left == 0)
    reward, engine = make_reward(config.reward), None if complete else _engine(config, topology)

    def keep(samples: Sequence[Sample]) -> None:
        store.add(samples)
        if topology.rank == 0:
            progress.report()

    try:
        stops = stop_token_ids(config.model.hf_path, tokenizer, config.model.overrides)
        note_running()
        return evaluate(benchmarks, engine, reward, tokenizer, config, stops, finished=finished, keep=keep)
    finally:
        reward.close()
        if engine is not None:
            engine.close()


def _engine(config: Config, topology: Topology) -> RolloutEngine:
    """Return an engine with the policy's weights; the ranks' own copy has been freed."""
    hf_config = load_hf_config(config.model.hf_path, config.model.overrides)
    engine = make_engine(config, hf_config, topology)
    try:
        engine.load_weights(_weights(config, topology))
    except BaseException:
        engine.close()
        raise
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return engine


def _weights(config: Config, topology: Topology) -> Iterator[tuple[str, torch.Tensor]]:
    architecture = check_model(config)
    yield from export_weights(load_policy(architecture, config, topology), architecture, topology)


class _Progress:
    """Progress lines on standard error: samples of all ranks, rate, remaining time."""

    def __init__(self, plan_samples: Collection[Key], finished: Sequence[Sample], store: Store) -> None:
        self._wanted = len(plan_samples)
        self._earlier = len({sample.key for sample in finished} & set(plan_samples))
        self._held = len(finished)
        self._store = store
        self._started = self._last_report = time.monotonic()
        if self._earlier:
            print(f"{self._earlier} of {self._wanted} samples are already finished", file=sys.stderr)

    @property
    def left(self) -> int:
        """Number of samples to be generated by all ranks."""
        return self._wanted - self._earlier

    def report(self) -> None:
        """Print a line, unless one was printed recently."""
        now = time.monotonic()
        generated = self._store.count() - self._held
        if now - self._last_report < _REPORT_SECONDS and generated < self.left:
            return
        self._last_report, rate = now, generated / (now - self._started)
        left = timedelta(seconds=round((self.left - generated) / rate))
        print(
            f"{self._earlier + generated} of {self._wanted} samples, {rate:.2f} samples/s, {left} left",
            file=sys.stderr,
            flush=True,
        )
