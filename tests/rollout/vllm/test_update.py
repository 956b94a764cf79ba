"""Updates: what travels, in which pieces and order, and what is left where one fails."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megatron_fipo.rollout.vllm import update
from megatron_fipo.rollout.vllm.buckets import buckets
from megatron_fipo.rollout.vllm.control import UNFINISHED, Control, ControlError
from megatron_fipo.rollout.vllm.transport import BroadcastTransport, FileTransport, IPCTransport, own_directory
from megatron_fipo.rollout.vllm.worker import fipo_wire
from tests.support.fake_server import KEY, FakeServer

ROUTES = [
    *("/pause", "/update_weight_version", "/init_weight_transfer_engine", "/start_weight_update"),
    *("/update_weights", "/update_weights", "/finish_weight_update"),
    *("/reset_prefix_cache", "/update_weight_version", "/resume"),
]


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """Return weights of 400, 80 and 800 bytes; two share memory, as parts of a fused parameter do."""
    generator = torch.Generator().manual_seed(seed)
    fused = torch.randn(30, 10, generator=generator)
    return {
        "a": fused[:10],
        "b": torch.randn(40, generator=generator).bfloat16(),
        "c": fused[10:],
    }


@pytest.fixture
def servers() -> Iterator[list[FakeServer]]:
    fakes = [FakeServer("run-1"), FakeServer("run-1")]
    yield fakes
    for fake in fakes:
        fake.close()


@pytest.fixture
def targets(servers: list[FakeServer]) -> Iterator[dict[int, tuple[Control, int]]]:
    controls = [Control(server.url, KEY) for server in servers]
    yield {number: (control, 1) for number, control in enumerate(controls)}
    for control in controls:
        control.close()


def files_told(server: FakeServer) -> list[dict[str, Any]]:
    return [body["update_info"] for route, body in server.controls if route == "/update_weights"]


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(10_000, [["a", "b", "c"]]), (480, [["a", "b"], ["c"]]), (479, [["a"], ["b"], ["c"]]), (1, [["a"], ["b"], ["c"]])],
)
def test_buckets(limit: int, expected: list[list[str]]) -> None:
    """Never more bytes than the limit, unless one tensor alone has more; all of them, in order."""
    assert [bucket.names for bucket in buckets(iter(tensors().items()), limit)] == expected


def test_only_one_bucket_is_held() -> None:
    """Tensors are taken when their bucket is filled, not before."""
    taken: list[str] = []

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in tensors().items():
            taken.append(name)
            yield name, tensor

    stream = buckets(weights(), 400)
    next(stream)
    assert taken == ["a", "b"]


def test_order_and_files(servers: list[FakeServer], targets: Any, tmp_path: Path) -> None:
    """Every server is paused and unfinished from before the first tensor until its cache of the old weights is gone."""
    transport = FileTransport(tmp_path / "weights", 0, 2)
    send = update.Update(transport, "run-2", targets, checked=False)
    send.run(iter(tensors().items()), 500)
    assert (send.failures, send.problem) == ({}, None)
    for server in servers:
        assert [route for route, _ in server.controls] == ROUTES
        assert server.controls[1][1] == {"new_version": UNFINISHED}
        assert server.version == "run-2"
    loaded = {k: v for told in files_told(servers[0]) for k, v in load_file(told["path"]).items()}
    assert loaded.keys() == tensors().keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors().items())
    assert sorted(f.name for f in tmp_path.rglob("*.*")) == ["0.safetensors", "1.safetensors"]


def test_newest_version_stays(servers: list[FakeServer], targets: Any, tmp_path: Path) -> None:
    """Until the next one is complete; it is what a restarted server is given; nothing stays at the end."""
    transport = FileTransport(tmp_path / "weights", 0, 2)
    for number in (1, 2, 3):
        update.Update(transport, f"run-{number}", targets, checked=False).run(iter(tensors(number).items()), 500)
        assert [f.name for f in (tmp_path / "weights").iterdir()] == [f"run-{number}"]
    assert transport.newest is not None
    servers[1].controls.clear()
    servers[1].version = "default"
    update.reload(targets[1][0], *transport.newest)
    assert [route for route, _ in servers[1].controls] == ROUTES
    assert servers[1].version == "run-3"
    assert torch.equal(load_file(files_told(servers[1])[0]["path"])["a"], tensors(3)["a"])
    transport.close()
    assert not (tmp_path / "weights").exists()


def test_restarted_server_is_checked(servers: list[FakeServer], targets: Any, tmp_path: Path) -> None:
    """A version that went out with checksums is proved on a restarted server too, and is not in force without."""
    transport = FileTransport(tmp_path / "weights", 0, 2)
    update.Update(transport, "run-2", targets, checked=True).run(iter(tensors().items()), 500)
    assert transport.newest is not None
    servers[1].controls.clear()
    update.reload(targets[1][0], *transport.newest)
    assert [route for route, _ in servers[1].controls] == [*ROUTES[:7], "/collective_rpc", *ROUTES[7:]]
    sums = [fipo_wire.checksum(tensor) for tensor in tensors().values()]
    assert [s for told in files_told(servers[1]) for s in told["checksums"]] == sums
    servers[1].bodies["/collective_rpc"] = b'{"results": [{"compared": 3, "received": 3, "different": ["c"]}]}'
    with pytest.raises(ControlError, match="does not compute with the weights it got: c"):
        update.reload(targets[1][0], *transport.newest)
    assert servers[1].version == UNFINISHED


@pytest.mark.parametrize("route", sorted(set(ROUTES)))
def test_failing_server(servers: list[FakeServer], targets: Any, tmp_path: Path, route: str) -> None:
    """Wherever a server fails it is named and never carries the new version; the other one gets everything."""
    servers[0].refuses = route
    send = update.Update(FileTransport(tmp_path / "weights", 0, 2), "run-2", targets, checked=False)
    weights = iter(tensors().items())
    send.run(weights, 1)
    assert list(weights) == []
    assert list(send.failures) == [0]
    assert f"{route} answered 500" in send.failures[0]
    if route != "/resume":
        assert servers[0].version != "run-2"
    assert servers[1].version == "run-2"
    assert len(files_told(servers[1])) == 3


def test_disk_is_full(servers: list[FakeServer], targets: Any, tmp_path: Path) -> None:
    """All tensors are taken all the same, since other ranks wait; nobody gets the version."""
    (tmp_path / "weights").write_text("in the way")
    send = update.Update(FileTransport(tmp_path / "weights", 0, 2), "run-2", targets, checked=False)
    weights = iter(tensors().items())
    send.run(weights, 1)
    assert list(weights) == []
    assert send.problem is not None
    assert "could not be written" in send.problem
    assert [server.version for server in servers] == [UNFINISHED] * 2


def test_files_are_for_this_user_alone(servers: list[FakeServer], targets: Any, tmp_path: Path) -> None:
    """Directories 0700 and files 0600, whatever the umask; a directory that is there already is not used."""
    before = os.umask(0)
    try:
        transport = FileTransport(tmp_path / "weights", 0, 2)
        update.Update(transport, "run-1", targets, checked=False).run(iter(tensors().items()), 1)
    finally:
        os.umask(before)
    modes = {p.name: p.stat().st_mode & 0o777 for p in [tmp_path / "weights", *(tmp_path / "weights").rglob("*")]}
    files = {f"{i}.safetensors": 0o600 for i in range(3)}
    assert modes == {"weights": 0o700, "run-1": 0o700, **files}
    second = update.Update(FileTransport(tmp_path / "weights", 0, 2), "run-2", targets, checked=False)
    second.run(iter(tensors().items()), 1)
    assert second.problem is not None
    assert "File exists" in second.problem


def test_directory_of_weights() -> None:
    """One of the run's own, in the directory that the user names or in memory; never that directory itself."""
    found = own_directory("some/where", "run")
    assert (found.parent, found.name) == (Path("some/where").absolute(), f"megatron-fipo-weights-{os.getpid()}-run")
    assert own_directory(None, "run").parent in (Path("/dev/shm"), Path("/tmp"))


