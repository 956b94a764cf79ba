"""Configuration of a run: frozen dataclasses, filled from YAML and `key=value` overrides, validated once.

`load_config` raises ValueError for every error that can be detected without the model; checks that need the model's
config are in `model/`.
"""

from megatron_fipo.config import environment as _environment  # noqa: F401  (restricts which variables configs can read)
from megatron_fipo.config.load import checkpoint_setting, load_config, to_yaml, with_seed
from megatron_fipo.config.moe import MoEConfig
from megatron_fipo.config.problems import validate
from megatron_fipo.config.rollout import CorrectionConfig, RolloutConfig, ServerConfig
from megatron_fipo.config.sections import (
    AlgorithmConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    ProfileConfig,
    ResumeConfig,
    RewardConfig,
    RunConfig,
    TrainerConfig,
)

__all__ = [
    "AlgorithmConfig",
    "CheckpointConfig",
    "Config",
    "CorrectionConfig",
    "DataConfig",
    "EvalConfig",
    "MoEConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "ProfileConfig",
    "ResumeConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "ServerConfig",
    "TrainerConfig",
    "checkpoint_setting",
    "load_config",
    "to_yaml",
    "validate",
    "with_seed",
]
