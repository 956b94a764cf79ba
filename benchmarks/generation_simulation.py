"""Simulation of the generation of training batches on many servers; see generation.py."""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from statistics import NormalDist
from typing import Any

from megatron_fipo.batching.plan import Decision, InFlightPlan, InformativeShare

REPLICAS, SERVERS, CAPACITY = 8, 32, 256
NEEDED, GROUP, MOST, LONGEST = 512, 16, 2048, 20480
TOKEN_SECONDS = 0.02  # of a response that is alone
SPREAD_OF_PROBLEMS, SPREAD_WITHIN = 0.6, 0.6  # standard deviations of log lengths
CORRELATION = -0.3  # of a problem's length and its being informative
NORMAL = NormalDist()


class FixedWindow(InFlightPlan):
    """The policy of earlier releases, over all groups."""

    def decide(self) -> Decision:
        """Return a fixed number of unfinished groups, until enough informative ones are finished, anywhere."""
        if sum(self._outcomes.values()) >= self.needed:
            return Decision(self._last + 1, None)
        return Decision(self._first + len(self._outcomes) + self.most, None)


# The simulated population


@cache
def location(length: int, spread: float, longest: int) -> float:
    """Return the mean log length of a lognormal distribution that has the mean `length` when it is cut at `longest`."""

    def cut_mean(mu: float) -> float:
        z = (math.log(longest) - mu) / spread
        return math.exp(mu + spread**2 / 2) * NORMAL.cdf(z - spread) + longest * (1 - NORMAL.cdf(z))

    low, high = 0.0, 2 * math.log(longest)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if cut_mean(middle) < length else (low, middle)
    return low


@cache
def group_of(number: int, length: int, share: float) -> tuple[list[int], bool]:
    """Return the lengths of a group's responses, and whether it is informative."""
    draw = random.Random(f"group {number}")
    spread = math.hypot(SPREAD_OF_PROBLEMS, SPREAD_WITHIN)
    problem = draw.gauss()
    latent = CORRELATION * problem + math.sqrt(1 - CORRELATION**2) * draw.gauss()
    mu = location(length, spread, LONGEST) + SPREAD_OF_PROBLEMS * problem
    lengths = [min(LONGEST, max(1, round(math.exp(mu + SPREAD_WITHIN * draw.gauss())))) for _ in range(GROUP)]
    return lengths, latent > NORMAL.inv_cdf(1 - share)


# The simulation


@dataclass(eq=False)
class Answer:
    """One simulated response."""

    group: int
    tokens: int
    server: Server | None = None
    begun: float = 0.0  # the server's progress at that moment
    state: str = "waiting"  # then running, and finished or cancelled


@dataclass(eq=False)
class Server:
    """A simulated server: its responses get their tokens at the same pace, slower where there are many.

    Attributes:
        progress: tokens that a response has got that runs from the beginning.
        epoch: counts changes of the pace.
    """

    running: list[tuple[float, int, Answer]] = field(default_factory=list)  # heap: progress at the end
    clients: list[int] = field(default_factory=lambda: [0] * REPLICAS)  # running responses of each
    progress: float = 0.0
    updated: float = 0.0
    epoch: int = 0

    @property
    def busy(self) -> int:
        return sum(self.clients)

    def advance(self, now: float) -> None:
        """Bring `progress` up to date; called before the number of responses changes."""
        self.progress += (now - self.updated) / (TOKEN_SECONDS * (1 + self.busy / CAPACITY))
        self.updated = now


