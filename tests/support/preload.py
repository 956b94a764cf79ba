"""Modules that ranks started by tests need, imported once in the server process that every rank is forked from."""

import gc

import hypothesis  # noqa: F401  (a rank imports its test's module, and that these)
import numpy  # noqa: F401
import pyarrow.parquet  # noqa: F401
import pytest  # noqa: F401
import transformers.models.auto.modeling_auto
import transformers.models.llama.modeling_llama
import transformers.models.mixtral.modeling_mixtral
import transformers.models.qwen2.modeling_qwen2
import transformers.models.qwen3.modeling_qwen3
import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401

import megatron_fipo.checkpoint
import megatron_fipo.launch.preload
import megatron_fipo.rollout  # noqa: F401

# A full collection walks every object that exists: half a second for these modules, in each rank anew, and it writes to
# pages that ranks would otherwise share.
gc.collect()
gc.freeze()
