"""Process groups, CPU backend and sharded building blocks; the first package that may import Megatron-Core."""

import warnings

from megatron_fipo import fused_kernels
from megatron_fipo.parallel import cpu_backend, megatron_versions

# Megatron-Core warns on every rank, at every import, about optional packages; `doctor` reports them once.
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"megatron\.core|torch\.jit")
# torch 2.13 renames collectives that Megatron-Core calls by their names in torch 2.11.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")

megatron_versions.quiet_notices()
fused_kernels.hide_unusable()
cpu_backend.install()