class Simulation:
    """One batch. Clients send what waits in order, to the server with the fewest responses of theirs."""

    def __init__(self, plan: InFlightPlan, first: int, length: int, share: float, shared: bool, fill: bool) -> None:
        self.plan, self.first, self.length, self.share, self.fill = plan, first, length, share, fill
        self.shared = shared
        self.capacity = CAPACITY // REPLICAS if shared else CAPACITY  # of one client at one server
        self.in_flight = [0] * REPLICAS  # requests of each client, those that wait included
        self.servers = [Server() for _ in range(SERVERS)]
        self.waiting: list[deque[Answer]] = [deque() for _ in range(REPLICAS)]
        self.groups: dict[int, list[Answer]] = {}
        self.outcomes: dict[int, bool] = {}
        self.upcoming = [first + (replica - first) % REPLICAS for replica in range(REPLICAS)]  # of each replica
        self.now, self.generated, self.serial = 0.0, 0, 0
        self.events: list[tuple[float, int, int]] = []
        self.passed, self.found = first, 0  # groups are accepted in order, and informative ones counted
        self.end: int | None = None  # first group behind the batch, once that is full

    def run(self) -> int:
        """Run until the batch is full; return its end. What is under way then counts as generated."""
        self.follow()
        while self.end is None:
            self.now, number, epoch = heapq.heappop(self.events)
            server = self.servers[number]
            if epoch != server.epoch:
                continue
            server.advance(self.now)
            _, _, answer = heapq.heappop(server.running)
            if answer.state == "running":
                self.leave(answer, "finished", answer.tokens)
                self.finish(answer.group)
                if self.begin_groups(answer.group % REPLICAS, *self.plan.decision):
                    self.dispatch(range(SERVERS))
                    continue
            self.dispatch([number])
        for answers in self.groups.values():
            self.cancel(answers)
        return self.end

    def finish(self, group: int) -> None:
        """Take in a finished response of a group."""
        if all(answer.state == "finished" for answer in self.groups[group]):
            self.outcomes[group] = group_of(group, self.length, self.share)[1]
            self.plan.add({group: self.outcomes[group]})
            while (outcome := self.outcomes.get(self.passed)) is not None and self.end is None:
                self.found, self.passed = self.found + outcome, self.passed + 1
                self.end = self.passed if self.found == NEEDED else None
            self.follow()

    def follow(self) -> None:
        """Cancel and begin what the plan says."""
        begin_before, useless_from = self.plan.decision
        if useless_from is not None:
            for group in [g for g in self.groups if g >= useless_from]:
                self.cancel(self.groups[group])
        for replica in range(REPLICAS):
            self.begin_groups(replica, begin_before, useless_from)
        self.dispatch(range(SERVERS))

    def begin_groups(self, replica: int, begin_before: int, useless_from: int | None) -> bool:
        """Begin what the plan wants of a replica's groups; with the present policy one group waits at most.

        Returns:
            Whether any was begun.
        """
        may_wait, before = not self.shared, self.upcoming[replica]
        while may_wait or self.in_flight[replica] < SERVERS * self.capacity + GROUP:
            group = self.upcoming[replica]
            if group >= begin_before and not (self.fill and useless_from is None):
                break
            self.groups[group] = [Answer(group, tokens) for tokens in group_of(group, self.length, self.share)[0]]
            self.waiting[replica].extend(self.groups[group])
            self.in_flight[replica] += GROUP
            self.upcoming[replica] += REPLICAS
        return self.upcoming[replica] > before

    def cancel(self, answers: Sequence[Answer]) -> None:
        """End those that are not finished."""
        for answer in answers:
            if answer.state == "running":
                assert answer.server is not None
                answer.server.advance(self.now)
                self.leave(answer, "cancelled", int(answer.server.progress - answer.begun))
            elif answer.state == "waiting":
                answer.state = "cancelled"
                self.in_flight[answer.group % REPLICAS] -= 1

    def leave(self, answer: Answer, state: str, tokens: int) -> None:
        """Take a response from its server."""
        assert answer.server is not None
        answer.state = state
        answer.server.clients[answer.group % REPLICAS] -= 1
        self.in_flight[answer.group % REPLICAS] -= 1
        self.generated += tokens

    def dispatch(self, changed: Sequence[int]) -> None:
        """Send what waits, while these servers have capacity."""
        for server in (self.servers[number] for number in changed):
            server.advance(self.now)
        progress = True
        while progress:  # one response of each client at a time, as they take turns
            progress = False
            for client, waiting in enumerate(self.waiting):
                while waiting and waiting[0].state != "waiting":
                    waiting.popleft()
                servers = (self.servers[number] for number in changed)
                free = [s for s in servers if s.clients[client] < self.capacity and s.busy < CAPACITY]
                if waiting and free:
                    self.begin(waiting.popleft(), min(free, key=lambda s: s.clients[client]))
                    progress = True
        for number in changed:
            self.schedule(number)

    def begin(self, answer: Answer, server: Server) -> None:
        """Run a response on a server."""
        answer.state, answer.server, answer.begun = "running", server, server.progress
        server.clients[answer.group % REPLICAS] += 1
        self.serial += 1
        heapq.heappush(server.running, (server.progress + answer.tokens, self.serial, answer))

    def schedule(self, number: int) -> None:
        """Note when the next response of a server is finished."""
        server = self.servers[number]
        server.epoch += 1
        while server.running and server.running[0][2].state != "running":
            heapq.heappop(server.running)
        if server.running:
            left = server.running[0][0] - server.progress
            seconds = max(0.0, left) * TOKEN_SECONDS * (1 + server.busy / CAPACITY)
            heapq.heappush(self.events, (self.now + seconds, number, server.epoch))


def simulate(policy: str, length: int, share: float, batches: int, fill: bool) -> list[dict[str, Any]]:
    """Return the figures of a first batch and `batches` further ones."""
    estimate, first, found = InformativeShare(NEEDED / MOST, weight=16), 0, []
    for _ in range(1 + batches):
        before = policy == "before"
        plan = (FixedWindow if before else InFlightPlan)(first, NEEDED, estimate, MOST)
        simulation = Simulation(plan, first, length, share, shared=not before, fill=fill and not before)
        end = simulation.run()
        used = sum(sum(group_of(group, length, share)[0]) for group in range(first, end))
        cancelled = 1 - used / simulation.generated
        figures = {"end": end, "cancelled": cancelled, "generated": simulation.generated, "seconds": simulation.now}
        found.append(figures)
        estimate, first = InformativeShare.of_batch(end - first, NEEDED), end
    return found
