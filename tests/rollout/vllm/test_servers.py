"""Real vLLM servers on the CPU: the policy they draw from is the one they were given, and faults lose no response."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from megatron_fipo.rollout import Request, Response, Sampling, VLLMEngine
from megatron_fipo.rollout.vllm.client import Client, ClientTimeouts
from megatron_fipo.rollout.vllm.control import UNFINISHED, Control, ControlError, address
from tests.rollout.vllm.models import VOCABULARY, log_probs, make_model, weights_of
from tests.support.policies import make_config

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]

GREEDY = Sampling(0.0, 1.0, 0, 24, ())
SAMPLED = Sampling(0.8, 0.9, 0, 24, (17, 42))
LONG = Sampling(1.0, 1.0, 0, 500, ())
TOLERANCE = 1e-4  # nats, float32


class Case(NamedTuple):
    engine: VLLMEngine
    models: list[PreTrainedModel]


def start(directory: Path, tied: bool = False, **server: Any) -> Case:
    """An engine whose servers start with its first weights, and three policies for it."""
    models = [make_model(directory / f"model{seed}", seed=seed, tied=tied) for seed in range(3)]
    defaults = {"kv_cache_gb": 0.0625, "weight_bucket_mb": 1, "max_num_seqs": 32, "verify_weights": 1}
    config = make_config(
        directory / "model0",
        run={"directory": str(directory / "run")},
        data={"train": "unused", "max_prompt_tokens": 450},
        rollout={"engine": "vllm", "max_response_tokens": 500, "server": {**defaults, **server}},
    )
    topology: Any = SimpleNamespace(rank=0, world_size=1, device=torch.device("cpu"))
    return Case(VLLMEngine(config, topology, ClientTimeouts(deadline=240, wait=600, probe=5.0)), models)


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    """The engine's one rank is this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    """Two servers, weights through files."""
    case = start(tmp_path_factory.mktemp("two"), count=2)
    try:
        case.engine.load_weights(weights_of(case.models[0]))
        yield case
    finally:
        case.engine.close()


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    """One server of a model with tied embeddings, weights through gloo."""
    case = start(tmp_path_factory.mktemp("tied"), tied=True, weight_transport="gloo")
    try:
        yield case
    finally:
        case.engine.close()


def prompts() -> list[list[int]]:
    """Short ones and, sharing their beginning, ones that fill several blocks of the prefix cache."""
    generator = torch.Generator().manual_seed(7)
    found = [torch.randint(0, VOCABULARY, (n,), generator=generator).tolist() for n in (1, 5, 40, 300, 400)]
    return [*found, [*found[-1][:390], 1, 2, 3]]


def requests(count: int) -> list[Request]:
    choices = prompts()
    return [Request(choices[i % len(choices)], 1000 + i) for i in range(count)]


def check_greedy(model: PreTrainedModel, engine: VLLMEngine) -> None:
    """Every token is the likeliest by transformers, with transformers' log-probability."""
    wanted = requests(6)
    for request, response in zip(wanted, engine.generate(wanted, GREEDY), strict=True):
        expected = log_probs(model, request.prompt_ids, response.token_ids)
        assert expected.argmax(-1).tolist() == response.token_ids
        torch.testing.assert_close(torch.tensor(response.log_probs), expected.amax(-1), rtol=0, atol=TOLERANCE)
        assert response.weight_versions == (engine.updates,)


def test_greedy_after_refits(two: Case) -> None:
    """After each of three updates both servers answer as transformers does, prompts in the prefix cache included."""
    for number in (1, 2, 0):
        two.engine.load_weights(weights_of(two.models[number]))
        check_greedy(two.models[number], two.engine)
    assert two.engine.compared == (11, 27)  # embedding, norms, head and biases; the others are packed for the kernels


def test_greedy_after_refits_of_a_tied_model(tied: Case) -> None:
    """The head follows the embedding; weights come by broadcast."""
    for number in (0, 1, 2):
        tied.engine.load_weights(weights_of(tied.models[number]))
        check_greedy(tied.models[number], tied.engine)
    assert tied.engine.compared == (11, 26)


