"""Addresses by which other nodes reach this one."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import psutil

from megatron_fipo.machine.hosts import step_nodes

_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_ELSEWHERE = ("192.0.2.1", "2001:db8::1")  # documentation addresses, which use the default route


def own_address(environment: Mapping[str, str]) -> str:
    """Return this node's address for the other nodes of its job, IPv4 or IPv6.

    It is that of the interface in GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME, else the source address of packets to
    another node. The node's own name is not resolved: often the result is 127.0.1.1.

    Raises:
        ValueError: it has only loopback addresses.
    """
    for address in (*_named(environment), *_towards(_peers(environment)), *_towards(_ELSEWHERE)):
        if not ipaddress.ip_address(address.partition("%")[0]).is_loopback:
            return address
    raise ValueError(
        f"{socket.gethostname()} has only loopback addresses: name its network interface in "
        f"{_INTERFACES[0]} and {_INTERFACES[1]} (`ip -brief address` lists them)"
    )


def choose_interface(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variable for gloo's interface if this node's own name resolves to loopback; {} if not.

    Gloo announces the address that the name resolves to, and other nodes would connect to themselves.
    """
    if environment.get(_INTERFACES[0]) or not all(_is_loopback(a) for a in _resolved(socket.gethostname())):
        return {}
    address = own_address(environment)
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.address == address for a in addresses):
            return {_INTERFACES[0]: name}
    return {}


def resolve(node: str) -> str:
    """Return an address of a node, IPv4 or IPv6.

    Raises:
        ValueError: its name cannot be resolved.
    """
    for address in _resolved(node):
        return address
    raise ValueError(f"the name of node {node} cannot be resolved on {socket.gethostname()}")


def url(host: str, port: int) -> str:
    """Return the URL of a server; an IPv6 address stands in brackets."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _peers(environment: Mapping[str, str]) -> list[str]:
    own = {environment.get("SLURMD_NODENAME"), socket.gethostname()}
    others = [node for node in step_nodes(environment) if node not in own]
    return [*others[:1], *([environment["MASTER_ADDR"]] if environment.get("MASTER_ADDR") else [])]


def _named(environment: Mapping[str, str]) -> Iterator[str]:
    for variable in _INTERFACES:
        for name in environment.get(variable, "").split(","):
            for found in psutil.net_if_addrs().get(name, ()):
                if found.family in (socket.AF_INET, socket.AF_INET6) and not found.address.startswith("fe80"):
                    yield found.address


def _towards(peers: Sequence[str]) -> Iterator[str]:
    """Yield the source addresses of packets to these peers; nothing is sent."""
    for peer in peers:
        for family, address in _addresses(peer):
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                try:
                    probe.connect(address)
                except OSError:  # no route
                    continue
                yield probe.getsockname()[0]


def _addresses(name: str) -> list[tuple[int, Any]]:
    try:
        found = socket.getaddrinfo(name, 1, type=socket.SOCK_DGRAM)
    except OSError:
        return []
    return [(family, address) for family, _, _, _, address in found]


def _resolved(name: str) -> list[str]:
    return [str(address[0]) for _, address in _addresses(name)]


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def is_alone(environment: Mapping[str, str]) -> bool:
    """Return whether all ranks are on this node, as they are if the first one has a loopback address."""
    if environment.get("WORLD_SIZE", "1") == environment.get("LOCAL_WORLD_SIZE", "1"):
        return True
    try:
        return ipaddress.ip_address(environment.get("MASTER_ADDR", "")).is_loopback
    except ValueError:  # a name
        return False


def prepare_gloo() -> None:
    """Set the variable of `choose_interface` in this process's environment if there are other nodes, and print it."""
    chosen = {} if is_alone(os.environ) else choose_interface(os.environ)
    for name, value in chosen.items():
        print(f"{socket.gethostname()} resolves its own name to loopback: using {name}={value}", flush=True)
    os.environ.update(chosen)
