"""Training batches: groups of responses sampled, scored, accepted in prompt order, and distributed over replicas."""

from megatron_fipo.batching.builder import BatchBuilder, make_batch_builder
from megatron_fipo.batching.step_batch import StepBatch

__all__ = ["BatchBuilder", "StepBatch", "make_batch_builder"]