def test_log_probs_of_what_was_drawn(two: Case) -> None:
    """They are of the distribution after temperature and top-p, and nothing outside of it is drawn."""
    two.engine.load_weights(weights_of(two.models[0]))
    wanted = requests(24)
    for request, response in zip(wanted, two.engine.generate(wanted, SAMPLED), strict=True):
        expected = log_probs(two.models[0], request.prompt_ids, response.token_ids) / SAMPLED.temperature
        filtered = torch.stack([_top_p(row.softmax(-1), SAMPLED.top_p) for row in expected]).log()
        drawn = filtered.gather(1, torch.tensor(response.token_ids)[:, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(response.log_probs), drawn, rtol=0, atol=TOLERANCE)
        assert response.truncated == (response.token_ids[-1] not in SAMPLED.stop_token_ids)
        assert not set(response.token_ids[:-1]) & set(SAMPLED.stop_token_ids)


def _top_p(probs: torch.Tensor, top_p: float) -> torch.Tensor:
    order = probs.argsort(descending=True)
    before = probs[order].cumsum(0) - probs[order]
    kept = probs.clone()
    kept[order[before >= top_p]] = 0
    return kept / kept.sum()


def paused_midway(engine: VLLMEngine, wanted: list[Request], sampling: Sampling) -> list[Response]:
    """Responses paused when at least one of them had begun and not ended, however fast this machine is."""
    delay = 0.2
    for _ in range(12):
        futures = [engine.submit(request, sampling) for request in wanted]
        time.sleep(delay)
        engine.pause(futures)
        paused = [future.result(timeout=0) for future in futures]
        if any(r.unfinished and r.token_ids for r in paused):
            return paused
        delay *= 1.7 if any(r.unfinished for r in paused) else 0.4
    raise AssertionError(f"no response was between its first token and its last one, after {delay:.3f} s either")


def test_paused_responses_go_on_with_other_weights(two: Case) -> None:
    """A paused response is the beginning of the whole one, and continues with the next weights."""
    two.engine.load_weights(weights_of(two.models[0]))
    greedy = replace(GREEDY, max_tokens=400)
    wanted = [Request([*prompt[:40], place], place) for place, prompt in enumerate(prompts())]
    whole = tokens(two.engine.generate(wanted, greedy))
    paused = paused_midway(two.engine, wanted, greedy)
    for response, expected in zip(paused, whole, strict=True):
        assert response.token_ids == expected[: len(response.token_ids)]
        assert len(response.log_probs) == len(response.token_ids)
    two.engine.load_weights(weights_of(two.models[1]))
    rest = [Request([*r.prompt_ids, *p.token_ids], r.seed) for r, p in zip(wanted, paused, strict=True)]
    for request, response in zip(rest, two.engine.generate(rest, GREEDY), strict=True):
        expected_probs = log_probs(two.models[1], request.prompt_ids, response.token_ids)
        assert expected_probs.argmax(-1).tolist() == response.token_ids
        assert response.weight_versions == (two.engine.updates,)


def test_more_prompts_than_a_step_takes(two: Case) -> None:
    """Long prompts with seeds, none of which is in the cache, end no server."""
    two.engine.load_weights(weights_of(two.models[0]))
    incarnations = [server.incarnation for server in two.engine.supervisor.servers]
    generator = torch.Generator().manual_seed(3)
    wanted = [Request(torch.randint(0, VOCABULARY, (430,), generator=generator).tolist(), i) for i in range(48)]
    assert len(two.engine.generate(wanted, SAMPLED)) == 48
    assert [server.incarnation for server in two.engine.supervisor.servers] == incarnations
    assert all(server.state == "ready" and server.current for server in two.engine.supervisor.servers)


def client_of(engine: VLLMEngine) -> Client:
    assert engine._client is not None
    return engine._client


def current(engine: VLLMEngine) -> str:
    version = engine._newest
    assert version is not None
    return version[0]


def test_a_seed_is_a_response(two: Case) -> None:
    """The same seeds give the same responses on two servers, on either one alone, and one at a time."""
    two.engine.load_weights(weights_of(two.models[1]))
    wanted = requests(48)
    expected = two.engine.generate(wanted, SAMPLED)
    assert len({tuple(r.token_ids) for r in expected}) == 48
    for usable in ([True, False], [False, True]):
        client_of(two.engine).expect(current(two.engine), usable)
        assert tokens(two.engine.generate(wanted, SAMPLED)) == tokens(expected)
    one_by_one = [two.engine.generate([request], SAMPLED)[0] for request in wanted[:8]]
    assert tokens(one_by_one) == tokens(expected[:8])
    client_of(two.engine).expect(current(two.engine), [True, True])


def tokens(responses: list[Response]) -> list[list[int]]:
    return [response.token_ids for response in responses]


def processes(case: Case, server: int) -> list[int]:
    """The processes of a server's group, the API server first."""
    guard = case.engine.supervisor.servers[server].process.pid
    children = subprocess.run(["pgrep", "-P", str(guard)], capture_output=True, text=True, check=True).stdout.split()
    group = subprocess.run(["pgrep", "-g", children[0]], capture_output=True, text=True, check=True).stdout.split()
    return sorted(int(pid) for pid in group if pid != children[0])


def kill(case: Case) -> None:
    os.kill(processes(case, 0)[0], signal.SIGKILL)


def kill_engine(case: Case) -> None:
    """The worker, on which the process that answers HTTP depends."""
    os.kill(processes(case, 0)[-1], signal.SIGKILL)


def hang(case: Case) -> None:
    for pid in processes(case, 0):
        os.kill(pid, signal.SIGSTOP)


@pytest.mark.slow
@pytest.mark.parametrize("fault", [kill, kill_engine, hang])
def test_faults_while_responses_are_drawn(two: Case, fault: Callable[[Case], None]) -> None:
    """A server that dies or hangs loses no response and changes none; it comes back with the current weights."""
    two.engine.load_weights(weights_of(two.models[2]))
    wanted = requests(64)
    expected = tokens(two.engine.generate(wanted, LONG))
    incarnation = two.engine.supervisor.servers[0].incarnation
    failing = threading.Timer(1.0, fault, [two])
    failing.start()
    responses = two.engine.generate(wanted, LONG)
    assert failing.finished.is_set()  # and not after the last response
    assert tokens(responses) == expected
    failing.join()
    wait_for(
        lambda: (
            two.engine.supervisor.servers[0].current and two.engine.supervisor.servers[0].incarnation == incarnation + 1
        )
    )
    client_of(two.engine).expect(current(two.engine), [True, False])
    check_greedy(two.models[2], two.engine)
    assert tokens(two.engine.generate(wanted[:8], LONG)) == expected[:8]
    client_of(two.engine).expect(current(two.engine), [True, True])


def wait_for(condition: Callable[[], bool], seconds: float = 900.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def _break_off(seen: list[str], server: int, control: Control, told: dict[str, Any]) -> dict[str, Any]:
    """Half of the tensors arrive."""
    if server == 0 and told["path"].endswith("/1.safetensors"):
        seen.append(control.version(10))
        raise ControlError("the network is gone")
    return told


def _damage(seen: list[str], server: int, control: Control, told: dict[str, Any]) -> dict[str, Any]:
    """One tensor is not what was sent."""
    seen.append(control.version(10))
    return {**told, "checksums": [told["checksums"][0] ^ (server == 0), *told["checksums"][1:]]}


@pytest.mark.slow
@pytest.mark.parametrize("fault", [_break_off, _damage])
def test_update_that_fails(two: Case, monkeypatch: pytest.MonkeyPatch, fault: Callable[..., dict[str, Any]]) -> None:
    """A server that got half of the tensors, or a wrong one, serves nothing, is restarted, and then has all of them."""
    deliver = two.engine._transport.deliver
    incarnation = two.engine.supervisor.servers[0].incarnation
    seen: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(two.engine._transport, "deliver", lambda s, c, told: deliver(s, c, fault(seen, s, c, told)))
        # Every tensor is a bucket of its own.
        rollout = two.engine.config.rollout
        rollout = replace(rollout, server=replace(rollout.server, weight_bucket_mb=0))
        patch.setattr(two.engine, "config", replace(two.engine.config, rollout=rollout))
        two.engine.load_weights(weights_of(two.models[0]))
    assert set(seen) == {UNFINISHED}
    check_greedy(two.models[0], two.engine)
    wait_for(
        lambda: (
            two.engine.supervisor.servers[0].current and two.engine.supervisor.servers[0].incarnation == incarnation + 1
        )
    )
    client_of(two.engine).expect(current(two.engine), [True, False])
    check_greedy(two.models[0], two.engine)
    client_of(two.engine).expect(current(two.engine), [True, True])


def test_servers_that_run_already(two: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that is given URLs and a key uses those servers, and leaves them running."""
    monkeypatch.setenv("MEGATRON_FIPO_VLLM_KEY", ",".join(s.process.key for s in two.engine.supervisor.servers))
    found = [processes(two, server) for server in range(2)]
    case = start(tmp_path, urls=tuple(control.url for control in two.engine._controls))
    try:
        for number in (1, 2):
            case.engine.load_weights(weights_of(case.models[number]))
            check_greedy(case.models[number], case.engine)
    finally:
        case.engine.close()
    assert [processes(two, server) for server in range(2)] == found
    two.engine.load_weights(weights_of(two.models[0]))
    check_greedy(two.models[0], two.engine)


@pytest.mark.parametrize(
    "route", ["/weight_info", "/is_paused", "/v1/models", "/metrics", "/collective_rpc", "/docs", "//weight_info"]
)
def test_everything_needs_the_key(two: Case, route: str) -> None:
    """Control routes as well, which vLLM itself leaves open; and the key is in no log and no command line."""
    import httpx

    first, second = (server.process.key for server in two.engine.supervisor.servers)
    base, socket = address(two.engine._controls[1].url)
    with httpx.Client(base_url=base, transport=httpx.HTTPTransport(uds=socket), trust_env=False) as client:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Bearer {first}"}):
            for method in ("GET", "POST"):
                assert client.request(method, route, headers=headers).status_code == 401
    key = second.encode()
    assert key not in two.engine.supervisor.servers[1].process.log.read_bytes()
    for pid in processes(two, 1):
        assert key not in Path(f"/proc/{pid}/cmdline").read_bytes()


@pytest.mark.slow
def test_close_leaves_nothing(tmp_path: Path) -> None:
    """No process, no weights in memory, no shared memory, not even that of a server that crashed."""
    before = set(os.listdir("/dev/shm"))
    case = start(tmp_path)
    try:
        case.engine.load_weights(weights_of(case.models[0]))
        found = processes(case, 0)
        assert len(found) >= 3
        assert case.engine._directory.exists()
        kill_engine(case)
        wait_for(lambda: case.engine.supervisor.servers[0].incarnation == 2)
        found += processes(case, 0)
    finally:
        case.engine.close()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in found), seconds=20)
    left = {name for name in set(os.listdir("/dev/shm")) - before if name.startswith(("psm_", "megatron-fipo"))}
    assert not left
