"""Future-KL Influenced Policy Optimization (FIPO, arXiv 2603.19835) on Megatron-Core."""

__version__ = "0.1.0"
