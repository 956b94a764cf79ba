"""What srun's variables say about a task."""

from __future__ import annotations

import pytest

from megatron_fipo.launch import slurm

TASK = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "12",
    "SLURM_STEP_NUM_TASKS": "12",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "gpu[08-10],login",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),3,1",
}


def test_srun_variables_become_torch_s() -> None:
    """Rank, world, local rank, the tasks on this node of the step's `4(x2),3,1`, and the first node's name."""
    found = slurm.torch_environment(TASK)
    assert {k: v for k, v in found.items() if k != "MASTER_PORT"} == {
        "RANK": "5",
        "WORLD_SIZE": "12",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "gpu08",
    }


@pytest.mark.parametrize(("node", "tasks"), [("0", "4"), ("1", "4"), ("2", "3"), ("3", "1")])
def test_tasks_on_each_node(node: str, tasks: str) -> None:
    """Nodes of a step may run different numbers of tasks."""
    assert slurm.torch_environment({**TASK, "SLURM_NODEID": node})["LOCAL_WORLD_SIZE"] == tasks


def test_an_address_that_is_set_wins() -> None:
    """MASTER_ADDR and MASTER_PORT of the environment are used as they are."""
    found = slurm.torch_environment({**TASK, "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "1234"})
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("10.0.0.7", "1234")


def test_ports_differ() -> None:
    """Between a hundred jobs in a row, the first 8 steps of a job and its first 8 attempts; always below the ports that
    Linux gives to outgoing connections."""
    ports = [
        int(slurm.torch_environment({**TASK, **variables})["MASTER_PORT"])
        for job in range(3_999_950, 4_000_050)
        for step in range(8)
        for restart in range(8)
        for variables in [{"SLURM_JOB_ID": f"{job}", "SLURM_STEP_ID": f"{step}", "SLURM_RESTART_COUNT": f"{restart}"}]
    ]
    assert len(set(ports)) == len(ports) == 6400
    assert (min(ports) >= 20_000, max(ports) < 32_768) == (True, True)


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("login", ["login"]),
        ("a,b-2,c.example", ["a", "b-2", "c.example"]),
        ("gpu[08-10]", ["gpu08", "gpu09", "gpu10"]),
        ("gpu[9,11-12],n[1,3]x", ["gpu9", "gpu11", "gpu12", "n1x", "n3x"]),
        ("rack[0-1]n[01-02]", ["rack0n01", "rack0n02", "rack1n01", "rack1n02"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
    ],
)
def test_node_lists(text: str, hosts: list[str]) -> None:
    """Slurm's short form written out: ranges, zero padding, several brackets, plain names."""
    assert slurm.expand_hosts(text) == hosts


@pytest.mark.parametrize(
    ("environment", "is_task"),
    [
        (TASK, True),
        ({}, False),
        ({**TASK, "SLURM_STEP_NUM_TASKS": "1"}, False),  # srun -n 1: this command starts the ranks
        ({k: v for k, v in TASK.items() if k != "SLURM_STEP_ID"}, False),  # the batch script itself
    ],
)
def test_one_of_several_tasks(environment: dict[str, str], is_task: bool) -> None:
    """Only then is this process given a rank by srun."""
    assert slurm.is_task(environment) is is_task
