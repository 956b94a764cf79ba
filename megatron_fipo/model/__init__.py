"""The policy model: a Hugging Face config becomes a Megatron GPTModel under the run's layout."""

import megatron_fipo.parallel  # noqa: F401  sets up the CPU backend before Megatron is imported
