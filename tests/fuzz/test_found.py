"""Faults that fuzzing has found, as tests that always run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from megatron_fipo.checkpoint.files import DamagedError, Marker
from megatron_fipo.config import load_config
from megatron_fipo.convert.huggingface import INDEX, Checkpoint
from megatron_fipo.convert.staging import MANIFEST, check_sizes
from megatron_fipo.data import prepare
from megatron_fipo.launch import attempts
from megatron_fipo.machine import hosts
from megatron_fipo.rollout import Request, Sampling
from megatron_fipo.rollout.vllm import ServedModel
from megatron_fipo.rollout.vllm.answer import Fault, read
from megatron_fipo.scaling.measure.row_reader import parse_row, read_rows
from tests.fuzz.inputs import Deep
from tests.support.studies import make_row

DEEP = Deep()
SAMPLING = Sampling(1.0, 1.0, 0, 4, (9,))
REQUEST, MODEL = Request([3], seed=1), ServedModel(50)
CHOICE: dict[str, Any] = {
    "token_ids": [1, 9],
    "logprobs": {"content": [{"logprob": -0.5}, {"logprob": -1}]},
    "finish_reason": "stop",
    "weight_versions": [{"version": "run-3"}],
}


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({}, "contains no tensors"),
        ({"a": 3}, "names 3 for a, expected the name of a file beside it"),
        ({"a": "../x.safetensors"}, "names '../x.safetensors' for a"),
        ({"a": ".."}, r"names '\.\.' for a"),
        ([], "is not a valid index of safetensors files"),
    ],
)
def test_indexes(tmp_path: Path, places: Any, message: str) -> None:
    """An index names files beside it, and at least one."""
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": places}))
    with pytest.raises(ValueError, match=message):
        Checkpoint(tmp_path)


def test_deep_json(tmp_path: Path) -> None:
    """JSON that is nested more deeply than Python calls functions is damage like any other."""
    for name in ("complete.json", INDEX, MANIFEST, "metrics.jsonl", "questions.jsonl"):
        (tmp_path / name).write_text(DEEP)
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "x.json").write_text(DEEP)
    with pytest.raises(DamagedError, match="cannot be read"):
        Marker.read(tmp_path, 1)
    with pytest.raises(ValueError, match="is not a valid index of safetensors files"):
        Checkpoint(tmp_path)
    with pytest.raises(ValueError, match="is damaged"):
        check_sizes(tmp_path)
    with pytest.raises(ValueError, match="is not JSON"):
        prepare(tmp_path / "questions.jsonl", tmp_path / "out.parquet")
    with pytest.raises(ValueError, match=r"no measured rows in .*x\.json is skipped"):
        read_rows(tmp_path)
    assert attempts.read(tmp_path / "metrics.jsonl") == []
    assert attempts.training_progress(tmp_path).number == 1


def test_metrics_that_are_no_text(tmp_path: Path) -> None:
    """Bytes that a lost node left behind the last whole row do not keep a job from being requeued."""
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 4}\n\xff\xfe\n{"step": 1e999}\n')
    assert attempts.training_progress(tmp_path).number == 5


@pytest.mark.parametrize("text", ["a[0-999999999]", "a[0-9999]b[0-9999]", "a[0-99]b[0-99]c[0-99]", "a[0-65536]"])
def test_lists_of_too_many_hosts(text: str) -> None:
    """They are refused before they are written out."""
    with pytest.raises(ValueError, match="names more than 65536 hosts"):
        hosts.expand_hosts(text)


@pytest.mark.parametrize("text", ["a[x]", "a[1", "a[1-2-3]", "a[]", "a[1-]", "a[²]"])
def test_lists_of_no_hosts(text: str) -> None:
    """Brackets hold numbers and ranges of them."""
    with pytest.raises(ValueError, match="is not a list of hosts"):
        hosts.expand_hosts(text)


def test_no_gpu_a_server(tmp_path: Path) -> None:
    """rollout.server.tensor_parallel_size=0 is named, where nodes are given, too."""
    (tmp_path / "config.yaml").write_text("model: {hf_path: base}\ndata: {train: train.parquet}\n")
    overrides = ["rollout.engine=vllm", "rollout.server.placement=disaggregated", "rollout.server.nodes=[a]"]
    with pytest.raises(ValueError, match=r"rollout\.server\.tensor_parallel_size = 0"):
        load_config(tmp_path / "config.yaml", [*overrides, "rollout.server.tensor_parallel_size=0"])


@pytest.mark.parametrize(
    "changes",
    [
        {"token_ids": [1, 50]},
        {"token_ids": [-1, 9]},
        {"token_ids": [True, 9]},
        {"token_ids": ["1", "9"]},
        {"token_ids": 3},
        {"token_ids": [1] * 5, "logprobs": {"content": [{"logprob": 0}] * 5}},
        {"logprobs": {"content": [{"logprob": "x"}, {"logprob": -1}]}},
        {"logprobs": {"content": [{"logprob": 10**400}, {"logprob": -1}]}},
        {"weight_versions": [{"version": None}]},
        {"weight_versions": [{"version": ["run-3"]}]},
        {"finish_reason": ["stop"]},
    ],
)
def test_answers_of_a_server(changes: dict[str, Any]) -> None:
    """Tokens outside of the vocabulary, too many of them, and values of other types are faults: another attempt is
    made."""
    right = httpx.Response(200, json={"choices": [CHOICE]})
    assert read(right, REQUEST, SAMPLING, "run-3", False, MODEL).token_ids == [1, 9]
    text = json.dumps({"choices": [{**CHOICE, **changes}]})
    with pytest.raises(Fault):
        read(httpx.Response(200, text=text), REQUEST, SAMPLING, "run-3", False, MODEL)


def test_numbers_beyond_all_measurements() -> None:
    """1e308 seconds cannot be drawn, and neither can 2,000 stages of a timeline: both are unknown, and named."""
    row = make_row()
    stages = row["timeline"]["stages"] * 1000
    found, problems = parse_row({**row, "seconds": 1e308, "timeline": {"chunks": 1, "stages": stages}})
    assert (found.seconds, found.timeline) == (None, None)
    assert problems == ["seconds is 1e+308", "timeline is invalid: chunks must be at least 1, and stages 1 to 512"]
    with pytest.raises(ValueError, match="gpus must be an integer of at least 1, got 1000000000000000000000"):
        parse_row({**row, "gpus": 10**21})
