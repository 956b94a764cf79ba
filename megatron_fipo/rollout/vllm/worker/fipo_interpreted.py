"""vLLM's server on a CPU, with Triton's kernels interpreted.

vLLM returns the experts of a response only from a model runner that has Triton kernels, and Triton has no compiler for
CPUs. With TRITON_INTERPRET=1 it interprets them instead, which is slow, but right. vLLM looks for a backend named "cpu"
first, so one is registered; the processes that it starts import this module, too, as their main module.
"""

from __future__ import annotations

import runpy
from types import SimpleNamespace

from triton.backends import backends

_DRIVER = SimpleNamespace(is_active=lambda: True)

backends.clear()
backends["cpu"] = SimpleNamespace(driver=_DRIVER, compiler=None)

if __name__ == "__main__":
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
