"""Routing in a server's answer: what is right is read, and nothing else."""

from __future__ import annotations

import base64
import io
import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_fipo.model.architecture import architecture, load_hf_config
from megatron_fipo.rollout.routing import decode
from megatron_fipo.shapes.architecture import Architecture
from tests.support.families import make_checkpoint

INPUTS, LAYERS, ACTIVE = 5, 3, 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Architecture:
    path = make_checkpoint(tmp_path_factory.mktemp("moe"), "qwen3_moe", num_hidden_layers=LAYERS)
    return architecture(load_hf_config(str(path), {}))


def _with(model: Architecture, count: int) -> Architecture:
    assert model.experts is not None
    return replace(model, experts=replace(model.experts, count=count, active=ACTIVE))


def _text(array: np.ndarray[Any, Any], allow_pickle: bool = False) -> str:
    with io.BytesIO() as file:
        np.save(file, array, allow_pickle=allow_pickle)
        return base64.b64encode(file.getvalue()).decode()


def _routing(experts: int, dtype: type = np.uint8) -> np.ndarray[Any, Any]:
    """Different experts for each token, the last one among them."""
    generator = np.random.default_rng(experts)
    rows = [generator.permutation(experts)[:ACTIVE] for _ in range(INPUTS * LAYERS)]
    rows[0][0] = rows[1][2] = experts - 1
    rows[0][1:], rows[1][:2], rows[1][3] = (0, 1, 2), (3, 0), 1
    return np.array(rows, dtype).reshape(INPUTS, LAYERS, ACTIVE)


@pytest.mark.parametrize(
    ("experts", "given", "kept"),
    [
        (6, np.uint8, torch.int8),
        (128, np.uint8, torch.int8),
        (129, np.uint8, torch.int16),
        (300, np.uint16, torch.int16),
    ],
)
def test_experts_of_any_number(model: Architecture, experts: int, given: type, kept: torch.dtype) -> None:
    """Every expert's number arrives, in the fewest bytes."""
    routing = _routing(experts, given)
    found = decode(_text(routing), INPUTS, _with(model, experts))
    assert found.dtype == kept
    assert found.tolist() == routing.tolist()


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("a pickle was loaded",))


def _header_of_a_huge_array() -> str:
    data = base64.b64decode(_text(_routing(6)))
    return base64.b64encode(data.replace(b"(5, 3, 4)", b"(9999999999999, 3, 4)")).decode()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        (17, "cannot be read"),
        ("", "cannot be read"),
        ("no base64!", "cannot be read"),
        (base64.b64encode(pickle.dumps(_Evil())).decode(), "cannot be read"),
        (_text(np.array([_Evil()], object), allow_pickle=True), "cannot be read"),
        (_text(_routing(6))[:-8], "cannot be read"),
        (_header_of_a_huge_array(), "cannot be read"),
        (_text(_routing(6).astype(np.float32)), r"float32 \[5, 3, 4\], expected whole numbers \[5, 3, 4\]"),
        (_text(_routing(6).astype(np.int8)), r"int8 \[5, 3, 4\]"),
        (_text(_routing(6)[1:]), r"uint8 \[4, 3, 4\], expected"),
        (_text(_routing(6)[:, :2]), r"uint8 \[5, 2, 4\], expected"),
        (_text(_routing(6)[..., :3]), r"uint8 \[5, 3, 3\], expected"),
        (_text(_routing(7)), "routing to expert 6, but experts are 0 to 5"),
        (_text(np.zeros((INPUTS, LAYERS, ACTIVE), np.uint8)), "to the same expert twice"),
    ],
)
def test_anything_else_is_refused(model: Architecture, text: Any, message: str) -> None:
    """Nothing is executed, and no memory is taken that the answer does not fill."""
    with pytest.raises(ValueError, match=message):
        decode(text, INPUTS, _with(model, 6))
