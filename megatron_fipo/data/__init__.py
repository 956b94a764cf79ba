"""Prompts from parquet files in the DAPO schema, in a shuffled, epoch-exact and resumable order."""

from megatron_fipo.data.prepare import prepare
from megatron_fipo.data.prompts import Prompt, PromptSet, TemplateOptions, load_prompts
from megatron_fipo.data.sampler import PromptStream

__all__ = ["Prompt", "PromptSet", "PromptStream", "TemplateOptions", "load_prompts", "prepare"]
