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
        "means that the policy can solve the problems but rarely does.",
        (
            Lines(
                "score",
                (
                    Line("eval/avg@k", "avg@k", BLUE, before_after=True),
                    Line("eval/cons@k", "cons@k", ORANGE, before_after=True),
                    Line("eval/pass@k", "pass@k", GREEN, before_after=True),
                ),
            ),
            Lines("mean length, tokens", (Line("eval/length"),)),
        ),
    ),
    FigureSpec(
        "reward",
        "Reward and accuracy",
        "Over all generated responses, including dropped groups. If reward falls while accuracy rises, the cause is "
        "the overlong penalty.",
        (Lines("mean reward", (Line("reward/mean"),)), Lines("accuracy", (Line("reward/accuracy", color=GREEN),))),
    ),
    FigureSpec(
        "accuracy_length",
        "Accuracy against length",
        "One dot per step, with a linear fit. Dots moving right and up: longer reasoning pays off. Right but "
        "not up: length without benefit.",
        (Scatter("response_length/mean", "mean response length, tokens", "reward/accuracy", "accuracy"),),
    ),
    FigureSpec(
        "evaluation_length",
        "Evaluation score against length",
        "One dot per evaluation: shows whether longer validation responses are better.",
        (Scatter("eval/length", "mean response length, tokens", "eval/avg@k", "avg@k"),),
    ),
)

RESPONSES = (
    FigureSpec(
        "response_length",
        "Response length",
        "FIPO's mean should keep growing where DAPO's levels off. A median at the limit means truncation; "
        "a sudden drop means collapse.",
        (
            Lines(
                "tokens",
                (
                    Line("response_length/mean", "mean", ORANGE),
                    Line("response_length/median", "median", DEEP),
                ),
                (
                    Band("response_length/min", "response_length/max", "min to max", PALE, 0.3),
                    Band("response_length/q25", "response_length/q75", "q25 to q75", MIDDLE, 0.35),
                ),
            ),
        ),
    ),
    FigureSpec(
        "correct_and_incorrect",
        "Correct and incorrect responses",
        "Incorrect responses are usually longer. If the truncated share grows, increase the response limit.",
        (
            Lines(
                "mean length, tokens",
                (
                    Line("response_length/correct", "correct", GREEN, zero_is_no_data=True),
                    Line("response_length/incorrect", "incorrect", RED, zero_is_no_data=True),
                ),
            ),
            Lines("truncated, share of responses", (Line("response_length/truncated", color=PURPLE),)),
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
        "A drop to 0 ends exploration; a steady rise with falling reward means the policy is degenerating.",
        (Lines("nats per token", (Line("policy/entropy", color=GREEN),)),),
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

# Published on AIME 2024, shares of problems (arXiv 2603.19835): the mean of 32 samples at the end of training, and for
# R1-Zero-32B and o1-mini the values that the paper compares with.
AIME_2024 = (
    Reference("eval/avg@k", "DAPO", 0.50),
    Reference("eval/avg@k", "FIPO", 0.56),
    Reference("eval/avg@k", "R1-Zero-32B", 0.47),
    Reference("eval/avg@k", "o1-mini", 0.56),
)

SECTIONS: dict[str, tuple[FigureSpec, ...]] = {
    "Outcome": OUTCOME,
    "Responses": RESPONSES,
    "Policy": POLICY,
    "Future-KL": INFLUENCE,
    "Machine": MACHINE,
}
