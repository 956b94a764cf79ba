"""The training loop. One step, in the order of the paper:

    sample responses -> score them -> drop groups without advantage -> advantages
    -> old log-probabilities -> for each mini-batch: FIPO loss, gradient, optimizer update
    -> new weights to the rollout engine

With rollout.max_staleness the engine gets new weights before the old log-probabilities are computed, and samples the
next batch while this one is trained.

A step is finished or it never was: the same command resumes from the newest checkpoint, exactly (run_state).
FIPO differs from DAPO in the loss alone: `algorithm.loss`. Its placebo (`algorithm.influence`) computes the weights of
a mini-batch in a forward pass before the update, and permutes them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime

import torch
import torch.distributed as dist

from megatron_fipo.actor import FIPOActor, GradientError
from megatron_fipo.actor.credit import token_credit
from megatron_fipo.algorithm import DynamicSamplingExhausted, group_relative_advantages, overlong_penalty
from megatron_fipo.algorithm.metrics import summarize_updates
from megatron_fipo.batch import Rollouts, TrainBatch
from megatron_fipo.batching import StepBatch, make_batch_builder
from megatron_fipo.batching.distribute import distribute
from megatron_fipo.batching.mismatch import mismatch_warning, rollout_mismatch, with_importance_weights
from megatron_fipo.batching.placebo import with_placebo_weights
from megatron_fipo.batching.random_rollouts import random_rollouts
from megatron_fipo.batching.step_batch import batch_metrics, score_responses
from megatron_fipo.config import Config
from megatron_fipo.convert.export import save_checkpoint
from megatron_fipo.data import Prompt, PromptStream, TemplateOptions, load_prompts
from megatron_fipo.evaluation import Evaluation, evaluate, load_benchmarks
from megatron_fipo.exit_codes import note_running
from megatron_fipo.model.architecture import load_hf_config
from megatron_fipo.model.check import check_model
from megatron_fipo.model.stop_tokens import load_tokenizer, stop_token_ids
from megatron_fipo.parallel import interrupt
from megatron_fipo.parallel import topology as topologies
from megatron_fipo.parallel.collectives import broadcast
from megatron_fipo.parallel.garbage import collected_by_hand
from megatron_fipo.parallel.interrupt import Interrupted
from megatron_fipo.profiling.pipeline_recorder import PipelineProfile
from megatron_fipo.profiling.utilization import Utilization
from megatron_fipo.resume import replaces_weights, starts_over
from megatron_fipo.reward import make_reward
from megatron_fipo.rollout import derive_seed, make_engine
from megatron_fipo.run_log import RunLog, began
from megatron_fipo.run_state import RunState

logger = logging.getLogger(__name__)

_FIRST_SHIFT_WARNING = 1e-3  # nats; see Trainer._update_policy


class Trainer:
    """A run on this rank. All methods are collective over all ranks.

    Attributes:
        profile: timers inside the pipeline's schedule, with profile.pipeline; None without, or in a run without files.
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
        self.tokenizer = load_tokenizer(config.model.hf_path)
        self.stop_token_ids = stop_token_ids(config.model.hf_path, self.tokenizer, config.model.overrides)
        self.began = broadcast(datetime.now() if starts_over(config) else began(config.run_directory))
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
        self._resumes: bool = resume and broadcast(replaces_weights(config))
        self.actor = FIPOActor(config, check_model(config), self.topology, self.engine, read=not self._resumes)
        stream = PromptStream(self.prompts, config.run.seed, config.data.shuffle)
        self.batches = make_batch_builder(
            config, self.topology, self.engine, self.score_rollouts, stream, self.stop_token_ids
        )
        self.utilization = Utilization(config, self.actor.arch, self.topology)
        self.profile = self._make_profile() if config.profile.pipeline and write else None
        self.log = RunLog(config, self.topology.rank, enabled=write)
        self.state = RunState(config, self.topology, self.actor, self.batches, self.log)
        self._clock: dict[str, float] = {}
        self.log.note(f"train data: {self.prompts}")
        for name, problems in self.benchmarks.items():
            self.log.note(f"validation data{f' {name}' if len(self.benchmarks) > 1 else ''}: {problems}")

    def _make_profile(self) -> PipelineProfile:
        """Return the profile, and record every run of the actor's schedule in it."""
        directory = self.config.run_directory / "traces"
        chunks = self.config.parallel.sequence_chunks
        profile = PipelineProfile(self.actor.chunks[0].config, self.topology.pp, directory, chunks)
        self.actor.recorder = profile.recorder
        return profile

    def train(self) -> None:
        """Run to `trainer.max_steps` from the newest checkpoint.

        Evaluates before the first step, every `eval.every` steps and after the last one.

        Raises:
            Interrupted: a rank was asked to stop; all finished steps are in a checkpoint.
            DynamicSamplingExhausted: the problems gave no batch to train on; all finished steps are in a checkpoint.
            ValueError: the run's checkpoints are all damaged, or of other data.
        """
        with self.state.opened(), collected_by_hand() as collect_garbage:
            if self.state.restore(self.began, without_weights=self._resumes):
                return
            note_running()
            try:
                self._evaluate_and_record()
                while not self.state.is_last:
                    self._clock = {"checkpoint": self.state.pause_seconds}
                    with self._timed("step"):
                        metrics = self.step(self.state.progress.step + 1)
                    self.state.finish_step({**metrics, **self._throughput(metrics)})
                    self._evaluate_and_record()
                    collect_garbage()
            except (Interrupted, DynamicSamplingExhausted) as stopped:
                # Raised before the weights of an unfinished step change: they are those of the last finished one.
                self.state.save(wait=True)
                why = "asked to stop" if isinstance(stopped, Interrupted) else "no batch to train on"
                self.log.note(f"{why}: a checkpoint of step {self.state.progress.step} is written")
                raise
            if self.config.trainer.export_policy:
                self.export_policy()
            self.state.checkpointer.finish()
            self.log.finish(self.state.progress.before, self.state.progress.after)

    def step(self, step: int) -> dict[str, float]:
        """Sample one batch of responses and update the policy on it; return the step's metrics.

        Raises:
            Interrupted: a rank was asked to stop before the first update.
        """
        config = self.config
        with self._timed("rollout"):
            batch = self._sample(is_last=step == config.trainer.max_steps)  # scored by `score_rollouts`, then filtered
        self.state.checkpointer.poll()  # what was written meanwhile counts from here on, not only after this step
        batch = self.with_advantages(batch, policy_version=step - 1)
        rollouts, mini_batches = distribute(batch.rollouts, batch.groups, step, config, self.topology, self.actor.pack)
        with self.actor.training():
            with self._timed("old_log_probs"):
                mini_batches = self._with_old_log_probs(mini_batches)
            if interrupt.agreed():
                raise Interrupted
            with self._timed("update"):
                updates, tokens = self._update_policy(step, rollouts, mini_batches)
        if config.rollout.save:
            credit = token_credit(rollouts, mini_batches, tokens, config.algorithm.loss) if tokens else {}
            self.log.rollouts(step, rollouts, self.tokenizer, self.topology, credit)
        metrics = {**batch.metrics, **self._mismatch(rollouts, mini_batches, step - 1), **updates}
        metrics |= self.actor.routing.metrics()
        if config.rollout.save and self.actor.routing.layers:
            self.log.routing(step, self.actor.routing.layers)
        if self.profile:
            metrics |= self.profile.finish_step()
        return metrics | self.utilization(rollouts.lengths.tolist(), self._clock["update"])

    def score_rollouts(self, prompts: Sequence[Prompt], rollouts: Rollouts) -> Rollouts:
        """Return one response a prompt with its reward: the verifier's score, less DAPO's penalty for length."""
        config = self.config
        scored = score_responses(self.reward, self.tokenizer, prompts, rollouts, self.stop_token_ids)
        penalty = overlong_penalty(
            scored.response_lengths,
            config.rollout.max_response_tokens,
            config.reward.overlong_buffer_tokens,
            config.reward.overlong_penalty_factor,
        )
        return scored.replace(rewards=scored.scores + penalty)

    def with_advantages(self, batch: StepBatch, policy_version: int) -> StepBatch:
        """Return the batch with group-relative advantages (GRPO), and with its own figures.

        Args:
            policy_version: version of the weights that the batch is to train.
        """
        rewards, groups = batch.rollouts.rewards, batch.rollouts.ids // self.config.rollout.group_size
        rollouts = batch.rollouts.replace(advantages=group_relative_advantages(rewards, groups))
        figures = batch_metrics(rollouts, policy_version, self.topology)
        return replace(batch, rollouts=rollouts, metrics={**batch.metrics, **figures})

    def _sample(self, is_last: bool) -> StepBatch:
        """Return this step's batch.

        With rollout.max_staleness it was sampled while the step before was trained, and the next one is begun now,
        unless this step is the last.
        """
        prefetched = None
        if self.batches.has_prefetched:
            self.state.drain()
            if interrupt.agreed():
                raise Interrupted
            prefetched = self.batches.build()
        with self.actor.inference():
            batch = prefetched or self.batches.build()
            if self.config.rollout.overlaps and not is_last:
                self.batches.prefetch()
        return batch

    def _evaluate_and_record(self) -> None:
        """Evaluate the weights where it is due, then record the step that was finished last."""
        progress, scores = self.state.progress, {}
        if self.state.evaluation_is_due():
            self.state.drain()
            started = time.monotonic()
            result = self.validate(progress.step)
            progress = progress.evaluated(result, self.config.checkpoint.best_on)
            scores = {**result.metrics(), "time/eval": time.monotonic() - started} if result else {}
        self.state.record(progress, scores)

    def validate(self, step: int) -> Evaluation | None:
        """Return avg@k and its siblings on the validation problems; None without any."""
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
        """Run one optimizer step on random responses of up to the full length, to check that it fits; write nothing."""
        groups = range(self.config.trainer.mini_batch_prompts)
        rollouts = random_rollouts(groups, self.prompts.prompts, self.actor.arch, self.config, self.topology)
        rollouts, batches = distribute(rollouts, groups, 1, self.config, self.topology, self.actor.pack)
        with self.actor.training():
            return self._update_policy(1, rollouts, self._with_old_log_probs(batches))[0]

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
        """Close the engine, the verifier and the log."""
        self.batches.close()
        self.reward.close()
        self.engine.close()
        self.log.close()

    def _with_old_log_probs(self, batches: Sequence[TrainBatch]) -> list[TrainBatch]:
        """Attach the policy's log-probabilities before any update, packed as the updates will be, and its experts.

        With them the initial policy's for the KL penalty, and importance weights against the rollout engine.
        """
        batches = [self.actor.with_old_log_probs(batch) for batch in batches]
        if self.config.algorithm.kl_coefficient:
            reference = self.actor.get_init_policy_logprobs(batches)
            batches = [b.with_token_values(reference_log_probs=r) for b, r in zip(batches, reference, strict=True)]
        return with_importance_weights(batches, self.config.rollout)

    def _mismatch(self, rollouts: Rollouts, batches: Sequence[TrainBatch], policy_version: int) -> dict[str, float]:
        """Compare the engine's log-probabilities with those of the weights of `policy_version` steps."""
        mismatch = rollout_mismatch(batches, self.topology)
        warning = mismatch_warning(mismatch, rollouts, policy_version, self.config.rollout, self.topology)
        if warning:
            self.log.warn(warning)
        return mismatch

    def _update_policy(
        self, step: int, rollouts: Rollouts, batches: Sequence[TrainBatch]
    ) -> tuple[dict[str, float], list[list[torch.Tensor]]]:
        """Make all updates of a step. The first one must see log-ratios of 0: the old log-probabilities are its own.

        Returns metrics and, if the actor records them, the tokens' values in the last epoch's update on each batch.

        Args:
            rollouts: the responses of the batches.
        """
        seen: list[dict[str, float]] = []
        tokens: list[list[torch.Tensor]] = []
        for epoch in range(self.config.trainer.epochs_per_batch):
            for number, batch in enumerate(batches):
                batch = self._with_influence_weights(batch, rollouts, step, epoch, number)
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
        before = {"policy/first_log_ratio_abs_max": first_shift, "policy/first_entropy": seen[0]["entropy"]}
        if first_shift > _FIRST_SHIFT_WARNING:
            self.log.warn(
                f"the first mini-batch of step {step} has a log-ratio of {first_shift:.3g} nats before any update; "
                "Future-KL amplifies such noise (kernels that are not deterministic?)"
            )
        return {**before, **summarize_updates(seen)}, tokens

    def _with_influence_weights(
        self, batch: TrainBatch, rollouts: Rollouts, step: int, epoch: int, number: int
    ) -> TrainBatch:
        """Return the mini-batch with the placebo's weights; FIPO's own are computed in the loss."""
        if self.config.algorithm.influence == "fipo":
            return batch
        seed = derive_seed(self.config.run.seed, "placebo", step, epoch, number)
        return with_placebo_weights(batch, self.actor.influence(batch), rollouts, seed, self.topology)

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self._clock[phase] = self._clock.get(phase, 0.0) + time.monotonic() - started

    def _throughput(self, metrics: dict[str, float]) -> dict[str, float]:
        """Return the seconds of each phase, and trained response tokens a second and rank."""
        tokens = metrics["batch/responses"] * metrics["batch/response_length/mean"]
        return {
            **{f"time/{phase}": seconds for phase, seconds in self._clock.items()},
            "throughput/tokens_per_second": tokens / self._clock["step"],
            "throughput/tokens_per_second_per_rank": tokens / self._clock["step"] / self.topology.world_size,
        }
