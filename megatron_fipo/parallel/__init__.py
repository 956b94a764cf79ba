"""Process groups, the CPU backend and the sharded building blocks. The first room that may import Megatron-Core."""

from megatron_fipo.parallel import cpu_backend

cpu_backend.install()
