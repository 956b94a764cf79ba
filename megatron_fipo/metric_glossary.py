"""Every metric that a run may log, with one line each. docs/metrics.md is generated from it.

Braces stand for what varies: `{benchmark}` is the name of a validation file, `{j}` a number of `eval.pass_k`.
"""

from __future__ import annotations

import re

_TOKENS = "share of loss tokens"
_QUANTILES = {
    "p25": "25% quantile",
    "median": "median",
    "p75": "75% quantile",
    "p995": "99.5% quantile",
    "p999": "99.9% quantile",
}
_PARTS = {
    "benchmark": r".+",
    "j": r"\d+",
    "stage": r"\d+",
    "quantity": r"(?:avg|cons|cons_answered|pass)@(?:k|\d+)",
}


def _ratio_quantiles(sign: str, side: str) -> dict[str, str]:
    return {
        f"policy/{sign}_ratio_{name}": f"{text} of the importance ratio of tokens with {side} advantage"
        for name, text in _QUANTILES.items()
    }


def _responses(population: str) -> dict[str, str]:
    """Return the figures that are logged of both populations."""
    return {
        f"{population}/{name}": text
        for name, text in {
            "reward": "mean reward, penalty for length included",
            "accuracy": "share of correct responses",
            "truncated": "share of responses that reached `rollout.max_response_tokens`",
            "response_length/mean": "mean response length, tokens",
            "response_length/min": "shortest response, tokens",
            "response_length/q25": "25% quantile of the response length, tokens",
            "response_length/median": "median response length, tokens",
            "response_length/q75": "75% quantile of the response length, tokens",
            "response_length/max": "longest response, tokens",
            "response_length/correct": "mean length of correct responses, tokens; 0 if there are none",
            "response_length/incorrect": "mean length of incorrect responses, tokens; 0 if there are none",
        }.items()
    }


