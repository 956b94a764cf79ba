"""`megatron-fipo mismatch` on the ranks: policy and engine as in a run, a few responses, the comparison."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from datetime import datetime
from typing import Any

import torch
from transformers import PreTrainedModel

from megatron_fipo.actor import FIPOActor
from megatron_fipo.atomic_file import write_atomically
from megatron_fipo.batch import Rollouts
from megatron_fipo.checks import check_sampling
from megatron_fipo.config import Config
from megatron_fipo.data import PromptStream, TemplateOptions, load_prompts
from megatron_fipo.evaluation.sampling import SampleSpec, local_chunks, responses
from megatron_fipo.exit_codes import note_running
from megatron_fipo.mismatch.comparison import compare_responses, packed_log_probs
from megatron_fipo.mismatch.options import Options
from megatron_fipo.mismatch.report import make_report
from megatron_fipo.model.architecture import load_hf_config
from megatron_fipo.model.check import check_model
from megatron_fipo.model.stop_tokens import load_tokenizer, stop_token_ids
from megatron_fipo.parallel import topology as topologies
from megatron_fipo.parallel.collectives import broadcast, gather
from megatron_fipo.parallel.interrupt import unless_interrupted
from megatron_fipo.printable import printable
from megatron_fipo.rollout import HFEngine, RolloutEngine, Sampling, derive_seed, make_engine


def check(config: Config, options: Options) -> list[str]:
    """Check, before any rank starts, what the comparison needs; return warnings.

    Raises:
        ValueError: everything that is wrong, and what to change.
    """
    options.check(config)
    return check_sampling(config)


def run(config: Config, options: Options) -> None:
    """Compare on this rank; collective. Rank 0 prints the report, and writes `options.out`.

    Raises:
        Interrupted: a rank received a stop signal.
    """
    tokenizer = load_tokenizer(config.model.hf_path)
    hf_config = load_hf_config(config.model.hf_path, config.model.overrides)
    # Hidden states are observed of whole sequences; chunks of them are no other computation.
    config = replace(config, parallel=replace(config.parallel, sequence_chunks=1))
    topology = topologies.initialize(config.parallel, config.run.seed)
    note = _Progress(topology.rank == 0)
    engine = make_engine(config, hf_config, topology)
    try:
        actor = FIPOActor(config, check_model(config), topology, engine)
        note_running()
        note(f"generating {options.responses} responses of up to {options.response_tokens(config)} tokens")
        with actor.inference():
            rollouts = _generate(config, options, engine, tokenizer)
        model = _model(actor, engine, hf_config)
        compared = compare_responses(
            actor, model, rollouts, lambda finished: note(f"{finished} of {len(rollouts)} responses compared")
        )
        packed = packed_log_probs(actor, rollouts)
    finally:
        engine.close()
    if topology.rank == 0:
        report = make_report(config, tokenizer, rollouts, compared, packed)
        if options.out is not None:
            write_atomically(options.out, report.to_json())
        for line in report.lines():
            print(printable(line))


def _generate(config: Config, options: Options, engine: RolloutEngine, tokenizer: Any) -> Rollouts:
    """Return responses to the run's first prompts, sampled as in training; the same on all ranks. Collective."""
    template = TemplateOptions(config.data.chat_template_kwargs, broadcast(datetime.now()))
    limit, reads_data_source = config.data.max_prompt_tokens, config.reward.reads_data_source
    prompts = load_prompts(config.data.train, tokenizer, limit, template, reads_data_source)
    chosen = PromptStream(prompts, config.run.seed, config.data.shuffle).next(options.responses)
    specs = [
        SampleSpec(("mismatch", number, 0), derive_seed(config.run.seed, "mismatch", number), prompt)
        for number, prompt in enumerate(chosen)
    ]
    rollout = config.rollout
    stops = stop_token_ids(config.model.hf_path, tokenizer, config.model.overrides)
    sampling = Sampling(rollout.temperature, rollout.top_p, rollout.top_k, options.response_tokens(config), stops)
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    chunks = local_chunks(specs, set(), rank, ranks, rollout.batch_size)
    local = unless_interrupted(
        lambda: [pair for some in responses(engine, chunks, sampling, rank, ranks) for pair in some]
    )
    generated = sorted((pair for part in gather(local) for pair in part), key=lambda pair: pair[0].key)
    return Rollouts.from_responses(
        ids=range(len(generated)),
        prompts=[spec.prompt.token_ids for spec, _ in generated],
        responses=[response.token_ids for _, response in generated],
        log_probs=[response.log_probs for _, response in generated],
        truncated=[response.truncated for _, response in generated],
        routing=[response.routing for _, response in generated],
    )


def _model(actor: FIPOActor, engine: RolloutEngine, hf_config: Any) -> PreTrainedModel | None:
    """Return the transformers model to compare with; on the first rank of each replica only, if it is made here.

    The hf engine's own; beside vLLM's servers, one with the weights as they are exported. Collective.
    """
    if isinstance(engine, HFEngine):
        return engine.model
    weights = actor.export_weights()
    if actor.topology.replica.rank() != 0:
        for _ in weights:
            pass
        return None
    beside = HFEngine(hf_config, getattr(torch, actor.config.model.dtype), actor.topology.device, batch_size=1)
    beside.load_weights(weights)
    return beside.model


class _Progress:
    """Progress lines on standard error."""

    def __init__(self, shown: bool) -> None:
        self._shown, self._started = shown, time.monotonic()

    def __call__(self, text: str) -> None:
        if self._shown:
            print(f"{text} ({time.monotonic() - self._started:.0f} s)", file=sys.stderr, flush=True)
