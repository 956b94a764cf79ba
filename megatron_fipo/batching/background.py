"""Groups that are being sampled: on the first rank of a replica, in the background, without other ranks.

A response is sampled in one piece or, where it was paused, in several, each by the weights of its time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch

from megatron_fipo.batch import Rollouts
from megatron_fipo.batching.plan import InFlightPlan
from megatron_fipo.data import Prompt
from megatron_fipo.rollout.protocol import PausingEngine, Request, Response, Sampling, StreamingEngine


@dataclass
class PartialResponse:
    """A partial response."""

    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)  # policy version of each token
    finished: bool = False
    truncated: bool = False
    routing: torch.Tensor | None = None  # of each input, as it was when the piece that it belongs to was sampled

    def extend(self, response: Response, version: int, max_tokens: int) -> None:
        self.tokens += response.token_ids
        self.log_probs += response.log_probs
        self.versions += [version] * len(response.token_ids)
        if self.routing is None:
            self.routing = response.routing
        elif response.routing is not None:  # the inputs of earlier pieces were computed again, with newer weights
            self.routing = torch.cat([self.routing, response.routing[len(self.routing) :]])
        # A pause may come right after the last token that is allowed.
        full = response.unfinished and len(self.tokens) >= max_tokens
        self.finished = not response.unfinished or full
        self.truncated = response.truncated or full


@dataclass(eq=False)
class Group:
    """All responses to one prompt."""

    number: int
    prompt: Prompt
    responses: list[PartialResponse]
    requests: dict[int, Future[Response]] = field(default_factory=dict)  # by place in the group, while under way
    scored: Rollouts | None = None
    informative: bool = False  # once scored: whether it may be trained on

    @property
    def finished(self) -> bool:
        return all(response.finished for response in self.responses)

    @property
    def oldest_version(self) -> int | None:
        return min((response.versions[0] for response in self.responses if response.versions), default=None)

    @property
    def num_tokens(self) -> int:
        """Number of tokens of responses, and of parts of responses, that have arrived."""
        return sum(len(response.tokens) for response in self.responses)

    def start_over(self) -> None:
        self.responses = [PartialResponse() for _ in self.responses]
        self.scored = None

    def rollouts(self) -> Rollouts:
        size = len(self.responses)
        return Rollouts.from_responses(
            ids=[self.number * size + i for i in range(size)],
            prompts=[self.prompt.token_ids] * size,
            responses=[d.tokens for d in self.responses],
            log_probs=[d.log_probs for d in self.responses],
            truncated=[d.truncated for d in self.responses],
            weight_versions=[d.versions for d in self.responses],
            routing=[d.routing for d in self.responses],
        )


class Discarded(NamedTuple):
    """Work that was begun and is not kept.

    Attributes:
        cancelled_groups: groups that were begun and are in no batch.
        cancelled_tokens: their tokens; of responses in flight as far as the engine knows.
        groups_too_old: groups that started over since they had tokens of too old a version.
        tokens_too_old: their tokens.
    """

    cancelled_groups: int = 0
    cancelled_tokens: int = 0
    groups_too_old: int = 0
    tokens_too_old: int = 0


class GroupSampler:
    """Samples and scores this replica's groups.

    One thread owns all that changes; the engine's callbacks and the public methods only send it work. Another one
    scores.

    Args:
        seed: of a response's next piece, by its id and the tokens it has.
        score: a drawn group's responses with rewards; runs in the scoring thread.
        informative: whether scored responses may be trained on.
    """

    def __init__(
        self,
        engine: StreamingEngine,
        sampling: Sampling,
        group_size: int,
        seed: Callable[[int, int], int],
        score: Callable[[Group], Rollouts],
        informative: Callable[[Rollouts], bool],
    ) -> None:
        self._engine = engine
        self._sampling = sampling
        self._group_size = group_size
        self._seed = seed
        self._score = score
        self._informative = informative
        self._owner = ThreadPoolExecutor(1, thread_name_prefix="groups")
        self._scorer = ThreadPoolExecutor(1, thread_name_prefix="scores")
        self._groups: dict[int, Group] = {}
        self._prompts: Iterator[tuple[int, Prompt]] = iter(())
        self._upcoming: tuple[int, Prompt] | None = None
        self._news: list[int] = []
        self._plan: InFlightPlan | None = None  # None: nothing is under way
        self._capacity = 0
        self._discarded = Discarded()  # since the batch was begun
        self._version = 0
        self._engine_version: int | None = None  # what the engine calls the weights it serves now
        self._error: BaseException | None = None

    # From the trainer's thread

    def start(
        self, prompts: Iterator[tuple[int, Prompt]], version: int, oldest: int, plan: InFlightPlan, capacity: int
    ) -> None:
        """Continue the groups that are there, and begin new ones.

        Args:
            prompts: this replica's groups in order, without end.
            version: of the policy that the engine serves from now on.
            oldest: groups with a token of an older version start over.
            plan: of the batch; owned by this sampler from now on.
            capacity: requests that the engine samples at a time. Hardly more are sent, since fewer may be wanted when
                it is their turn.
        """
        self._owner.submit(self._start, prompts, version, oldest, plan, capacity).result()

    def join(self, outcomes: Mapping[int, bool]) -> None:
        """Take in which groups of all replicas were finished, and whether they are informative."""
        self._owner.submit(self._join, outcomes).result()

    def take(self) -> dict[int, Rollouts]:
        """Return the groups scored since the last call.

        Raises:
            Exception: what went wrong in the background.
        """
        return self._owner.submit(self._take).result()

    def stop(self, behind: int, keep: bool) -> Discarded:
        """End the requests in flight, forget all groups before `behind`, and return what the batch has discarded.

        Args:
            keep: groups from `behind` on stay, paused where they are unfinished. Needs a `PausingEngine`.
        """
        return self._owner.submit(self._stop, behind, keep).result()

    def groups(self) -> list[Group]:
        """Return the groups that are kept while nothing is in flight, in order."""
        return self._owner.submit(self._in_order).result()

    def restore(self, groups: Sequence[Group]) -> None:
        """Take groups that `groups` returned, before the first `start`."""
        for group in groups:
            group.informative = group.scored is not None and self._informative(group.scored)
        self._groups = {group.number: group for group in groups}

    def close(self) -> None:
        """Cancel the requests in flight, without waiting for their end."""
        self._owner.submit(self._close).result()
        self._scorer.shutdown(wait=False, cancel_futures=True)
        self._owner.shutdown(wait=False, cancel_futures=True)

    # In the owner's thread

    def _start(
        self, prompts: Iterator[tuple[int, Prompt]], version: int, oldest: int, plan: InFlightPlan, capacity: int
    ) -> None:
        self._prompts = (item for item in prompts if item[0] not in self._groups)
        self._upcoming = next(self._prompts)
        self._version, self._engine_version = version, None
        too_old = [g for g in self._groups.values() if g.oldest_version is not None and g.oldest_version < oldest]
        self._discarded = Discarded(groups_too_old=len(too_old), tokens_too_old=sum(g.num_tokens for g in too_old))
        for group in too_old:
            group.start_over()
        self._news = [n for n, group in self._groups.items() if group.scored is not None]
        plan.add({n: self._groups[n].informative for n in self._news})
        self._plan, self._capacity = plan, capacity
        self._guarded(self._continue_all)

    def _continue_all(self) -> None:
        for group in self._in_order():
            self._continue(group)
        self._follow_plan()

    def _in_order(self) -> list[Group]:
        return [self._groups[number] for number in sorted(self._groups)]

    def _join(self, outcomes: Mapping[int, bool]) -> None:
        if self._plan is not None:
            self._plan.join(outcomes)
            self._guarded(self._follow_plan)

    def _take(self) -> dict[int, Rollouts]:
        if self._error is not None:
            raise self._error
        news, self._news = self._news, []
        groups = [group for n in news if (group := self._groups.get(n)) is not None]  # others were cancelled
        return {group.number: group.scored for group in groups if group.scored is not None}

    def _follow_plan(self) -> None:
        """Cancel what cannot come into the batch any more, and begin what is wanted and need not wait for long."""
        if self._plan is None or self._error is not None:
            return
        begin_before, useless_from = self._plan.decision
        if useless_from is not None:
            self._cancel([group for group in self._groups.values() if group.number >= useless_from])
        assert self._upcoming is not None
        at_most = self._capacity + self._group_size  # one group waits, so that no place is free in the meantime
        while self._error is None and self._upcoming[0] < begin_before and self._num_requests < at_most:
            number, prompt = self._upcoming
            self._upcoming = next(self._prompts)
            self._groups[number] = group = Group(number, prompt, [PartialResponse() for _ in range(self._group_size)])
            self._continue(group)

    @property
    def _num_requests(self) -> int:
        return sum(len(group.requests) for group in self._groups.values())

    def _continue(self, group: Group) -> None:
        """Request the responses that a group lacks."""
        if group.scored is not None:
            return
        for place, response in enumerate(group.responses):
            if not response.finished:
                self._draw(group, place, response)
        self._score_if_drawn(group)

    def _draw(self, group: Group, place: int, response: PartialResponse) -> None:
        have = len(response.tokens)
        seed = self._seed(group.number * self._group_size + place, have)
        request = Request([*group.prompt.token_ids, *response.tokens], seed)
        sampling = self._sampling
        if have:
            sampling = Sampling(**{**vars(sampling), "max_tokens": sampling.max_tokens - have})
        future = self._engine.submit(request, sampling)
        group.requests[place] = future
        future.add_done_callback(partial(self._send, self._drawn, group, place))

    def _send(self, work: Callable[..., None], *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # closed meanwhile
            self._owner.submit(self._guarded, work, *arguments)

    def _guarded(self, work: Callable[..., None], *arguments: Any) -> None:
        """Do the work; an error is raised at the next `take`, where all ranks learn of it."""
        try:
            work(*arguments)
        except Exception as error:
            self._error = self._error or error

    def _drawn(self, group: Group, place: int, future: Future[Response]) -> None:
        """Take in a response, or a part of it. Called a second time for what `_stop` has taken in."""
        if group.requests.get(place) is not future:
            return
        del group.requests[place]
        response = future.result()
        self._check_version(response)
        group.responses[place].extend(response, self._version, self._sampling.max_tokens)
        self._score_if_drawn(group)
        self._follow_plan()

    def _check_version(self, response: Response) -> None:
        """Check that everything sampled between two updates was sampled with the same weights."""
        for number in response.weight_versions:
            if self._engine_version is None:
                self._engine_version = number
            if number != self._engine_version:
                raise RuntimeError(
                    f"the rollout engine sampled a response with its weights number {number} and others with number "
                    f"{self._engine_version}, although there was no update between them"
                )

    def _score_if_drawn(self, group: Group) -> None:
        if group.finished and not group.requests:
            self._scorer.submit(self._score, group).add_done_callback(partial(self._send, self._scored, group))

    def _scored(self, group: Group, future: Future[Rollouts]) -> None:
        if self._groups.get(group.number) is group and group.scored is None and not future.cancelled():
            group.scored = future.result()
            group.informative = self._informative(group.scored)
            self._news.append(group.number)
            if self._plan is not None:
                self._plan.add({group.number: group.informative})
            self._follow_plan()

    def _stop(self, behind: int, keep: bool) -> Discarded:
        self._plan = None
        ahead = [g for g in self._groups.values() if g.number >= behind]
        if keep:
            self._pause(ahead)
            self._groups = {g.number: g for g in ahead}
        else:
            self._cancel(ahead)
            self._groups = {}
        return self._discarded

    def _pause(self, groups: Sequence[Group]) -> None:
        assert isinstance(self._engine, PausingEngine)
        requests = [(g, place, future) for g in groups for place, future in g.requests.items()]
        futures = [future for _, _, future in requests]
        if futures:
            self._engine.pause(futures)
            wait(futures)
        for request in requests:
            self._drawn(*request)
        self._scorer.submit(lambda: None).result()  # what is drawn is scored; `_scored` comes next in this thread

    def _cancel(self, groups: Sequence[Group]) -> None:
        """Cancel groups, and count what is lost."""
        if not groups:
            return
        tokens = sum(group.num_tokens for group in groups) + self._cancel_requests(groups)
        for group in groups:
            del self._groups[group.number]
        before = self._discarded
        self._discarded = before._replace(
            cancelled_groups=before.cancelled_groups + len(groups), cancelled_tokens=before.cancelled_tokens + tokens
        )

    def _cancel_requests(self, groups: Sequence[Group]) -> int:
        """Cancel requests in flight; return the number of tokens that their responses have."""
        futures = [future for group in groups for future in group.requests.values()]
        for group in groups:
            group.requests.clear()  # so that `_drawn` ignores them
        arrived = [future.result() for future in futures if _has_response(future)]
        in_flight = [future for future in futures if not future.done()]
        return sum(len(r.token_ids) for r in arrived) + (self._engine.cancel(in_flight) if in_flight else 0)

    def _close(self) -> None:
        self._plan = None
        for group in self._groups.values():
            for future in group.requests.values():
                future.cancel()
            group.requests.clear()


def _has_response(future: Future[Response]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is None
