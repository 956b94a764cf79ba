"""`megatron-fipo convert`: what it prints and how it ends."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from megatron_fipo import cli
from tests.support.families import make_checkpoint
from tests.support.policies import save_tokenizer


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = make_checkpoint(tmp_path / "hf", "qwen3", num_hidden_layers=1)
    save_tokenizer(path)
    return path


def _run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["megatron-fipo", "convert", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def test_there_and_back_and_verified(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 0 all along; tokenizer and config arrive; logits are compared on request."""
    megatron, back = tmp_path / "megatron", tmp_path / "back"
    assert _run(monkeypatch, "to-megatron", "--hf", source, "--out", megatron) == 0
    assert _run(monkeypatch, "to-hf", "--megatron", megatron, "--out", back, "--dtype", "bf16") == 0
    assert "names and shapes are those of its config" in capsys.readouterr().out
    assert (back / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert _run(monkeypatch, "verify", "--hf", source, "--megatron", megatron, "--logits", "1+2=") == 0
    out = capsys.readouterr().out
    assert "logits of 4 tokens differ by up to" in out
    assert "the checkpoints are the same model" in out


def test_difference_is_exit_code_1(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The output names the tensor."""
    assert _run(monkeypatch, "to-megatron", "--hf", source, "--out", tmp_path / "megatron") == 0
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][3] += 1.0
    save_file(tensors, source / "model.safetensors")
    assert _run(monkeypatch, "verify", "--hf", source, "--megatron", tmp_path / "megatron") == 1
    assert "model.norm.weight: 1 of 64 elements differ, by up to 1 (float32)" in capsys.readouterr().out


def test_bad_input_is_exit_code_2(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line that says what is wrong; nothing is made."""
    for arguments, message in (
        (("to-megatron", "--hf", source, "--dtype", "fp8"), "--dtype 'fp8' must be one of bf16, fp16, fp32"),
        (("to-megatron", "--hf", tmp_path), "has no config.json"),
        (("to-hf", "--megatron", source), "is not a complete Megatron checkpoint"),
    ):
        assert _run(monkeypatch, *arguments, "--out", tmp_path / "out") == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
