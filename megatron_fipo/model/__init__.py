"""Policy model: Megatron GPTModel built from a Hugging Face config under the run's layout."""

import megatron_fipo.parallel  # noqa: F401  sets up the CPU backend before Megatron is imported
