"""Figures of a training run, with captions on how to read them.

Lines of metrics that a run does not log are omitted, and so are figures without any line.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_fipo.report.panels import (
    BLUE,
    DEEP,
    GREEN,
    MIDDLE,
    ORANGE,
    PALE,
    PURPLE,
    RED,
    Band,
    FigureSpec,
    Line,
    Lines,
    Reference,
    Scatter,
    Stack,
)


def _ratio_lines(sign: str, names: Sequence[tuple[str, str, str]]) -> tuple[Line, ...]:
    return tuple(Line(f"policy/{sign}_ratio_{name}", label, color, True) for name, label, color in names)


OUTCOME = (
    FigureSpec(
        "evaluation",
        "Evaluation",
        "Evaluation scores; dotted: before training. avg@k should rise first. pass@k far above a flat avg@k "
        "means that the policy can solve the problems but rarely does. In cons@k no answer votes as one incorrect "
        "answer; below it, the vote among the responses with an answer, and their share. The highest of many "
        "evaluations is biased upwards.",
        (
            Lines(
                "score",
                (
                    Line("eval/avg@k", "avg@k", BLUE, before_after=True),
                    Line("eval/cons@k", "cons@k", ORANGE, before_after=True),
                    Line("eval/pass@k", "pass@k", GREEN, before_after=True),
                ),
            ),
            Lines(
                "share",
                (
                    Line("eval/cons_answered@k", "cons@k of answers", ORANGE),
                    Line("eval/answered", "with an answer", PURPLE),
                ),
            ),
            Lines("mean length, tokens", (Line("eval/length"),)),
        ),
    ),
    FigureSpec(
        "reward",
        "Reward and accuracy",
        "Of the training batch, as in the paper, and of all generated responses, including dropped groups. Dynamic "
        "sampling drops what is solved always or never, which holds the batch's accuracy in between: the other one "
        "tells how much is solved. If reward falls while accuracy rises, the cause is the overlong penalty.",
        (
            Lines(
                "mean reward",
                (Line("batch/reward", "training batch", BLUE), Line("generated/reward", "all generated", PALE)),
            ),
            Lines(
                "accuracy",
                (Line("batch/accuracy", "training batch", GREEN), Line("generated/accuracy", "all generated", PALE)),
            ),
        ),
    ),
    FigureSpec(
        "score_length",
        "Evaluation score against training length",
        "As the paper's Figure 3f, validation mean@32 against response length: one dot per evaluation, against the "
        "mean length of the training batch of its step, with a linear fit. Dots moving right and up: longer reasoning "
        "pays off. Right but not up: length without benefit.",
        (Scatter("batch/response_length/mean", "mean response length of the batch, tokens", "eval/avg@k", "avg@k"),),
    ),
    FigureSpec(
        "evaluation_length",
        "Evaluation score against its length",
        "One dot per evaluation: shows whether longer validation responses are better.",
        (Scatter("eval/length", "mean response length, tokens", "eval/avg@k", "avg@k"),),
    ),
    FigureSpec(
        "accuracy_length",
        "Accuracy against length, all generated responses",
        "One dot per step, with a linear fit: accuracy and length on the training problems, dropped groups included.",
        (Scatter("generated/response_length/mean", "mean response length, tokens", "generated/accuracy", "accuracy"),),
    ),
)


def _length_lines(population: str) -> Lines:
    name = f"{population}/response_length"
    return Lines(
        "tokens",
        (Line(f"{name}/mean", "mean", ORANGE), Line(f"{name}/median", "median", DEEP)),
        (
            Band(f"{name}/min", f"{name}/max", "min to max", PALE, 0.3),
            Band(f"{name}/q25", f"{name}/q75", "q25 to q75", MIDDLE, 0.35),
        ),
    )


RESPONSES = (
    FigureSpec(
        "response_length",
        "Response length of the training batch",
        "What is trained on, after dynamic sampling: the paper's curves. In its 32B runs FIPO's mean keeps growing "
        "where DAPO's levels off; in its 7B runs both stay near 1,200 tokens. A median at the limit means truncation; "
        "a sudden drop means collapse.",
        (_length_lines("batch"),),
    ),
    FigureSpec(
        "generated_length",
        "Response length of all generated responses",
        "Dropped groups included: those whose responses are all correct are usually short, those all incorrect long.",
        (_length_lines("generated"),),
    ),
    FigureSpec(
        "correct_and_incorrect",
        "Correct and incorrect responses",
        "Incorrect responses are usually longer. With dynamic sampling, every problem of the training batch has both "
        "kinds. If the truncated share grows, increase the response limit.",
        (
            Lines(
                "mean length in the training batch, tokens",
                (
                    Line("batch/response_length/correct", "correct", GREEN, zero_is_no_data=True),
                    Line("batch/response_length/incorrect", "incorrect", RED, zero_is_no_data=True),
                ),
            ),
            Lines(
                "truncated, share of responses",
                (Line("batch/truncated", "training batch", PURPLE), Line("generated/truncated", "all generated", PALE)),
            ),
        ),
    ),
    FigureSpec(
        "reflection",
        "Self-reflection",
        "Responses with words such as wait, however or let me check, in up to 256 responses of up to 100 steps with "
        "saved rollouts (list in report/reflection.py). Marker words do not prove reflection: read some responses.",
        (
            Lines("share of responses with a marker", (Line("reflection/share", color=PURPLE),)),
            Lines("markers per response", (Line("reflection/markers"),)),
        ),
    ),
    FigureSpec(
        "sampling",
        "Sampled batches",
        "Cost of dynamic sampling. All-correct groups increase as the policy outgrows the data; more rounds per step "
        "slow steps down, and reaching the limit on rounds ends the run.",
        (
            Lines("generation rounds", (Line("sampling/rounds", color=PURPLE),)),
            Lines("prompts generated", (Line("sampling/prompts_generated"),)),
            Lines(
                "groups dropped",
                (
                    Line("sampling/all_correct", "all correct", GREEN),
                    Line("sampling/all_incorrect", "all incorrect", RED),
                ),
            ),
        ),
    ),
    FigureSpec(
        "advantage",
        "Length-weighted mean advantage",
        "Mean advantage per token. Below 0: long responses of a group are worse, and training shortens responses; "
        "above 0: it lengthens them.",
        (Lines("advantage", (Line("advantage/length_weighted_mean"),)),),
    ),
)

POLICY = (
    FigureSpec(
        "approx_kl",
        "Policy KL",
        "Divergence of the updated policy from the sampling policy within a step. Steady is healthy; growth over many "
        "steps precedes instability.",
        (Lines("nats per token, old minus new log-probability", (Line("policy/approx_kl"),)),),
    ),
    FigureSpec(
        "entropy",
        "Entropy",
        "Mean over a step's updates, each of the policy that it changes; and of the policy before the first of them. A "
        "drop to 0 ends exploration; a steady rise with falling reward means the policy is degenerating.",
        (
            Lines(
                "nats per token",
                (
                    Line("policy/entropy", "all updates", GREEN),
                    Line("policy/first_entropy", "before the first", PALE),
                ),
            ),
        ),
    ),
    FigureSpec(
        "grad_norm",
        "Gradient norm",
        "Before clipping, mean over a step's updates. Single spikes are harmless; a rising baseline is not.",
        (
            Lines("L2 norm, log scale", (Line("policy/grad_norm", color=PURPLE),), log=True),
            Lines("updates skipped", (Line("policy/skipped_updates", color=RED),)),
        ),
    ),
    FigureSpec(
        "clipping",
        "Clipped tokens and vetoed responses",
        "PPO clipping of at most a few percent is usual. Dual clips, the paper's low-clip fraction, and vetoes should "
        "be rare: they count tokens of negative samples whose probability rose many times over. A spike precedes "
        "collapse.",
        (
            Lines(
                "PPO clip, share of tokens",
                (
                    Line("policy/ppo_clip_fraction", "both"),
                    Line("policy/ppo_clip_fraction_low", "ratio too low, A < 0", RED),
                    Line("policy/ppo_clip_fraction_high", "too high, A > 0", GREEN),
                ),
            ),
            Lines("low clip (dual clip), share of tokens", (Line("policy/dual_clip_fraction", color=ORANGE),)),
            Lines("vetoed, share of responses", (Line("policy/vetoed_fraction", color=RED),)),
        ),
    ),
    FigureSpec(
        "ratios",
        "Importance ratios",
        "New over old probability, by the sign of the advantage; log scale. The upper tail of negative samples is "
        "handled by the dual clip and the safety rule.",
        (
            Lines(
                "advantage < 0",
                _ratio_lines("negative", (("p75", "p75", PALE), ("p995", "p99.5", MIDDLE), ("p999", "p99.9", DEEP)))
                + _ratio_lines("negative", (("max", "max", RED),)),
                log=True,
            ),
            Lines(
                "advantage > 0",
                _ratio_lines("positive", (("min", "min", RED), ("p25", "p25", PALE), ("median", "median", MIDDLE)))
                + _ratio_lines("positive", (("p75", "p75", DEEP), ("p999", "p99.9", PURPLE))),
                log=True,
            ),
        ),
    ),
)

INFLUENCE = (
    FigureSpec(
        "influence_weight",
        "Influence weight",
        "FIPO's weight on the advantage. A mean of exactly 1 has no effect (one update per step is DAPO). A raw "
        "maximum that grows without bound means that Future-KL amplifies noise.",
        (
            Lines(
                "after clip and safety rule",
                (Line("policy/influence_weight", "mean", BLUE),),
                (Band("policy/influence_weight_min", "policy/influence_weight_max", "min to max", PALE, 0.35),),
            ),
            Lines(
                "raw, exp(Future-KL), log scale",
                (Line("policy/influence_weight_raw", "mean", ORANGE),),
                (
                    Band(
                        "policy/influence_weight_raw_min", "policy/influence_weight_raw_max", "min to max", ORANGE, 0.2
                    ),
                ),
                log=True,
            ),
        ),
    ),
    FigureSpec(
        "influence_clip",
        "Influence weights at their bounds",
        "Near 1 at the upper bound: weights are saturated and no longer distinguish tokens. With a lower bound of 1, "
        "the lower share counts every token whose Future-KL is not positive: all of them in a step's first update.",
        (
            Lines(
                "share of tokens",
                (
                    Line("policy/influence_clip_fraction_upper", "upper", RED),
                    Line("policy/influence_clip_fraction_lower", "lower", BLUE),
                ),
            ),
        ),
    ),
)

MACHINE = (
    FigureSpec(
        "mismatch",
        "Rollout mismatch",
        "Trainer against rollout engine, same weights. A jump means stale or wrong weights; a slow rise, precision. "
        "Before a step's first update the log-ratio should be 0, and is exactly 0 on a CPU.",
        (
            Lines(
                "nats, log scale",
                (
                    Line("mismatch/abs_mean", "mean |d|", BLUE),
                    Line("mismatch/abs_max", "max |d|", RED),
                    Line("mismatch/k3", "KL (k3)", GREEN),
                ),
                log=True,
            ),
            Lines("max |log-ratio| before the first update", (Line("policy/first_log_ratio_abs_max", color=ORANGE),)),
        ),
    ),
    FigureSpec(
        "time",
        "Step time",
        "Rollouts usually take most of it, and grow with response length.",
        (
            Stack(
                "seconds",
                "time/step",
                (
                    Line("time/rollout", "rollout", BLUE),
                    Line("time/old_log_probs", "old log-probs", GREEN),
                    Line("time/update", "update", ORANGE),
                ),
                (Line("time/eval", "evaluation", PURPLE),),
            ),
        ),
    ),
    FigureSpec(
        "throughput",
        "Throughput",
        "Trained response tokens over step time without evaluation. Every extra sampling round lowers it.",
        (
            Lines("tokens/s, all ranks", (Line("throughput/tokens_per_second", color=GREEN),)),
            Lines("model FLOP/s utilization", (Line("throughput/mfu", color=PURPLE),)),
        ),
    ),
)

# Published on AIME 2024, shares of problems (arXiv 2603.19835): the mean of 32 samples at the end of training at 32B,
# and for R1-Zero-32B and o1-mini the values that the paper compares with. Its 7B scores, DAPO 0.36 and FIPO 0.40, are
# peaks, with which the end of a curve cannot be compared.
AIME_2024 = (
    Reference("eval/avg@k", "DAPO-32B", 0.50),
    Reference("eval/avg@k", "FIPO-32B", 0.56),
    Reference("eval/avg@k", "R1-Zero-32B", 0.47),
    Reference("eval/avg@k", "o1-mini", 0.56),
)

EXPERTS = (
    FigureSpec(
        "expert_load",
        "Load of experts",
        "Over the tokens of the step's old log-probabilities. A load of 1 is an even share. Routers that send all "
        "tokens to few experts collapse: the others no longer learn. routing/step_N.parquet has every expert's load.",
        (
            Lines(
                "tokens of the most used expert over its even share",
                (Line("moe/load_max", "worst layer", RED), Line("moe/load_max_mean", "mean over layers", BLUE)),
            ),
            Lines("experts without a token, share", (Line("moe/idle_experts", color=PURPLE),)),
            Lines(
                "entropy of the routers, nats",
                (Line("moe/entropy", "mean over layers", BLUE), Line("moe/entropy_min", "lowest layer", RED)),
            ),
        ),
    ),
    FigureSpec(
        "expert_changes",
        "Tokens whose experts would change",
        "With moe.routing_replay, the share of tokens for which a router would choose other experts than are replayed: "
        "before the updates those of the engine, in the updates those of the old log-probabilities or of the engine.",
        (
            Lines(
                "engine and trainer differ, share",
                (Line("moe/rollout_changed", "mean", BLUE), Line("moe/rollout_changed_max", "worst layer", RED)),
            ),
            Lines(
                "changed by updates, share",
                (Line("moe/replayed_changed", "mean", BLUE), Line("moe/replayed_changed_max", "worst layer", RED)),
            ),
        ),
    ),
)
SECTIONS: dict[str, tuple[FigureSpec, ...]] = {
    "Outcome": OUTCOME,
    "Responses": RESPONSES,
    "Policy": POLICY,
    "Future-KL": INFLUENCE,
    "Experts": EXPERTS,
    "Machine": MACHINE,
}
