"""`parallel.pipeline_layout`: read as Megatron-Core reads it, accepted where it is, and refused by position."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from megatron_fipo.config import ParallelConfig
from megatron_fipo.scaling.cost.model_shapes import shape_of
from megatron_fipo.scaling.planner.legal_layouts import layout_problems as planner_problems
from megatron_fipo.shapes.layout import layout_problems, stage_layers, virtual_stage_layers
from megatron_fipo.shapes.pipeline_layout import compact
from tests.shapes.test_layout import ARCH


def _parallel(layout: str, pipeline: int, virtual: int = 1) -> ParallelConfig:
    return ParallelConfig(world_size=pipeline, pipeline=pipeline, virtual_pipeline=virtual, pipeline_layout=layout)


def _ours(layout: str, layers: int, pipeline: int, virtual: int) -> list[int] | None:
    """Layers of each virtual stage, with what `train` and the planner say; None where all of them refuse."""
    p, arch = _parallel(layout, pipeline, virtual), replace(ARCH, num_layers=layers)
    try:
        counts = virtual_stage_layers(layers, p)
    except ValueError:
        counts = None
    assert bool(layout_problems(arch, p)) == (counts is None)
    assert bool(planner_problems(shape_of(arch), p)) == (counts is None)
    return counts


def _megatrons(layout: str, layers: int, pipeline: int, virtual: int) -> tuple[list[int] | None, bool]:
    """The same of Megatron-Core, and whether it has the embedding on the first and the head on the last stage."""
    try:
        read = PipelineParallelLayerLayout(layout, pipeline)
        read.validate_layer_layout(layers, None)
    except (AssertionError, IndexError):
        return None, False
    if read.virtual_pipeline_model_parallel_size != virtual:
        return None, False
    stages = [read.layout[stage][chunk] for chunk in range(virtual) for stage in range(pipeline)]
    at_ends = LayerType.embedding in stages[0] and LayerType.loss in stages[-1]
    return [stage.count(LayerType.decoder) for stage in stages], at_ends


def _agree(layout: str, layers: int, pipeline: int, virtual: int) -> bool:
    """Check that both read a layout alike, or that both refuse it; return whether they accept it."""
    read, at_ends = _megatrons(layout, layers, pipeline, virtual)
    assert _ours(layout, layers, pipeline, virtual) == (read if at_ends else None), (layout, layers, pipeline, virtual)
    return at_ends


def test_every_short_layout() -> None:
    """All strings of up to six letters, for all models of up to four layers on up to four virtual stages, with the one
    difference that ends without embedding or head are refused."""
    accepted = 0
    for length in range(7):
        for letters in itertools.product("EtL|", repeat=length):
            layout = "".join(letters)
            stages = layout.count("|") + 1
            if stages > 4:
                continue
            for pipeline in [n for n in (2, 3, 4, stages) if stages % n == 0 and (n > 1 or stages == 1)]:
                accepted += _agree(layout, layout.count("t"), pipeline, stages // pipeline)
            assert not _agree(layout, layout.count("t") + 1, stages, 1)
            assert not _agree(layout, layout.count("t"), 5, 1)
    assert 40 < accepted < 200


@st.composite
def _written(draw: st.DrawFn) -> tuple[str, str]:
    """A layout with repetitions, groups and commas, and the same written out."""
    short, out = "", ""
    for _ in range(draw(st.integers(0, 6))):
        inner_short, inner = draw(_PART)
        count = draw(st.integers(0, 12))
        if draw(st.booleans()):
            short, out = short + f"({inner_short})*{count}", out + inner * count
        else:
            short, out = short + inner_short, out + inner
        short += draw(st.sampled_from(["", "", ","]))
    start, end = draw(st.sampled_from([("E", "L")] * 6 + [("", "L"), ("E", ""), ("tE", "L"), ("E", "Lt"), ("EE", "L")]))
    return start + short + end, start + out + end


def _repeated() -> Iterator[tuple[str, str]]:
    for letter in "t|":
        yield from [(letter, letter), (letter + ",", letter)]
        yield from [(f"{letter}*{count}", letter * count) for count in (0, 1, 2, 3, 10)]


_PART = st.lists(st.sampled_from(list(_repeated())), min_size=1, max_size=3).map(
    lambda parts: ("".join(short for short, _ in parts).rstrip(","), "".join(out for _, out in parts))
)


@given(_written())
def test_repetitions_and_groups(layout: tuple[str, str]) -> None:
    """Letters, groups and commas; both read it as what it says written out."""
    short, out = layout
    stages = out.count("|") + 1
    for pipeline in {n for n in (2, 4, stages) if stages % n == 0}:
        at = out.count("t"), pipeline, stages // pipeline
        assert _agree(short, *at) == _agree(out, *at)


@given(st.text("EtL|,()*012m ", max_size=14))
def test_what_is_accepted_is_read_alike(text: str) -> None:
    """Any string: what is accepted here, Megatron-Core accepts and reads in the same way."""
    for layers, stages in itertools.product(range(4), (1, 2, 3)):
        found = _ours(f"E{text}L", layers, stages, 1)
        assert found is None or found == _megatrons(f"E{text}L", layers, stages, 1)[0]


@pytest.mark.parametrize(
    ("layout", "layers"),
    [
        ("|Et*4L", 4),  # the embedding is built on the first stage nevertheless
        ("Et*4L|", 4),
        ("Et*1,2|L", 12),
        ("E(t)*2*3|L", 4),
        ("Et,*4|L", 4),
        ("Et*\u0664|L", 4),  # an Arabic digit
        ("E((t)*0t*4|L", 4),
    ],
)
def test_megatron_accepts_more(layout: str, layers: int) -> None:
    """Megatron-Core takes these layouts for two stages, which are refused here."""
    read, _ = _megatrons(layout, layers, 2, 1)
    assert read is not None
    assert sum(read) == layers
    assert _ours(layout, layers, 2, 1) is None


@pytest.mark.parametrize(
    ("layout", "says"),
    [
        ("Et*2|tXtL", "'X' at position 7 must be E, t, L, |, a comma, or (...)*2"),
        ("Et*2| t*2L", "' ' at position 6 must be"),
        ("Et*2|t*2mL", "'m' at position 9 is a layer of multi-token prediction, which this model has not"),
        ("Et*|t*3L", "'*' at position 3 must follow a letter, | or (group), with a number behind it"),
        ("E(t|(t)*2)*1tL", "'(' at position 5 begins a group inside a group"),
        ("E(t*4|L", "the group at position 2 is not closed"),
        ("E()*2t*4|L", "the group at position 2 is empty"),
        ("E(t*4)|L", "the group at position 2 must be repeated: (...)*2"),
        ("Et*4L", "has 1 virtual stages, but parallel.pipeline 2 x virtual_pipeline 1 = 2"),
        ("Et|t|t|tL", "has 4 virtual stages, but parallel.pipeline 2 x virtual_pipeline 1 = 2"),
        ("Et*2|t*3L", "has 5 decoder layers (t), but the model has 4"),
        ("t*2|t*2L", "has no E, the embedding, which must be its first letter"),
        ("Et*2|t*2", "has no L, the LM head, which must be its last letter"),
        ("Et*2|Et*2L", "E, the embedding, must be there once, got it at positions [1, 6]"),
        ("Et*2L|t*2L", "L, the LM head, must be there once, got it at positions [5, 10]"),
        ("tE|t*3L", "E, the embedding, must be the first letter, got it at position 2 and t at position 1"),
        ("Et*3L|t", "L, the LM head, must be the last letter, got it at position 5 and t at position 7"),
        ("Et*99999|L", "has more than 10000 letters when written out: lower its repetitions"),
        ("E(t*9999)*9999|L", "has more than 10000 letters when written out"),
        ("E(t*9999)*1(t*9999)*1|L", "has more than 10000 letters when written out"),
    ],
)
def test_refusals(layout: str, says: str) -> None:
    """The message has the layout, and the position that is wrong."""
    with pytest.raises(ValueError, match=r"^parallel\.pipeline_layout ") as refused:
        virtual_stage_layers(4, _parallel(layout, 2))
    assert repr(layout) in str(refused.value)
    assert says in str(refused.value)


def test_stages_are_the_sums_of_their_chunks() -> None:
    """Chunk c of stage i is virtual stage c x stages + i."""
    p = _parallel("Et|t*2|t*3|t*2L", 2, 2)
    assert virtual_stage_layers(8, p) == [1, 2, 3, 2]
    assert stage_layers(8, p) == [4, 4]


def test_compact() -> None:
    """Runs of equal stages are one entry."""
    assert compact("E(|t*3)*14|tL") == "0.3x14.1"
    assert compact("Et*4L") == "4"
