"""Configuration of the FIPO and DAPO/GRPO losses, whose settings and constants are defined in `config.loss`."""

from dataclasses import dataclass

from megatron_fipo.config import AlgorithmConfig, RolloutConfig
from megatron_fipo.config.loss import LossConfig, loss_problems
from megatron_fipo.config.setting import range_problems, section, setting, settings


@section
@dataclass(frozen=True)
class FIPOLossConfig(LossConfig):
    """Settings of the loss, those of `algorithm` in a run's configuration and one more.

    Raises:
        ValueError: values for which the loss is not defined.
    """

    norm_length: float = setting(
        1.0,
        "Divisor of seq-mean-token-sum-norm in tokens: the maximum response length, as in Dr. GRPO",
        resume="fixed",
        above=0,
    )

    def __post_init__(self) -> None:
        problems = range_problems(self) or loss_problems(self)
        if problems:
            raise ValueError("illegal FIPO loss: " + "; ".join(problems))


def loss_config(algorithm: AlgorithmConfig, rollout: RolloutConfig) -> FIPOLossConfig:
    """Return the loss's config from the run's.

    Raises:
        ValueError: values for which the loss is not defined.
    """
    values = {s.name: getattr(algorithm, s.name) for s in settings(LossConfig)}
    return FIPOLossConfig(**values, norm_length=rollout.max_response_tokens)
