"""The simulation of generation: its population, the pace of its servers, and the batches of both policies."""

from __future__ import annotations

from statistics import mean

import pytest

from benchmarks import generation_simulation as simulation
from benchmarks.generation_simulation import Server, group_of, simulate


@pytest.mark.parametrize("length", [4000, 9000])
def test_population(length: int) -> None:
    """Lengths have the wanted mean after they are cut; the wanted share is informative, of shorter problems."""
    groups = [group_of(number, length, 0.3) for number in range(2000)]
    lengths = [mean(lengths) for lengths, _ in groups]
    assert mean(lengths) == pytest.approx(length, rel=0.04)
    assert max(max(lengths) for lengths, _ in groups) == simulation.LONGEST
    informative = [mean(lengths) for lengths, informative in groups if informative]
    assert len(informative) / len(groups) == pytest.approx(0.3, abs=0.03)
    assert mean(informative) < 0.95 * mean(lengths)


def test_pace_of_a_server() -> None:
    """Each response gets a token in 20 ms on an empty server, and in 40 ms on a full one."""
    server = Server()
    server.advance(2.0)
    assert server.progress == pytest.approx(100)
    server.clients[0] = simulation.CAPACITY
    server.advance(4.0)
    assert server.progress == pytest.approx(150)


def test_policies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sample the first informative groups in order, batch after batch; the present one generates no less than
    these need, throws away less than half as much as the one before, and takes no longer."""
    for name, value in {"NEEDED": 48, "SERVERS": 2, "CAPACITY": 128, "MOST": 192, "GROUP": 4}.items():
        monkeypatch.setattr(simulation, name, value)
    group_of.cache_clear()
    before, after = (simulate(policy, 4000, 0.5, batches=2, fill=False) for policy in ("before", "after"))
    informative = [group for group in range(1000) if group_of(group, 4000, 0.5)[1]]
    ends = [informative[48 * batch - 1] + 1 for batch in (1, 2, 3)]
    assert [batch["end"] for batch in before] == [batch["end"] for batch in after] == ends
    for number, (old, new) in enumerate(zip(before, after, strict=True)):
        first = ends[number - 1] if number else 0
        used = sum(sum(group_of(group, 4000, 0.5)[0]) for group in range(first, ends[number]))
        assert used <= new["generated"] <= old["generated"]
        assert new["cancelled"] == pytest.approx(1 - used / new["generated"])
        assert new["seconds"] <= old["seconds"]
    assert mean(batch["cancelled"] for batch in after) < 0.5 * mean(batch["cancelled"] for batch in before)
    group_of.cache_clear()
