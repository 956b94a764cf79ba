"""Settings of the benchmark: model shape, sequences of an update, and number of repetitions."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_fipo.config import Config, load_config
from megatron_fipo.scaling.cost.sequence_lengths import Sequences, parse_lengths
from megatron_fipo.scaling.measure.specification import Measurement

# hidden size, MLP width, layers, query heads, key/value heads, vocabulary, tied embeddings
SHAPES = {
    "1.5b": (1536, 8960, 28, 12, 2, 151_936, True),
    "0.5b": (896, 4864, 24, 14, 2, 151_936, True),
    "7b-8-layers": (3584, 18_944, 8, 28, 4, 152_064, False),
    "toy": (64, 128, 2, 4, 2, 512, True),
}
GROUP = 8  # responses per prompt


@dataclass(frozen=True)
class Settings:
    """Arguments of the command.

    Attributes:
        model: a name in SHAPES, or a directory with a config.json.
        tokens: per micro-batch.
        sequences: per update; a multiple of GROUP.
        lengths: their distribution, in the format of `scaling plan --lengths`.
        steps: timed repetitions, after a warm-up.
        seconds: time budget per measurement of a kernel.
        transports: weight transports to vLLM; each has its own server.
    """

    device: str
    model: str
    tokens: int
    sequences: int
    lengths: str
    steps: int
    seconds: float
    directory: Path
    transports: tuple[str, ...]
    lm_head_chunk: int = 4096

    @property
    def dtype(self) -> str:
        return "bfloat16" if self.device == "cuda" else "float32"

    @property
    def is_toy(self) -> bool:
        return self.model == "toy"

    def hf_path(self) -> Path:
        """Return the model's directory; for a named shape it is created with a config.json and without weights."""
        if self.model not in SHAPES:
            return Path(self.model)
        hidden, ffn, layers, heads, kv_heads, vocabulary, tied = SHAPES[self.model]
        path = self.directory / "model"
        path.mkdir(exist_ok=True)
        content = {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "hidden_size": hidden,
            "intermediate_size": ffn,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "vocab_size": vocabulary,
            "tie_word_embeddings": tied,
            "max_position_embeddings": 32_768,
            "rope_theta": 1e6,
            "rms_norm_eps": 1e-6,
            "hidden_act": "silu",
            "torch_dtype": self.dtype,
        }
        (path / "config.json").write_text(json.dumps(content))
        return path

    def update(self) -> Sequences:
        return parse_lengths(self.lengths, self.sequences)

    def config(self, transformer_engine: str = "off", deterministic: bool = False) -> Config:
        """Return the config of a run on one rank whose update has these sequences."""
        prompts = self.sequences // GROUP
        longest = self.update().longest
        path = self.directory / "config.yaml"
        path.write_text(
            f"run: {{directory: {self.directory}/run, deterministic: {json.dumps(deterministic)}}}\n"
            f"model: {{hf_path: {self.hf_path()}, dtype: {self.dtype}, transformer_engine: '{transformer_engine}', "
            f"lm_head_chunk_tokens: {self.lm_head_chunk}}}\n"
            "data: {train: none, max_prompt_tokens: 1}\n"
            f"rollout: {{max_response_tokens: {longest - 1}, group_size: {GROUP}, prompts_per_step: {prompts}}}\n"
            f"trainer: {{mini_batch_prompts: {prompts}, tokens_per_micro_batch: {self.tokens}}}\n"
            "reward: {overlong_buffer_tokens: 0}\n"
        )
        return load_config(path)

    def measurement(self, config: Config) -> Measurement:
        """Return the specification that `scaling run`'s actor with random weights is built from."""
        return Measurement(config, self.update(), "fipo", self.device, None, self.directory)


def transformer_engine_choices(device: str) -> list[str]:
    """Return the values of model.transformer_engine that this machine supports."""
    if device != "cuda":
        return ["off"]
    try:
        from megatron.core.extensions.transformer_engine import HAVE_TE
    except ImportError:
        HAVE_TE = False
    return ["off", "on"] if HAVE_TE else ["off"]


def free() -> None:
    """Free torch's cached memory of deleted objects."""
    import gc

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
