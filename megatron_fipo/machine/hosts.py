"""Names of a Slurm job's nodes, from its environment: containers have no scontrol."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping


def expand_hosts(text: str) -> list[str]:
    """Return the names in Slurm's short form of a node list, `gpu[01-03,7],rack[0-1]n[1-2],login`, in its order."""
    return [host for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text) for host in _expand(part)]


def _expand(part: str) -> Iterator[str]:
    prefix, bracket, rest = part.partition("[")
    if not bracket:
        yield prefix
        return
    ranges, _, suffix = rest.partition("]")
    endings = list(_expand(suffix))
    for numbers in ranges.split(","):
        first, _, last = numbers.partition("-")
        for number in range(int(first), int(last or first) + 1):
            yield from (f"{prefix}{number:0{len(first)}d}{ending}" for ending in endings)


def step_nodes(environment: Mapping[str, str]) -> list[str]:
    """Return the names of the step's nodes, of which the first one runs task 0; [] outside of Slurm."""
    return expand_hosts(environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", ""))


def spare_nodes(environment: Mapping[str, str]) -> list[str]:
    """Return the job's nodes that have none of the step's tasks."""
    taken = set(step_nodes(environment))
    return [node for node in expand_hosts(environment.get("SLURM_JOB_NODELIST", "")) if node not in taken]
