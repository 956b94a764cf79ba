"""The loop. One step, in the order of the paper:

    prompts -> responses -> rewards -> dynamic sampling -> advantages          (rollout.collect)
    -> old log-probabilities -> for each mini-batch: FIPO loss, gradient, update   (actor)
    -> new weights to the rollout engine

With rollout.max_staleness the engine gets new weights before the old log-probabilities are computed, and draws the next
batch while this one is trained.

A step is finished or it never was: the same command goes on from the newest checkpoint, exactly (resume, checkpoint).
FIPO differs from DAPO in the loss alone: `algorithm.loss`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from typing import Any, Protocol

import torch
import torch.distributed as dist
from transformers import AutoTokenizer

from megatron_fipo.actor import FIPOActor, GradientError
from megatron_fipo.actor.credit import token_credit
from megatron_fipo.algorithm import DynamicSamplingExhausted
from megatron_fipo.batch import Rollouts, TrainBatch
from megatron_fipo.checkpoint import Checkpointer
from megatron_fipo.config import Config
from megatron_fipo.convert.export import save_checkpoint
from megatron_fipo.data import PromptStream, TemplateOptions, load_prompts
from megatron_fipo.evaluation import Evaluation, evaluate, load_benchmarks
from megatron_fipo.model.architecture import check_model, load_hf_config
from megatron_fipo.model.stop_tokens import stop_token_ids
from megatron_fipo.outcome import note_running
from megatron_fipo.parallel import interrupt
from megatron_fipo.parallel import topology as topologies
from megatron_fipo.parallel.garbage import collected_by_hand
from megatron_fipo.parallel.interrupt import Interrupted
from megatron_fipo.resume import Progress, replaces_weights, starts_over
from megatron_fipo.reward import make_reward
from megatron_fipo.rollout import make_engine
from megatron_fipo.rollout.assembly import Collected
from megatron_fipo.rollout.distribute import distribute
from megatron_fipo.rollout.mismatch import mismatch_warning, rollout_mismatch, with_importance_weights
from megatron_fipo.rollout.stream import make_collector
from megatron_fipo.run_log import RunLog, began, clear

logger = logging.getLogger(__name__)

_FIRST_SHIFT_WARNING = 1e-3  # nats; see Trainer._update_policy


class Profile(Protocol):
    """What looks on while the actor works."""

    def finish_step(self) -> dict[str, float]: ...


class Trainer:
    """A run on this rank. All methods are collective over all ranks.

    Attributes:
        profile: adds its metrics to those of each step; None: nobody looks on.
        utilization: as well, from the lengths of the replica's trained sequences and the seconds of the updates.
    """

    def __init__(self, config: Config, write: bool = True, resume: bool = False) -> None:
        """Build everything a run needs, inside an initialized default process group.

        Args:
            write: False: no files.
            resume: only `train` is called, so the initial weights are not read where a checkpoint replaces them.

        Raises:
            ValueError: the layout, the model, the data or the tokenizer do not fit together.
        """
        self.config = config
        hf_config = load_hf_config(config.model.hf_path, config.model.overrides)
        hf_config.dtype = getattr(torch, config.model.dtype)  # of what is exported, whatever was read
        self.hf_config = hf_config
        self.topology = topologies.initialize(config.parallel, config.run.seed)
        self.tokenizer = AutoTokenizer.from_pretrained(
            config.model.hf_path, local_files_only=True, trust_remote_code=False
        )
        self.stop_token_ids = stop_token_ids(config.model.hf_path, self.tokenizer, config.model.overrides)
        self.began = _from_rank_0(datetime.now() if starts_over(config) else began(config.run_directory))
        self.prompts = load_prompts(
            config.data.train,
            self.tokenizer,
            config.data.max_prompt_tokens,
            TemplateOptions(config.data.chat_template_kwargs, self.began),
            config.reward.reads_data_source,
        )
        self.benchmarks = load_benchmarks(config, self.tokenizer, self.began)
        self.reward = make_reward(config.reward)
        self.engine = make_engine(config, hf_config, self.topology)
        self._resumes: bool = resume and _from_rank_0(replaces_weights(config))
        self.actor = FIPOActor(config, check_model(config), self.topology, self.engine, read=not self._resumes)
        self.stream = PromptStream(self.prompts, config.run.seed, config.data.shuffle)
        self.collector = make_collector(
            config, self.topology, self.engine, self.reward, self.tokenizer, self.stream, self.stop_token_ids
        )
        self.profile: Profile | None = None
        self.utilization: Callable[[Sequence[int], float], dict[str, float]] | None = None
        self.log = RunLog(config, self.topology.rank, enabled=write)
        self.progress = Progress()
        self._saved: Progress | None = None  # what the newest checkpoint is of
        self._boundary = self._data_position()  # after the last finished step
        self._pause = 0.0  # seconds that the last checkpoint took from training
        self._clock: dict[str, float] = {}
        self.log.note(f"train data: {self.prompts}")
        for name, problems in self.benchmarks.items():
            self.log.note(f"validation data{f' {name}' if len(self.benchmarks) > 1 else ''}: {problems}")

    def train(self) -> None:
        """Run to `trainer.max_steps` from where the newest checkpoint stands, evaluating before the first step, every
        `eval.every` and after the last.

        Raises:
            Interrupted: a rank was asked to stop; all finished steps are in a checkpoint.
            DynamicSamplingExhausted: the problems gave no batch to train on; all finished steps are in a checkpoint.
            ValueError: the run's checkpoints are all damaged, or of other data.
        """
        self.checkpointer = Checkpointer(
            self.config.run_directory / "checkpoints", self.config.checkpoint, self.actor, self.topology, self.log.warn
        )
        try:
            if self._restore():
                return
            self._run()
        finally:
            self.checkpointer.close()

    def _run(self) -> None:
        note_running()
        try:
            with collected_by_hand() as collect_garbage:
                self._conclude_step()
                while self.progress.step < self.config.trainer.max_steps:
                    self._advance()
                    self._conclude_step()
                    collect_garbage()
        except (Interrupted, DynamicSamplingExhausted) as stopped:
            # Raised before the weights of an unfinished step change: they are those of the last finished one.
            self._save(wait=True)
            why = "asked to stop" if isinstance(stopped, Interrupted) else "no batch to train on"
            self.log.note(f"{why}: a checkpoint of step {self.progress.step} is written")
            raise
        if self.config.trainer.export_policy:
            self.export_policy()
        self.checkpointer.finish()
        self.log.finish(self.progress.before, self.progress.after)

    def _advance(self) -> None:
        """One more step, and what the next one starts from."""
        self._clock = {"checkpoint": self._pause}
        step = self.progress.step + 1
        with self._timed("step"):
            metrics = self.step(step)
        self.progress = replace(self.progress, step=step, unlogged={**metrics, **self._throughput(metrics)})
        self._boundary = self._data_position()

    def _conclude_step(self) -> None:
        """Evaluation, record and checkpoint, each where due, of the step that was finished last."""
        progress, config = self.progress, self.config
        last = progress.step == config.trainer.max_steps
        scores: dict[str, float] = {}
        if progress.before is None or (
            progress.unlogged is not None and (last or _due(progress.step, config.eval.every))
        ):
            self._settle()
            started = time.monotonic()
            result = self.validate(progress.step)
            progress = progress.evaluated(result)
            scores = {**result.metrics(), "time/eval": time.monotonic() - started} if result else {}
        if progress.unlogged is None:
            self.progress = progress
            return
        self.log.step(progress.step, {**progress.unlogged, **scores})
        best = config.checkpoint.keep_best and progress.best != self.progress.best
        self.progress = replace(progress, unlogged=None)
        self.checkpointer.poll()
        if last or best or _due(progress.step, config.checkpoint.every):
            self._settle()
            self._save(score=scores.get("eval/avg@k"))

    def _settle(self) -> None:
        """Finish the batch that is being drawn ahead, if any: the engine may then get other weights, and a checkpoint
        holds the batch."""
        self.collector.settle()
        self._boundary = self._data_position()

    def _save(self, score: float | None = None, wait: bool = False) -> None:
        """Write a checkpoint of the last finished step, unless there is one or it is being written."""
        started = time.monotonic()
        writer = self.checkpointer
        if self._saved != self.progress or not (writer.in_progress or writer.whole == self.progress.step):
            progress = replace(self.progress, seconds=self.log.seconds)
            collector, kept = self._boundary
            state = {"progress": progress.state_dict(), "collector": collector}
            writer.save(progress.step, state, kept, score, wait)
            self._saved = self.progress
        elif wait:
            writer.finish()
        self._pause = time.monotonic() - started

    def _restore(self) -> bool:
        """Take up the run where its newest whole checkpoint stands; True if there is nothing left to do."""
        directory = self.config.run_directory
        self.log.claim_directory()
        if starts_over(self.config):
            if self.topology.rank == 0:
                clear(directory)
            dist.barrier()
        self.log.keep_beginning(self.began)
        newest = self.checkpointer.newest()
        if newest is not None:
            complete = newest >= self.config.trainer.max_steps and (directory / "summary.json").exists()
            if _from_rank_0(complete):  # nodes may see different things of a file that is new or gone
                self.log.note(f"{directory} is complete: {newest} steps; raise trainer.max_steps to go on")
                return True
            state, kept = self.checkpointer.load(newest)
            self.progress = self._saved = Progress.from_state_dict(state["progress"])
            self._restore_data_position(state["collector"], kept)
            self.log.note(f"going on after step {newest}, from {directory / 'checkpoints'}")
        elif self._resumes:
            raise ValueError(f"the checkpoints in {directory / 'checkpoints'} were removed meanwhile: start again")
        elif (directory / "metrics.jsonl").exists():
            self.log.note("an earlier attempt ended before its first checkpoint: starting at the beginning")
        self._boundary = self._data_position()
        self.log.open(self.progress.step, self.progress.seconds)
        return False

    def _data_position(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Where the prompts are, and the responses that this replica keeps."""
        return self.collector.state_dict(), self.collector.kept_rollouts()

    def _restore_data_position(self, state: dict[str, Any], kept: list[Any]) -> None:
        try:
            self.collector.load_state_dict(state, kept)
        except ValueError as error:
            if not self.config.resume.allow_changes:
                raise
            self.log.warn(f"{error}; as resume.allow_changes is set, the new data starts at its beginning")

    def step(self, step: int) -> dict[str, float]:
        """One training step: a batch of responses and the updates on it.

        Raises:
            Interrupted: a rank was asked to stop before the first update.
        """
        with self._timed("rollout"):
            collected = self._collect(last=step == self.config.trainer.max_steps)
        self.checkpointer.poll()  # what was written meanwhile counts from here on, not only after this step
        rollouts, batches = distribute(
            collected.rollouts, collected.groups, self.config, self.topology, self.actor.pack
        )
        with self.actor.training():
            with self._timed("old_log_probs"):
                batches = self._with_old_log_probs(batches)
            if interrupt.agreed():
                raise Interrupted
            with self._timed("update"):
                updates, tokens = self._update_policy(step, batches)
        if self.config.rollout.save:
            credit = token_credit(rollouts, batches, tokens, self.config.algorithm.loss) if tokens else {}
            self.log.rollouts(step, rollouts, self.tokenizer, self.topology, credit)
        watched = self.profile.finish_step() if self.profile else {}
        if self.utilization:
            watched |= self.utilization(rollouts.lengths.tolist(), self._clock["update"])
        return {**collected.metrics, **self._mismatch(rollouts, batches, step - 1), **updates, **watched}

    def _collect(self, last: bool) -> Collected:
        """This step's batch. With rollout.max_staleness it was drawn while the step before was trained, and the next
        one is begun now, unless this step is the last."""
        ahead = None
        if self.collector.is_ahead:
            self._settle()
            if interrupt.agreed():
                raise Interrupted
            ahead = self.collector.collect()
        with self.actor.inference():
            collected = ahead or self.collector.collect()
            if self.config.rollout.overlaps and not last:
                self.collector.start_next()
        return collected

    def validate(self, step: int) -> Evaluation | None:
        """Avg@k and its siblings on the validation problems; None without any."""
        if not self.benchmarks:
            return None
        with self.actor.inference():
            result, samples = evaluate(
                self.benchmarks, self.engine, self.reward, self.tokenizer, self.config, self.stop_token_ids
            )
        self.log.evaluation(step, result)
        if self.config.eval.save:
            self.log.samples(step, samples, self.benchmarks)
        return result

    def dry_run(self) -> dict[str, float]:
        """One update on made-up responses up to the full length, nothing written: does it fit, does it run?"""
        groups = range(self.config.trainer.mini_batch_prompts)
        _, batches = distribute(self._fake_rollouts(groups), groups, self.config, self.topology, self.actor.pack)
        with self.actor.training():
            return self._update_policy(1, self._with_old_log_probs(batches))[0]

    def export_policy(self) -> None:
        """Write the policy as a Hugging Face checkpoint to `<run>/policy`."""
        save_checkpoint(
            self.actor.export_weights(),
            self.hf_config,
            self.config.model.hf_path,
            self.config.run_directory / "policy",
            write=self.topology.rank == 0,
        )
        dist.barrier()

    def close(self) -> None:
        """End what the run started."""
        self.collector.close()
        self.reward.close()
        self.engine.close()
        self.log.close()

    def _with_old_log_probs(self, batches: Sequence[TrainBatch]) -> list[TrainBatch]:
        """Attach the policy's log-probabilities before any update, packed as the updates will be, and what is made of
        them: the initial policy's for the KL penalty, importance weights against the rollout engine."""
        old = [self.actor.log_probs(batch) for batch in batches]
        batches = [b.with_token_values(old_log_probs=values) for b, values in zip(batches, old, strict=True)]
        if self.config.algorithm.kl_coefficient:
            reference = self.actor.get_init_policy_logprobs(batches)
            batches = [b.with_token_values(reference_log_probs=r) for b, r in zip(batches, reference, strict=True)]
        return with_importance_weights(batches, self.config.rollout)

    def _mismatch(self, rollouts: Rollouts, batches: Sequence[TrainBatch], policy_version: int) -> dict[str, float]:
        """How far the engine's log-probabilities are from those of the weights of `policy_version` steps."""
        mismatch = rollout_mismatch(batches, self.topology)
        warning = mismatch_warning(mismatch, rollouts, policy_version, self.config.rollout, self.topology)
        if warning:
            self.log.warn(warning)
        return mismatch

    def _update_policy(
        self, step: int, batches: Sequence[TrainBatch]
    ) -> tuple[dict[str, float], list[list[torch.Tensor]]]:
        """All updates of a step. The first one must see log-ratios of 0: the old log-probabilities are its own.

        Returns metrics and, if the actor records them, the tokens' values in the last epoch's update on each batch.
        """
        seen: list[dict[str, float]] = []
        tokens: list[list[torch.Tensor]] = []
        for epoch in range(self.config.trainer.epochs_per_batch):
            for number, batch in enumerate(batches):
                try:
                    with self.actor.training_step():
                        _, metrics = self.actor.get_loss_and_metrics(batch, forward_only=False)
                except GradientError as error:
                    where = f"step {step}, epoch {epoch + 1}, mini-batch {number + 1} of {len(batches)}"
                    raise GradientError(f"{where}: {error}; {self.log.dump(step, batch)}") from None
                update = self.actor.last_update
                assert update is not None
                if self.actor.records and epoch == self.config.trainer.epochs_per_batch - 1:
                    tokens.append(self.actor.token_values(batch))
                skipped = float(update.skipped)
                seen.append({**metrics, "grad_norm": update.grad_norm, "lr": update.lr, "skipped_updates": skipped})
        first_shift = seen[0]["log_ratio_abs_max"]
        if first_shift > _FIRST_SHIFT_WARNING:
            self.log.warn(
                f"the first mini-batch of step {step} has a log-ratio of {first_shift:.3g} nats before any update; "
                "Future-KL amplifies such noise (kernels that are not deterministic?)"
            )
        return {"policy/first_log_ratio_abs_max": first_shift, **_summarize_updates(seen)}, tokens

    def _fake_rollouts(self, groups: Sequence[int]) -> Rollouts:
        """Random responses to this replica's share of the groups, one of them as long as allowed."""
        rollout, topology = self.config.rollout, self.topology
        generator = torch.Generator().manual_seed(self.config.run.seed + topology.dp.rank())
        prompts = self.prompts.prompts
        size, mine = rollout.group_size, groups[topology.dp.rank() :: topology.dp.size()]
        ids = [group * size + i for group in mine for i in range(size)]
        lengths = torch.randint(1, rollout.max_response_tokens + 1, (len(ids),), generator=generator).tolist()
        if lengths:
            lengths[0] = rollout.max_response_tokens
        responses = [torch.randint(0, self.hf_config.vocab_size, (n,), generator=generator).tolist() for n in lengths]
        rollouts = Rollouts.from_responses(
            ids=ids,
            prompts=[prompts[i // size % len(prompts)].token_ids for i in ids],
            responses=responses,
            log_probs=[[0.0] * n for n in lengths],
            truncated=[False] * len(ids),
        )
        return rollouts.replace(advantages=torch.randn(len(ids), generator=generator))

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self._clock[phase] = self._clock.get(phase, 0.0) + time.monotonic() - started

    def _throughput(self, metrics: dict[str, float]) -> dict[str, float]:
        """Seconds of each phase, and trained response tokens a second and rank."""
        tokens = metrics["batch/responses"] * metrics["batch/response_length"]
        return {
            **{f"time/{phase}": seconds for phase, seconds in self._clock.items()},
            "throughput/tokens_per_second": tokens / self._clock["step"],
            "throughput/tokens_per_second_per_rank": tokens / self._clock["step"] / self.topology.world_size,
        }


def _from_rank_0(value: Any) -> Any:
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0


def _summarize_updates(updates: Sequence[dict[str, float]]) -> dict[str, float]:
    """Over the updates of a step: the mean of each metric, the extremum of extrema, the number of skips."""
    summary: dict[str, float] = {}
    for name in sorted({name for update in updates for name in update}):
        values = [update[name] for update in updates if name in update]
        if name.endswith("_max"):
            value = max(values)
        elif name.endswith("_min"):
            value = min(values)
        elif name == "skipped_updates":
            value = sum(values)
        else:
            value = sum(values) / len(values)
        summary[f"policy/{name}"] = value
    return {**summary, "policy/updates": float(len(updates))}