METRICS: dict[str, str] = {
    "step": "number of the training step",
    "wall_seconds": "seconds since the run began, over all attempts",
    "sampling/rounds": "generation rounds that the batch took; with servers, prompts over `rollout.prompts_per_round`",
    "sampling/prompts_generated": "prompts whose groups were generated and scored",
    "sampling/all_correct": "groups dropped since every response is correct",
    "sampling/all_incorrect": "groups dropped since every response is incorrect",
    "sampling/surplus_groups": "informative groups beyond `rollout.prompts_per_step`",
    "sampling/wasted_tokens": "generated tokens that are neither trained on nor kept for later: of dropped, cancelled "
    "and too old groups. Tokens of failed requests, which are generated again, are not known",
    "sampling/wasted_share": "their share of all tokens generated for the batch",
    "sampling/cancelled_groups": "servers: groups that were started and not used, since the batch is full without them",
    "sampling/cancelled_tokens": "servers: their tokens; those of responses that were still running are estimated from "
    "the time since they began and the speed of finished ones",
    "sampling/cancelled_share": "servers: share of `sampling/cancelled_tokens` in all tokens generated for the batch",
    "sampling/continued_groups": "servers: groups kept for a later batch",
    "sampling/groups_too_old": "servers: kept groups discarded because their weights exceed `rollout.max_staleness`",
    # The batch that is trained on: the paper's curves.
    "batch/responses": "responses in the training batch",
    **_responses("batch"),
    "batch/staleness": "mean steps by which the sampling weights are behind, over tokens",
    "batch/staleness_max": "the same, of the oldest token",
    # What sampling gave, groups included that dynamic sampling dropped.
    **_responses("generated"),
    "generated/verifier_timeouts": "answers that the verifier did not decide in time; they count as incorrect",
    "generated/verifier_errors": "answers on which the verifier failed; they count as incorrect",
    "advantage/length_weighted_mean": "mean advantage, each response weighted by its length",
    "mismatch/abs_mean": "mean |log-probability of the trainer - of the engine|, nats a token",
    "mismatch/abs_max": "the largest such difference, nats",
    "mismatch/k1": "k1 estimate of KL(engine || trainer), nats a token",
    "mismatch/k3": "k3 estimate of the same",
    "mismatch/outside_fraction": "share of tokens whose probability ratio is outside [0.5, 2]",
    "mismatch/ratio_p999": "99.9% quantile of the ratio, the larger of r and 1/r",
    # The updates of a step.
    "policy/loss": "loss",
    "policy/approx_kl": "mean of old minus new log-probability, nats a token: the k1 estimate of the policy's KL",
    "policy/entropy": "mean entropy of the next-token distribution, nats; of the policies before each of the updates",
    "policy/first_entropy": "the same before the step's first update, over its first mini-batch",
    "policy/reference_kl": "with `algorithm.kl_coefficient`: k3 estimate of KL(policy || initial policy), nats a "
    "token; log-ratios are clamped to `algorithm.log_ratio_clamp`",
    "policy/grad_norm": "norm of the gradient before clipping",
    "policy/lr": "learning rate",
    "policy/updates": "optimizer updates of the step",
    "policy/skipped_updates": "updates skipped because of their gradient norm",
    "policy/first_log_ratio_abs_max": "largest |log-ratio| before the step's first update; 0 if kernels are exact",
    "policy/log_ratio_abs_max": "largest |new - old log-probability|, nats",
    "policy/ppo_clip_fraction": f"{_TOKENS} on which the PPO clip acts",
    "policy/ppo_clip_fraction_low": f"{_TOKENS} with a ratio below 1 - `clip_ratio_low` and a negative advantage",
    "policy/ppo_clip_fraction_high": f"{_TOKENS} with a ratio above 1 + `clip_ratio_high` and a positive advantage",
    "policy/dual_clip_fraction": f"{_TOKENS} with a ratio above `dual_clip` and a negative advantage",
    "policy/vetoed_fraction": "share of sequences removed because of dual-clipped tokens",
    "policy/negative_ratio_max": "largest importance ratio of tokens with a negative advantage",
    **_ratio_quantiles("negative", "a negative"),
    "policy/negative_ratio_2_3": f"{_TOKENS} with a negative advantage and a ratio in [2, 3)",
    "policy/negative_ratio_3_4": f"{_TOKENS} with a negative advantage and a ratio in [3, 4)",
    "policy/negative_ratio_4_10": f"{_TOKENS} with a negative advantage and a ratio in [4, `dual_clip`)",
    "policy/positive_ratio_min": "smallest importance ratio of tokens with a positive advantage",
    "policy/positive_ratio_max": "largest importance ratio of tokens with a positive advantage",
    **_ratio_quantiles("positive", "a positive"),
    "policy/positive_ratio_below_1e3": f"{_TOKENS} with a positive advantage and a ratio below 0.001",
    "policy/future_kl": "mean Future-KL S_t, nats (`algorithm.loss=fipo` only, as all that follows; of a placebo, "
    "FIPO's own, before weights are permuted)",
    "policy/future_kl_min": "smallest Future-KL, nats",
    "policy/future_kl_max": "largest Future-KL, nats",
    "policy/influence_weight": "mean influence weight f_t, after clipping",
    "policy/influence_weight_min": "smallest influence weight",
    "policy/influence_weight_max": "largest influence weight",
    "policy/influence_weight_raw": "mean exp(S_t), before clipping",
    "policy/influence_weight_raw_min": "smallest exp(S_t)",
    "policy/influence_weight_raw_max": "largest exp(S_t)",
    "policy/influence_clip_fraction_upper": f"{_TOKENS} whose weight is at the upper bound of `influence_clip`",
    "policy/influence_clip_fraction_lower": f"{_TOKENS} whose weight is at the lower bound",
    # Time.
    "time/step": "seconds of the step",
    "time/rollout": "seconds of sampling and scoring",
    "time/old_log_probs": "seconds of the log-probabilities before the step's first update",
    "time/update": "seconds of the updates",
    # Mixtures of experts: over the tokens of the step's old log-probabilities.
    "moe/load_max": "tokens of the most used expert over those of an even distribution, in the worst layer",
    "moe/load_max_mean": "the same, mean over layers",
    "moe/idle_experts": "share of experts that no token is sent to",
    "moe/entropy": "mean entropy of the routers' distributions over experts, nats",
    "moe/entropy_min": "the same, in the layer with the lowest",
    "moe/rollout_changed": "with `moe.routing_replay=rollout`: share of tokens for which a layer's router would have "
    "chosen other experts than the rollout engine, before any update, mean over layers",
    "moe/rollout_changed_max": "the same, in the layer with the highest",
    "moe/aux_loss": "with `moe.aux_loss`: the load-balancing loss without its coefficient, mean over layers and "
    "over the updates' tokens; 1 for even routers, at most experts over experts of a token",
    "moe/replayed_changed": "with `moe.routing_replay`: share of the updates' tokens for which a layer's router would "
    "have chosen other experts than were replayed, mean over layers",
    "moe/replayed_changed_max": "the same, in the layer with the highest",
    "time/checkpoint": "seconds for which the last checkpoint held up training",
    "time/eval": "seconds of the evaluation after the step",
    "throughput/tokens_per_second": "trained response tokens a second of the whole step",
    "throughput/tokens_per_second_per_rank": "the same, divided by the ranks",
    "throughput/update_tflops_per_rank": "model TFLOP/s of a rank during the updates, recomputation not counted",
    "throughput/mfu": "the same over the peak of a known GPU",
    "pipeline/bubble_fraction": "with `profile.pipeline`: share of the step's updates in which stages idle",
    "pipeline/bubble_fraction/stage_{stage}": "the same of one stage",
    "pipeline/bubble_fraction/warm_up": "its part before a stage's first backward pass",
    "pipeline/bubble_fraction/waiting": "its part between first backward and last forward pass",
    "pipeline/bubble_fraction/drain": "its part after a stage's last forward pass",
    "pipeline/bubble_fraction/communication": "its part in which messages are on their way",
    # Evaluations, in the rows of steps that have one.
    "eval/avg@k": "mean accuracy of all samples",
    "eval/cons@k": "expected share of problems whose most frequent answer is correct; no answer votes as one that is "
    "incorrect",
    "eval/cons_answered@k": "the same where responses without an answer do not vote",
    "eval/answered": "share of responses with an answer",
    "eval/pass@k": "share of problems with at least one correct sample",
    "eval/pass@{j}": "unbiased estimate of the same with j samples (`eval.pass_k`)",
    "eval/{quantity}/low": "lower end of the 95% bootstrap interval of a score",
    "eval/{quantity}/high": "its upper end",
    "eval/length": "mean response length, tokens",
    "eval/truncated": "share of responses that reached the limit of tokens",
    "eval/length/q10": "10% quantile of the response length, tokens",
    "eval/length/q25": "25% quantile",
    "eval/length/median": "median",
    "eval/length/q75": "75% quantile",
    "eval/length/q90": "90% quantile",
    "eval/length/max": "longest response, tokens",
    "eval/length/correct": "mean length of correct responses, if any",
    "eval/length/correct_median": "median length of correct responses",
    "eval/length/incorrect": "mean length of incorrect responses, if any",
    "eval/length/incorrect_median": "median length of incorrect responses",
    "eval/verifier_timeouts": "answers that the verifier did not decide in time, if any",
    "eval/verifier_errors": "answers on which the verifier failed, if any",
    "eval/{benchmark}/...": "each of these of one benchmark, where `data.validation` has several",
}


def entry_of(metric: str) -> str | None:
    """Return the key of `METRICS` that stands for a logged metric; None if there is none."""
    if metric in METRICS:
        return metric
    return next((key for key in METRICS if re.fullmatch(_pattern(key), metric)), None)


def _pattern(key: str) -> str:
    pattern = re.escape(key).replace(r"\.\.\.", ".+")
    return re.sub(r"\\\{(\w+)\\\}", lambda part: _PARTS[part[1]], pattern)
