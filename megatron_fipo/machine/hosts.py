"""Names of a Slurm job's nodes, from its environment, since containers have no scontrol."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

_RANGE = re.compile(r"(\d{1,12})(?:-(\d{1,12}))?", re.ASCII)
_MOST_HOSTS = 1 << 16  # the limit of Slurm itself


def expand_hosts(text: str) -> list[str]:
    """Return the names in Slurm's short form of a node list, `gpu[01-03,7],rack[0-1]n[1-2],login`, in its order.

    Raises:
        ValueError: the text is not a node list, or names more hosts than any cluster has.
    """
    parts = re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text)
    if ",".join(parts) != text:
        raise ValueError(
            f"{text!r} is not a list of hosts: a bracket is not closed, or there is nothing between two commas"
        )
    return [host for part in parts for host in _expand(part)]


def _expand(part: str) -> Iterator[str]:
    prefix, bracket, rest = part.partition("[")
    if not bracket:
        yield prefix
        return
    ranges, _, suffix = rest.partition("]")
    endings = list(_expand(suffix))
    bounds = [_RANGE.fullmatch(numbers) for numbers in ranges.split(",")]
    if any(found is None for found in bounds):
        raise ValueError(f"{part!r} is not a list of hosts: expected numbers or ranges in brackets, as gpu[01-03,7]")
    runs = [(found[1], int(found[1]), int(found[2] or found[1])) for found in bounds if found]
    if sum(max(0, last - first + 1) for _, first, last in runs) * max(1, len(endings)) > _MOST_HOSTS:
        raise ValueError(f"{part!r} names more than {_MOST_HOSTS} hosts")
    for text, first, last in runs:
        for number in range(first, last + 1):
            yield from (f"{prefix}{number:0{len(text)}d}{ending}" for ending in endings)


def step_nodes(environment: Mapping[str, str]) -> list[str]:
    """Return the names of the step's nodes, of which the first one runs task 0; [] outside of Slurm."""
    return expand_hosts(environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", ""))


def spare_nodes(environment: Mapping[str, str]) -> list[str]:
    """Return the job's nodes without tasks of the step."""
    taken = set(step_nodes(environment))
    return [node for node in expand_hosts(environment.get("SLURM_JOB_NODELIST", "")) if node not in taken]
