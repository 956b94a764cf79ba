"""Ranks from the environment of srun, Flux and MPI launchers; what is not understood is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_fipo import launch
from megatron_fipo.launch import launchers

OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "16",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
HYDRA = {"PMI_RANK": "5", "PMI_SIZE": "16", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}
PALS = {"PMI_RANK": "5", "PMI_SIZE": "16", "PMI_LOCAL_RANK": "1", "PMI_LOCAL_SIZE": "4", "PALS_RANKID": "5"}
FLUX = {
    "FLUX_TASK_RANK": "5",
    "FLUX_TASK_LOCAL_ID": "1",
    "FLUX_JOB_SIZE": "16",
    "FLUX_JOB_NNODES": "4",
    "FLUX_JOB_ID": "f1",
    "PMI_RANK": "5",
    "PMI_SIZE": "16",
}
SRUN = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "n[1-4]",
    "SLURM_STEP_TASKS_PER_NODE": "4(x4)",
    "SLURM_JOB_NODELIST": "n[1-4]",
}
PLACE = {"RANK": "5", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}


def _place(environment: dict[str, str]) -> dict[str, str]:
    found = launchers.task(environment)
    assert found is not None
    assert 20_000 <= int(found.pop("MASTER_PORT")) < 32_768
    return found


@pytest.mark.parametrize("environment", [OPEN_MPI, HYDRA, PALS, FLUX], ids=["Open MPI", "Hydra", "PALS", "Flux"])
def test_a_place_of_sixteen(environment: dict[str, str]) -> None:
    """Rank, world, local rank and local world, with the first node from MASTER_ADDR."""
    assert _place({**environment, "MASTER_ADDR": "n1"}) == {**PLACE, "MASTER_ADDR": "n1"}


def test_the_first_node_on_pbs(tmp_path: Path) -> None:
    """It is the first line of PBS_NODEFILE; all ranks of a job derive the same port from its number."""
    nodes = tmp_path / "nodes"
    nodes.write_text("n7.cluster\nn8.cluster\n")
    job = {"PBS_NODEFILE": str(nodes), "PBS_JOBID": "12.server"}
    assert _place({**PALS, **job})["MASTER_ADDR"] == "n7.cluster"
    ports = {
        (launchers.task({**PALS, **job, "PMI_RANK": rank, "PMI_LOCAL_RANK": "0"}) or {})["MASTER_PORT"]
        for rank in "059"
    }
    assert len(ports) == 1


def test_all_on_one_node() -> None:
    """Then no address is needed."""
    alone = {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "16"}
    assert _place(alone)["MASTER_ADDR"] == "127.0.0.1"


def test_srun_with_pmi2() -> None:
    """srun's own place, though there are variables of MPI as well."""
    assert _place({**SRUN, "PMI_RANK": "5", "PMI_SIZE": "16"}) == {**PLACE, "MASTER_ADDR": "n1"}


def test_mpirun_inside_a_slurm_job() -> None:
    """Its own srun starts one process a node, whose place the ranks inherit: MPI's counts."""
    inherited = {**SRUN, "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "0"}
    assert _place({**inherited, **OPEN_MPI}) == {**PLACE, "MASTER_ADDR": "n1"}
    assert _place({**inherited, **HYDRA}) == {**PLACE, "MASTER_ADDR": "n1"}


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        (
            {"PMI_RANK": "1", "PMI_SIZE": "4"},
            r"MPICH or Intel MPI \(PMI_SIZE=4\) started this process as one",
        ),
        ({"PMIX_RANK": "1"}, r"an MPI launcher \(PMIX_RANK=1\) started this process as one of several"),
        ({"PBS_TASKNUM": "2"}, r"pbsdsh \(PBS_TASKNUM=2\) started this process as one of several"),
        (OPEN_MPI, "Open MPI started ranks on several nodes and does not say which one has rank 0: set MASTER_ADDR"),
        ({**FLUX, "FLUX_JOB_NNODES": "3"}, "Flux started 16 tasks on 3 nodes: start as many on each"),
    ],
)
def test_what_is_refused(environment: dict[str, str], says: str) -> None:
    """Never does each process train alone; one sentence says what to set."""
    with pytest.raises(ValueError, match=says):
        launchers.task(environment)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"PMI_RANK": "0", "PMI_SIZE": "1"},
        {"OMPI_COMM_WORLD_SIZE": "1"},
        {"PBS_TASKNUM": "1"},
        {"PMIX_RANK": "0", **SRUN},
    ],
)
def test_started_alone_or_by_srun(environment: dict[str, str]) -> None:
    """One process starts its ranks itself, whatever a launcher has left in its environment."""
    assert (launchers.task(environment) is None) == ("SLURM_PROCID" not in environment)


def test_first_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks are made once, by rank 0, and the number of ranks is known."""
    for name, value in {**OPEN_MPI, "MASTER_ADDR": "n1"}.items():
        monkeypatch.setenv(name, value)
    assert (launch.is_first_process(), launch.started_ranks()) == (False, 16)
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    assert launch.is_first_process()
