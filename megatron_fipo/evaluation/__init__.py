"""Avg@k, Cons@k and Pass@k of a policy on one or several benchmarks, with all samples."""

from megatron_fipo.evaluation.evaluate import evaluate, load_benchmarks
from megatron_fipo.evaluation.sample import Sample
from megatron_fipo.evaluation.summary import Evaluation, summarize

__all__ = ["Evaluation", "Sample", "evaluate", "load_benchmarks", "summarize"]
