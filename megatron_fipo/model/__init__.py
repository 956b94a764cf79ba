"""The policy model: a Hugging Face config becomes a Megatron GPTModel under the run's layout."""
