"""Ranks: started here, by torchrun, srun, Flux or MPI; supervised; and the requeueing of their Slurm job.

torch.distributed.elastic is not used: it restarts ranks on the same nodes, while here Slurm requeues the job without
bad nodes, signals lead to a checkpoint first, and a supervisor, one per task, imports no torch.
"""

from megatron_fipo.exit_codes import Interrupted, RankFailure
from megatron_fipo.launch.attempts import Progress
from megatron_fipo.launch.launchers import is_first_process, started_ranks
from megatron_fipo.launch.rank_task import Requirements, requirements
from megatron_fipo.launch.start import DETERMINISTIC_ENVIRONMENT, checked, in_own_process, num_gpus, run

__all__ = [
    "DETERMINISTIC_ENVIRONMENT",
    "Interrupted",
    "Progress",
    "RankFailure",
    "Requirements",
    "checked",
    "in_own_process",
    "is_first_process",
    "num_gpus",
    "requirements",
    "run",
    "started_ranks",
]
