"""Free placement of a model on pipeline stages (`parallel.pipeline_layout`), in Megatron-Core's notation.

E is the embedding, t a decoder layer, L the LM head with its norm; `|` begins the next virtual stage, `*3` repeats the
letter, the `|` or the (group) before it, and commas between them mean nothing: `Et*3|(t*4|)*2,t*3L`. Virtual stage
c * stages + i is model chunk c of stage i. Whatever is accepted here, Megatron-Core reads in the same way. It accepts
more, which is refused here:

- E behind empty virtual stages and L before some: it builds the embedding on the first and the head on the last stage.
- `t*1,2`, read as 12 layers, and `(t)*2*3`, read as 4; a comma before `*`; digits that are not ASCII.
- m, the layers of multi-token prediction, which no model of this package has.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

_REPEAT = re.compile(r"\*([0-9]+)")
_LETTERS = "EtL|"
_MOST_LETTERS = 10_000  # of a layout written out; with more, a repetition is a mistake


@dataclass(frozen=True)
class _Letter:
    """A letter of the layout written out, and where it is in the setting, from 1."""

    letter: str
    position: int


def virtual_stage_layers(layout: str, num_layers: int, pipeline: int, virtual_pipeline: int) -> list[int]:
    """Return the decoder layers of each virtual stage; chunk c of stage i at c * pipeline + i.

    Raises:
        ValueError: the layout is not one of `num_layers` layers on these virtual stages; the message names the position
            in the layout, from 1.
    """
    letters = _written_out(layout)
    counts = _counts(letters)
    _check_stages(layout, len(counts), pipeline, virtual_pipeline)
    _check_end(layout, letters, "E", "the embedding", letters[:1], "first")
    _check_end(layout, letters, "L", "the LM head", letters[-1:], "last")
    if sum(counts) != num_layers:
        raise ValueError(f"{_named(layout)} has {sum(counts)} decoder layers (t), but the model has {num_layers}")
    return counts


def compact(layout: str) -> str:
    """Return the layers of each virtual stage as short text, which is safe in a file's name: `0.3x14.1`.

    Equal texts are equal layouts: E and L are always at the ends.

    Raises:
        ValueError: the text is not in this notation.
    """
    runs = [(count, len(list(run))) for count, run in groupby(_counts(_written_out(layout)))]
    return ".".join(str(count) if length == 1 else f"{count}x{length}" for count, length in runs)


def _counts(letters: Sequence[_Letter]) -> list[int]:
    counts = [0]
    for one in letters:
        if one.letter == "|":
            counts.append(0)
        counts[-1] += one.letter == "t"
    return counts


def _named(layout: str) -> str:
    return f"parallel.pipeline_layout {layout!r}"


def _check_stages(layout: str, count: int, pipeline: int, virtual_pipeline: int) -> None:
    if count != pipeline * virtual_pipeline:
        raise ValueError(
            f"{_named(layout)} has {count} virtual stages, but parallel.pipeline {pipeline} x virtual_pipeline "
            f"{virtual_pipeline} = {pipeline * virtual_pipeline}"
        )


def _check_end(
    layout: str, letters: Sequence[_Letter], letter: str, what: str, end: Sequence[_Letter], which: str
) -> None:
    """Check that a letter is there once, at its end."""
    found = [one.position for one in letters if one.letter == letter]
    if not found:
        raise ValueError(f"{_named(layout)} has no {letter}, {what}, which must be its {which} letter")
    if len(found) > 1:
        raise ValueError(f"{_named(layout)}: {letter}, {what}, must be there once, got it at positions {found}")
    if end[0].letter != letter:
        raise ValueError(
            f"{_named(layout)}: {letter}, {what}, must be the {which} letter, got it at position {found[0]} and "
            f"{end[0].letter} at position {end[0].position}"
        )


def _written_out(layout: str) -> list[_Letter]:
    """Return the letters with all repetitions written out."""
    letters = [letter for item in _items(layout, 0, len(layout), nested=False) for letter in item]
    if len(letters) > _MOST_LETTERS:
        raise ValueError(_too_many(layout))
    return letters


def _too_many(layout: str) -> str:
    return f"{_named(layout)} has more than {_MOST_LETTERS} letters when written out: lower its repetitions"


def _items(layout: str, start: int, end: int, nested: bool) -> Iterator[list[_Letter]]:
    """Yield the letters of each item in `layout[start:end]`: a letter or a group, as often as it is repeated."""
    at = start
    while at < end:
        letter, begin = layout[at], at
        at += 1
        if letter == ",":
            continue
        if letter == "(" and not nested:
            at = _group_end(layout, begin, end)
            item = [one for part in _items(layout, begin + 1, at - 1, nested=True) for one in part]
        elif letter in _LETTERS:
            item = [_Letter(letter, begin + 1)]
        else:
            raise ValueError(_wrong_letter(layout, begin, nested))
        repeat = _REPEAT.match(layout, at, end)
        if repeat is None and letter == "(":
            raise ValueError(f"{_named(layout)}: the group at position {begin + 1} must be repeated: (...)*2")
        if repeat is not None:
            at = repeat.end()
            if len(repeat[1].lstrip("0")) > 4 or len(item) * int(repeat[1]) > _MOST_LETTERS:
                raise ValueError(_too_many(layout))
            item = item * int(repeat[1])
        yield item


def _group_end(layout: str, begin: int, end: int) -> int:
    """Return the index behind the group's closing parenthesis."""
    close = layout.find(")", begin, end)
    if close < 0:
        raise ValueError(f"{_named(layout)}: the group at position {begin + 1} is not closed")
    if not layout[begin + 1 : close].strip(","):
        raise ValueError(f"{_named(layout)}: the group at position {begin + 1} is empty")
    return close + 1


def _wrong_letter(layout: str, at: int, nested: bool) -> str:
    letter = layout[at]
    reason = "must be E, t, L, |, a comma, or (...)*2"
    if letter == "m":
        reason = "is a layer of multi-token prediction, which this model has not"
    elif letter == "*":
        reason = "must follow a letter, | or (group), with a number behind it"
    elif letter == "(" and nested:
        reason = "begins a group inside a group, which Megatron-Core cannot read"
    return f"{_named(layout)}: {letter!r} at position {at + 1} {reason}"
