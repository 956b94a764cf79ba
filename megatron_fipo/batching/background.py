"""Groups that are being sampled: on the first rank of a replica, in the background, without other ranks.

A response is sampled in one piece or, where it was paused, in several, each by the weights of its time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from megatron_fipo.batch import Rollouts
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

    def extend(self, response: Response, version: int, max_tokens: int) -> None:
        self.tokens += response.token_ids
        self.log_probs += response.log_probs
        self.versions += [version] * len(response.token_ids)
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
        )


class Discarded(NamedTuple):
    """Work that was begun and is not kept, as far as it is known: responses in flight do not tell their tokens."""

    groups: int = 0
    tokens: int = 0  # of finished responses


@dataclass(frozen=True)
class Target:
    """How far to sample without further instruction.

    Attributes:
        window: unfinished groups in flight.
        enough: groups to have in hand. Those that may be trained on count and, with `count_unfinished`, all that are
            under way.
        horizon: groups before this one are wanted in any case, since others behind them are in hand.
        limit: the first group that is not to be begun; None: there is none.
    """

    window: int
    enough: int
    count_unfinished: bool
    horizon: int = 0
    limit: int | None = None


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
        self._target: Target | None = None  # None: nothing is under way
        self._version = 0
        self._engine_version: int | None = None  # what the engine calls the weights it serves now
        self._error: BaseException | None = None

    # From the trainer's thread

    def start(self, prompts: Iterator[tuple[int, Prompt]], version: int, oldest: int, target: Target) -> int:
        """Continue the groups that are there, and begin new ones; return how many groups start over.

        Args:
            prompts: this replica's groups in order, without end.
            version: of the policy that the engine serves from now on.
            oldest: groups with a token of an older version start over.
        """
        return self._owner.submit(self._start, prompts, version, oldest, target).result()

    def set_target(self, target: Target) -> None:
        """Set another target for the batch in progress."""
        self._owner.submit(self._set_target, target).result()

    def take(self) -> tuple[dict[int, Rollouts], int, int]:
        """Return the groups scored since the last call, the number of unfinished ones, and the first one not yet begun.

        Raises:
            Exception: what went wrong in the background.
        """
        return self._owner.submit(self._take).result()

    def stop(self, behind: int, keep: bool) -> Discarded:
        """End the requests in flight, and forget all groups before `behind`.

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
        self._owner.submit(self._cancel).result()
        self._scorer.shutdown(wait=False, cancel_futures=True)
        self._owner.shutdown(wait=False, cancel_futures=True)

    # In the owner's thread

    def _start(self, prompts: Iterator[tuple[int, Prompt]], version: int, oldest: int, target: Target) -> int:
        self._prompts = (item for item in prompts if item[0] not in self._groups)
        self._upcoming = next(self._prompts)
        self._version, self._engine_version = version, None
        self._target = target
        too_old = [g for g in self._groups.values() if g.oldest_version is not None and g.oldest_version < oldest]
        for group in too_old:
            group.start_over()
        self._news = [n for n, group in self._groups.items() if group.scored is not None]
        self._guarded(self._continue_all)
        return len(too_old)

    def _continue_all(self) -> None:
        for group in self._in_order():
            self._continue(group)
        self._begin_more()

    def _in_order(self) -> list[Group]:
        return [self._groups[number] for number in sorted(self._groups)]

    def _set_target(self, target: Target) -> None:
        self._target = target
        self._guarded(self._begin_more)

    def _take(self) -> tuple[dict[int, Rollouts], int, int]:
        if self._error is not None:
            raise self._error
        news, self._news = self._news, []
        scored = {n: r for n in news if (r := self._groups[n].scored) is not None}
        assert self._upcoming is not None
        return scored, self._num_unfinished(), self._upcoming[0]

    def _begin_more(self) -> None:
        while self._error is None and self._target is not None and self._wants_more(self._target):
            assert self._upcoming is not None
            number, prompt = self._upcoming
            self._upcoming = next(self._prompts)
            self._groups[number] = group = Group(number, prompt, [PartialResponse() for _ in range(self._group_size)])
            self._continue(group)

    def _wants_more(self, target: Target) -> bool:
        assert self._upcoming is not None
        unfinished = self._num_unfinished()
        if unfinished >= target.window or (target.limit is not None and self._upcoming[0] >= target.limit):
            return False
        good = sum(g.scored is not None and g.informative for g in self._groups.values())
        in_hand = good + (unfinished if target.count_unfinished else 0)
        return in_hand < target.enough or self._upcoming[0] < target.horizon

    def _num_unfinished(self) -> int:
        return sum(group.scored is None for group in self._groups.values())

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
            self._begin_more()

    def _stop(self, behind: int, keep: bool) -> Discarded:
        self._target = None
        ahead = [g for g in self._groups.values() if g.number >= behind]
        if keep:
            self._pause(ahead)
            self._groups = {g.number: g for g in ahead}
            return Discarded()
        self._cancel()
        self._groups = {}
        return Discarded(len(ahead), sum(len(d.tokens) for g in ahead for d in g.responses))

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

    def _cancel(self) -> None:
        self._target = None
        for future in [f for group in self._groups.values() for f in group.requests.values()]:
            future.cancel()
        for group in self._groups.values():
            group.requests.clear()
