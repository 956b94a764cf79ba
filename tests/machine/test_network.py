"""Addresses: never a loopback one for other nodes, IPv4 or IPv6."""

from __future__ import annotations

import socket
from collections import namedtuple
from collections.abc import Callable

import psutil
import pytest

from megatron_fipo.machine import hosts, network

Address = namedtuple("Address", ["family", "address"])
STEP = {"SLURMD_NODENAME": "n1", "SLURM_STEP_NODELIST": "n[1-2]", "MASTER_ADDR": "n1", "SLURM_JOB_NODELIST": "n[1-4]"}


class Probe:
    """A socket whose packets to an address would leave by the source that the test says."""

    def __init__(self, sources: dict[str, str]) -> None:
        self.sources = sources

    def __call__(self, family: int, kind: int) -> Probe:
        return self

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def connect(self, address: tuple[str, int]) -> None:
        if address[0] not in self.sources:
            raise OSError("no route")
        self.source = self.sources[address[0]]

    def getsockname(self) -> tuple[str, int]:
        return self.source, 1


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """site(names, sources, interfaces): what names resolve to, the source towards each address, and interfaces."""

    def make(names: dict[str, str], sources: dict[str, str], interfaces: dict[str, list[str]] | None = None) -> None:
        def resolve(name: str, port: int, type: int) -> list[tuple]:
            address = names.get(name, name)
            if not address[0].isdigit() and ":" not in address:
                raise socket.gaierror(f"{name} is not known")
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            return [(family, type, 0, "", (address, port))]

        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        monkeypatch.setattr(socket, "socket", Probe(sources))
        monkeypatch.setattr(socket, "gethostname", lambda: "n1")
        families = {True: socket.AF_INET6, False: socket.AF_INET}
        table = {n: [Address(families[":" in a], a) for a in found] for n, found in (interfaces or {}).items()}
        monkeypatch.setattr(psutil, "net_if_addrs", lambda: table)

    return make


LOOPBACK = {"n1": "127.0.1.1", "n2": "10.0.0.2"}


def test_a_node_that_resolves_itself_to_loopback(site: Callable[..., None]) -> None:
    """It announces the source address of packets to another node of the step."""
    site(LOOPBACK, {"127.0.1.1": "127.0.0.1", "10.0.0.2": "10.0.0.1"})
    assert network.own_address(STEP) == "10.0.0.1"


def test_only_the_first_rank_s_name_is_known(site: Callable[..., None]) -> None:
    """Under torchrun, on the node with rank 0: the default route's source is left."""
    site(LOOPBACK, {"127.0.1.1": "127.0.0.1", "192.0.2.1": "10.0.0.1"})
    assert network.own_address({"MASTER_ADDR": "n1"}) == "10.0.0.1"


def test_no_address_but_loopback(site: Callable[..., None]) -> None:
    """One sentence says what to set."""
    site({"n1": "127.0.1.1"}, {"127.0.1.1": "127.0.0.1"})
    with pytest.raises(ValueError, match=r"^n1 has only loopback addresses: .* GLOO_SOCKET_IFNAME"):
        network.own_address({"MASTER_ADDR": "n1"})


def test_a_named_interface_wins(site: Callable[..., None]) -> None:
    """Its IPv4 or IPv6 address, without those of the link alone."""
    site(LOOPBACK, {"10.0.0.2": "10.0.0.1"}, {"ib0": ["fe80::1%ib0", "fd00::7"], "eth0": ["10.9.9.9"]})
    assert network.own_address({**STEP, "GLOO_SOCKET_IFNAME": "ib0"}) == "fd00::7"
    assert network.own_address({**STEP, "NCCL_SOCKET_IFNAME": "eth0"}) == "10.9.9.9"


def test_a_site_of_ipv6(site: Callable[..., None]) -> None:
    """Addresses and URLs, in which they stand in brackets."""
    site({"n1": "::1", "n2": "fd00::2"}, {"::1": "::1", "fd00::2": "fd00::1"})
    address = network.own_address(STEP)
    assert (address, network.resolve("n2")) == ("fd00::1", "fd00::2")
    assert network.url(address, 80) == "http://[fd00::1]:80"
    assert network.url("n2", 80) == "http://n2:80"
    with pytest.raises(ValueError, match="the name of node n9 cannot be resolved on "):
        network.resolve("n9")


def test_gloo_gets_an_interface(site: Callable[..., None]) -> None:
    """Only where it would announce loopback, and nobody has named one."""
    interfaces = {"lo": ["127.0.0.1"], "eth0": ["10.0.0.1"]}
    site(LOOPBACK, {"127.0.1.1": "127.0.0.1", "10.0.0.2": "10.0.0.1"}, interfaces)
    assert network.choose_interface(STEP) == {"GLOO_SOCKET_IFNAME": "eth0"}
    assert network.choose_interface({**STEP, "GLOO_SOCKET_IFNAME": "eth1"}) == {}
    site({**LOOPBACK, "n1": "10.0.0.1"}, {"10.0.0.2": "10.0.0.1"}, interfaces)
    assert network.choose_interface(STEP) == {}


@pytest.mark.parametrize(
    ("local", "master", "alone"),
    [("8", "n1", True), ("4", "n1", False), ("4", "10.0.0.1", False), ("4", "127.0.0.1", True), ("4", "::1", True)],
)
def test_ranks_on_one_node(local: str, master: str, alone: bool) -> None:
    """All are local, or the first one is reached by a loopback address."""
    assert network.is_alone({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": local, "MASTER_ADDR": master}) is alone


def test_nodes_without_ranks() -> None:
    """Only nodes of the job that are not of the step are left out."""
    assert hosts.spare_nodes(STEP) == ["n3", "n4"]
    assert hosts.spare_nodes({}) == []
