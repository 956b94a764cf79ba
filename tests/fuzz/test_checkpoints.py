"""Checkpoints of any content: read, or refused by name; nothing runs, and no other file is opened."""

from __future__ import annotations

import json
import pickle
import pickletools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from megatron_fipo.convert import huggingface, untrusted
from megatron_fipo.convert.distributed import DistributedCheckpoint
from megatron_fipo.convert.huggingface import Checkpoint
from tests.convert.test_untrusted import EVIL, metadata, write
from tests.fuzz.inputs import Deep, json_values, refusal, texts

pytestmark = pytest.mark.slow  # two minutes for all targets

TENSORS = save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(3, dtype=torch.bfloat16)})
HEADER = json.loads(TENSORS[8 : 8 + int.from_bytes(TENSORS[:8], "little")])
index_values = st.one_of(
    json_values, st.fixed_dictionaries({"weight_map": st.dictionaries(texts, json_values, max_size=3)})
)


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(index_values, st.text(max_size=3))
@example({"weight_map": {"a": "../../secret.safetensors"}}, "")
@example({"weight_map": {}}, "")
@example({"weight_map": {"a": 3, "b": None}}, "")
@example({"weight_map": {"a": "model.safetensors", "b": "model.safetensors"}}, "")
@example(None, Deep())
def test_indexes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, index: Any, more: str) -> None:
    """An index of any JSON: the tensors are read or it is a ValueError, and no file outside is opened."""
    directory = tmp_path / "checkpoint"
    directory.mkdir(exist_ok=True)
    (tmp_path / "secret.safetensors").write_bytes(TENSORS)
    (directory / "model.safetensors").write_bytes(TENSORS)
    (directory / huggingface.INDEX).write_text(more or json.dumps(index))
    opened: list[Path] = []
    reads = huggingface.safe_open

    def safe_open(file: Path, **options: Any) -> Any:
        opened.append(Path(file).resolve())
        return reads(file, **options)

    with monkeypatch.context() as patch:
        patch.setattr(huggingface, "safe_open", safe_open)
        found: list[Checkpoint] = []
        said = refusal(lambda: found.append(Checkpoint(directory)))
    assert (said is None and found[0].shapes == {"a": (2, 3), "b": (3,)}) or str(directory) in str(said)
    assert {file.parent for file in opened} <= {directory.resolve()}


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(st.sampled_from(["a", "b", "c", "__metadata__"]), json_values, max_size=2), st.binary(max_size=9)
)
def test_headers(tmp_path: Path, changes: dict[str, Any], start: bytes) -> None:
    """A header with other entries, or with another start, is a ValueError or a checkpoint."""
    text = json.dumps(HEADER | changes).encode()
    data = len(text).to_bytes(8, "little") + text + bytes(30)
    (tmp_path / "model.safetensors").write_bytes(start + data[len(start) :])
    said = refusal(lambda: Checkpoint(tmp_path))
    assert said is None or "model.safetensors" in said


def _instructions(data: bytes) -> list[bytes]:
    positions = [position for _, _, position in pickletools.genops(data)]
    return [data[i:j] for i, j in zip(positions, [*positions[1:], len(data)], strict=True)]


PICKLES = [_instructions(pickle.dumps(metadata(), protocol)) for protocol in (0, 2, 4)]
PIECES = [
    *(
        b"N",
        b"}",
        b"]",
        b")",
        b"K\x01",
        b"(",
        b"b",
        b"R",
        b"\x81",
        b"s",
        b"u",
        b"a",
        b"e",
        b"0",
        b"2",
        b"t",
        b"\x85",
        b"\x86",
        b".",
    ),
    *(
        b"h\x00",
        b"q\x00",
        b"\x8c\x04evil",
        b"\x93",
        b"o",
        b"P1\n",
        b"Q",
        b"\x82\x01",
        b"I1000000\n",
        b"L1L\n",
        b"\x95" + bytes(8),
    ),
    *(b"X\xff\xff\xff\x7f", b"\x8e" + b"\xff" * 8, b"r\xff\xff\xff\x7f", b"G" + bytes(8), EVIL[:-1], b"\x97", b"\x98"),
    *(f"c{m}\n{n}\n".encode() for m, names in untrusted._METADATA_CLASSES.items() for n in names),
    *(b"cos\nsystem\n", b"cbuiltins\neval\n", b"ctorch\nbfloat16\n", b"ctorch\nload\n", b"cpathlib\nos\n"),
]
edits = st.lists(
    st.tuples(st.sampled_from(["insert", "delete", "replace", "swap"]), st.integers(0, 400), st.sampled_from(PIECES)),
    min_size=1,
    max_size=4,
)


def _state() -> dict[tuple[str, str], Any]:
    """Return the attributes of the allowed classes, functions and members of enumerations."""
    found: dict[tuple[str, str], Any] = {}
    for module, names in untrusted._METADATA_CLASSES.items():
        for name in names:
            value = getattr(__import__(module, fromlist=[name]), name)
            found[module, name] = dict(vars(value))
            for member in getattr(value, "__members__", {}).values():
                found[module, f"{name}.{member.name}"] = dict(vars(member))
    return found


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, len(PICKLES) - 1), edits)
def test_pickles(tmp_path: Path, which: int, changes: list[tuple[str, int, bytes]]) -> None:
    """Instructions put in, left out, replaced or swapped: metadata or a ValueError; all classes stay as they are."""
    instructions = list(PICKLES[which])
    for kind, place, piece in changes:
        place %= len(instructions)
        if kind == "insert":
            instructions.insert(place, piece)
        elif kind == "delete" and len(instructions) > 1:
            del instructions[place]
        elif kind == "replace":
            instructions[place] = piece
        elif kind == "swap":
            other = (place * 7 + 3) % len(instructions)
            instructions[place], instructions[other] = instructions[other], instructions[place]
    before = _state()
    said = refusal(lambda: DistributedCheckpoint(write(tmp_path, b"".join(instructions))))
    assert said is None or str(tmp_path) in said
    assert _state() == before