def test_other_ranks_send_nothing(tmp_path: Path) -> None:
    """Files are written by rank 0; with broadcasts the servers are dealt out over ranks."""
    transport = FileTransport(tmp_path / "weights", 1, 2)
    update.Update(transport, "run-1", {}, checked=True).run(iter(tensors().items()), 1)
    assert not (tmp_path / "weights").exists()
    feeds = [BroadcastTransport("gloo", torch.device("cpu"), "127.0.0.1", rank, 3, 7).feeds for rank in range(3)]
    assert [list(f) for f in feeds] == [[0, 3, 6], [1, 4], [2, 5]]


def test_memory_shown_to_a_server_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """ipc: torch keeps a buffer that another process has seen until `ipc_collect`; never more than one is kept."""
    kept: list[torch.Tensor] = []
    most = 0

    def handle(buffer: torch.Tensor) -> dict[str, Any]:
        nonlocal most
        kept.append(buffer)
        most = max(most, len({b.untyped_storage().data_ptr() for b in kept}))
        return {"gpu": "0", "num_bytes": buffer.numel(), "shared": []}

    def collect() -> None:
        kept[:] = [b for b in kept if transport._buffer.data_ptr() == b.data_ptr()]

    monkeypatch.setattr(fipo_wire, "ipc_handle", handle)
    monkeypatch.setattr(torch.cuda, "ipc_collect", collect)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        transport = IPCTransport(torch.device("cpu"), 0, [[0]])
        for version in range(2):
            for number, bucket in enumerate(buckets(iter(tensors().items()), 1)):
                told = transport.stage(str(version), number, bucket, checked=False)
                assert [h["num_bytes"] for h in told["handles"]] == [transport._buffer.numel()]
            transport.finish(str(version), complete=True)
            assert kept == []
    finally:
        dist.destroy_process_group()
    assert most == 1


def test_wrong_key(servers: list[FakeServer]) -> None:
    """A control route that is refused says what to set."""
    control = Control(servers[0].url, "wrong")
    with pytest.raises(ControlError, match=r"/pause answered 401: .*MEGATRON_FIPO_VLLM_KEY"):
        update.begin(control)
    control.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_pack_and_unpack(dtype: torch.dtype) -> None:
    """Bit for bit, whatever the shapes: odd sizes, scalars, nothing."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 5), (), (0, 4), (7,), (1, 1, 3)]
    given = [torch.randint(-100, 100, shape, generator=generator).to(dtype) for shape in shapes]
    given.append(torch.randn(3, generator=generator))
    names = [fipo_wire.dtype_name(t.dtype) for t in given]
    buffer = fipo_wire.pack(given, torch.device("cpu"))
    assert buffer.numel() == fipo_wire.buffer_bytes([list(t.shape) for t in given], names)
    for back, tensor in zip(fipo_wire.unpack(buffer, [list(t.shape) for t in given], names), given, strict=True):
        assert back.dtype == tensor.dtype
        assert torch.equal(back, tensor)


def test_checksum_sees_every_bit_and_place() -> None:
    """Any flipped bit, two exchanged values and a shifted row change it; strides and views do not."""
    tensor = torch.randn(13, 7, generator=torch.Generator().manual_seed(0))
    expected = fipo_wire.checksum(tensor)
    seen = {expected}
    for place in range(0, tensor.numel(), 5):
        for bit in (0, 7, 15, 23, 30):
            words = tensor.clone().view(torch.int32).flatten()
            words[place] ^= 1 << bit
            seen.add(fipo_wire.checksum(words.view(torch.float32).view(13, 7)))
    assert len(seen) == 1 + 5 * 19
    exchanged = tensor.flatten()[[1, 0, *range(2, 91)]].view(13, 7)
    assert fipo_wire.checksum(exchanged) not in seen
    assert fipo_wire.checksum(tensor.roll(1, 0)) not in seen
    assert fipo_wire.checksum(tensor.T.contiguous().T) == expected
    assert fipo_wire.checksum(torch.zeros(8)) != fipo_wire.checksum(torch.zeros(9))
    assert 0 <= expected + 2**63 < 2**64


def test_checksum_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors larger than a piece have the checksum that they have at once, whatever is left for the last piece."""
    generator = torch.Generator().manual_seed(0)
    given = [
        torch.randint(0, 255, (size,), generator=generator).to(torch.uint8) for size in (0, 1, 63, 64, 65, 128, 517)
    ]
    at_once = [fipo_wire.checksum(tensor) for tensor in given]
    monkeypatch.setattr(fipo_wire, "_PIECE_CPU", 64)
    assert [fipo_wire.checksum(tensor) for tensor in given] == at_once
    assert len(set(at_once)) == len(at_once)


def test_broadcasts_listen_on_one_address() -> None:
    """Store and group of an update on one machine: every port is on the loopback address, and tensors arrive."""
    timeout = timedelta(seconds=60)
    before = {c.laddr for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN}
    store = fipo_wire.store("127.0.0.1", 0, is_master=True, timeout=timeout)
    received = torch.zeros(4, dtype=torch.uint8)

    def receive() -> None:
        other = fipo_wire.store("127.0.0.1", store.port, is_master=False, timeout=timeout)
        fipo_wire.Group("gloo", other, 1, 2, timeout).broadcast(received)

    with ThreadPoolExecutor(1) as pool:
        receiver = pool.submit(receive)
        group = fipo_wire.Group("gloo", store, 0, 2, timeout)
        listening = {c.laddr for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN}
        group.broadcast(torch.arange(4, dtype=torch.uint8))
        receiver.result()
    assert received.tolist() == [0, 1, 2, 3]
    assert {address.ip for address in listening - before} == {"127.0.0.1"}
