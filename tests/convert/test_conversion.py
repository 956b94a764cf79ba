"""Conversions that meet bad input, a full disk or a sudden end, and what they say and leave behind."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_fipo.convert import conversion
from megatron_fipo.convert.conversion import to_huggingface, to_megatron
from megatron_fipo.convert.distributed import DistributedCheckpoint
from megatron_fipo.convert.huggingface import INDEX, CheckpointWriter
from megatron_fipo.convert.verify import verify
from tests.support.families import make_checkpoint
from tests.support.ranks import run_ranks

Tensors = dict[str, torch.Tensor]
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("original") / "hf", "qwen2", num_hidden_layers=2)


@pytest.fixture
def source(original: Path, tmp_path: Path) -> Path:
    """A checkpoint to damage."""
    return Path(shutil.copytree(original, tmp_path / "hf"))


def _change(path: Path, change: Callable[[Tensors], Tensors]) -> None:
    save_file(change(load_file(path / WEIGHTS)), path / WEIGHTS)


def _without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {n: t for n, t in tensors.items() if n != name}


def _assert_bits(found: Path, wanted: Path) -> None:
    tensors = [load_file(path / WEIGHTS) for path in (found, wanted)]
    assert tensors[0].keys() == tensors[1].keys()
    for name, tensor in tensors[1].items():
        assert torch.equal(tensors[0][name].view(torch.int32), tensor.view(torch.int32)), name


# Input that is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("model.layers.1.mlp.up_proj.weight"), r"lacks tensors: model\.layers\.1\.mlp\.up_proj\.weight"),
        (lambda t: {**t, "model.layers.2.x": torch.ones(1)}, r"has unexpected tensors: model\.layers\.2\.x"),
        (lambda t: {**t, "model.norm.weight": torch.ones(3)}, r"model\.norm\.weight of .* has shape \(3,\)"),
        (lambda t: {**t, "model.norm.weight": torch.ones(64).int()}, r"model\.norm\.weight of .* has type I32"),
        (
            lambda t: {**t, "model.layers.1.mlp.up_proj.weight": t["model.layers.1.mlp.up_proj.weight"].half()},
            r"model\.layers\.1\.mlp\.up_proj\.weight has dtype torch\.float16, .*: choose a common one with --dtype",
        ),
    ],
)
def test_tensors_that_are_refused(
    source: Path, tmp_path: Path, change: Callable[[Tensors], Tensors], message: str
) -> None:
    """The message names the tensor, and nothing is made."""
    _change(source, change)
    with pytest.raises(ValueError, match=message):
        to_megatron(source, tmp_path / "out")
    assert [f.name for f in tmp_path.iterdir()] == ["hf"]


def test_truncated_weights(source: Path, tmp_path: Path) -> None:
    """Half a file is damaged, not short."""
    os.truncate(source / WEIGHTS, (source / WEIGHTS).stat().st_size // 2)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        to_megatron(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_index_that_does_not_fit_the_files(source: Path, tmp_path: Path) -> None:
    """An index that puts a tensor elsewhere, or does not know one that is there."""
    tensors = load_file(source / WEIGHTS)
    (source / WEIGHTS).unlink()
    halves: tuple[Tensors, Tensors] = ({}, {})
    for number, (name, tensor) in enumerate(tensors.items()):
        halves[number % 2][name] = tensor
    places = {}
    for number, half in enumerate(halves):
        save_file(half, source / f"model-{number}.safetensors")
        places |= dict.fromkeys(half, f"model-{number}.safetensors")
    wrong = {**places, "model.norm.weight": f"model-{'model.norm.weight' in halves[0]:d}.safetensors"}
    less = {name: file for name, file in places.items() if name != "model.norm.weight"}
    for index, message in (
        (wrong, r"says that model\.norm\.weight is in model-\d\.safetensors, but it is not"),
        (less, r"contains model\.norm\.weight, which is not in"),
    ):
        (source / INDEX).write_text(json.dumps({"weight_map": index}))
        with pytest.raises(ValueError, match=message):
            to_megatron(source, tmp_path / "out")
    (source / INDEX).write_text(json.dumps({"weight_map": places}))
    to_megatron(source, tmp_path / "out")


def test_unknown_model_type(source: Path, tmp_path: Path) -> None:
    """Only exact model types are known."""
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "model_type": "qwen2_moe"}))
    with pytest.raises(ValueError, match=r"model type 'qwen2_moe' of .* is not supported: must be one of qwen2, qwen3"):
        to_megatron(source, tmp_path / "out")


def test_out_that_is_there_is_kept(original: Path, tmp_path: Path) -> None:
    """Neither direction replaces a directory."""
    to_megatron(original, tmp_path / "out")
    for convert, path in ((to_megatron, original), (to_huggingface, tmp_path / "out")):
        with pytest.raises(ValueError, match="already exists"):
            convert(path, tmp_path / "out")


def test_damaged_megatron_checkpoint(original: Path, tmp_path: Path) -> None:
    """A file cut short or gone, or no checkpoint at all, is named."""
    out = tmp_path / "megatron"
    to_megatron(original, out)
    data = out / "__0_0.distcp"
    os.truncate(data, data.stat().st_size - 100)
    with pytest.raises(ValueError, match=r"__0_0\.distcp has \d+ bytes, expected \d+: the checkpoint is damaged"):
        to_huggingface(out, tmp_path / "back")
    (out / "conversion.json").unlink()  # as in a training checkpoint
    with pytest.raises(ValueError, match=r"cannot read .* of "):
        to_huggingface(out, tmp_path / "back")
    data.unlink()
    with pytest.raises(ValueError, match=r"cannot read .* of .*: .*__0_0\.distcp"):
        to_huggingface(out, tmp_path / "back")
    (out / "metadata.json").unlink()
    with pytest.raises(ValueError, match=r"not a complete Megatron checkpoint: .*metadata\.json is missing"):
        to_huggingface(out, tmp_path / "back")
    assert not (tmp_path / "back").exists()


class _Bomb:
    """Unpickled by torch's own reader, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


def test_metadata_that_would_run_code(original: Path, tmp_path: Path) -> None:
    """A checkpoint's metadata is a pickle; one that names anything but checkpoint classes is refused, and not run."""
    out, mark = tmp_path / "megatron", tmp_path / "mark"
    to_megatron(original, out)
    (out / ".metadata").write_bytes(pickle.dumps(_Bomb(mark)))
    with pytest.raises(ValueError, match=r"is damaged: .*posix\.mkdir, which is not allowed in a checkpoint"):
        DistributedCheckpoint(out)
    assert not mark.exists()


def test_megatron_checkpoint_of_another_model(original: Path, tmp_path: Path) -> None:
    """Its shapes are held against the config before anything is written."""
    to_megatron(original, tmp_path / "megatron")
    for changes, message in (
        ({"intermediate_size": 80}, r"decoder\.layers\.mlp\.linear_fc1\.weight of .* has shape \(176, 64\)"),
        ({"vocab_size": 252}, r"embedding\.word_embeddings\.weight of .* has shape \(251, 64\)"),
        ({"tie_word_embeddings": True}, r"has unexpected parameters: output_layer\.weight"),
    ):
        other = make_checkpoint(tmp_path / "other", "qwen2", **{"num_hidden_layers": 2, **changes})
        with pytest.raises(ValueError, match=message):
            to_huggingface(tmp_path / "megatron", tmp_path / "back", config=other)
        with pytest.raises(ValueError, match=message):
            verify(other, tmp_path / "megatron")


# Numbers


def test_nan_weights_are_reported_and_kept(source: Path, tmp_path: Path) -> None:
    """Both directions and verify name the tensor; its bits go through."""

    def poison(tensors: Tensors) -> Tensors:
        tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = float("nan")
        return tensors

    _change(source, poison)
    assert to_megatron(source, tmp_path / "megatron").with_nan == ["model.layers.1.mlp.down_proj.weight"]
    back = to_huggingface(tmp_path / "megatron", tmp_path / "back")
    assert back.with_nan == ["model.layers.1.mlp.down_proj.weight"]
    _assert_bits(tmp_path / "back", source)
    result = verify(source, tmp_path / "megatron")
    assert (result.differences, result.with_nan) == ([], ["model.layers.1.mlp.down_proj.weight"])


def test_verify_says_what_differs_and_by_how_much(source: Path, tmp_path: Path) -> None:
    """One number off by 0.25, found in the tensor that it is in."""
    to_megatron(source, tmp_path / "megatron")

    def move(tensors: Tensors) -> Tensors:
        tensors["model.layers.0.self_attn.k_proj.weight"][2, 7] += 0.25
        return tensors

    _change(source, move)
    (difference,) = verify(source, tmp_path / "megatron").differences
    assert difference.name == "model.layers.0.self_attn.k_proj.weight"
    assert (difference.num_different, difference.num_elements) == (1, 32 * 64)
    assert difference.largest == pytest.approx(0.25)


def test_dtype_is_rounded_once_and_recorded(original: Path, tmp_path: Path) -> None:
    """--dtype rounds as torch does, config.json names the new type, and verify compares in Megatron's."""
    to_megatron(original, tmp_path / "megatron", torch.bfloat16)
    to_huggingface(tmp_path / "megatron", tmp_path / "back")
    rounded = {name: tensor.bfloat16() for name, tensor in load_file(original / WEIGHTS).items()}
    back = load_file(tmp_path / "back" / WEIGHTS)
    assert back.keys() == rounded.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in rounded.items())
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"
    assert verify(original, tmp_path / "megatron").differences == []


def test_writer_refuses_what_is_not_the_model(tmp_path: Path) -> None:
    """An unknown name, another shape or type, a tensor twice, and, at the end, one that never came."""
    writer = CheckpointWriter(tmp_path, dict.fromkeys(("a", "b"), ((2, 3), torch.float32)), file_bytes=1 << 20)
    writer.write("b", torch.ones(2, 3))
    for name, tensor, message in (
        ("c", torch.ones(2, 3), "tensor c is not expected"),
        ("b", torch.ones(2, 3), "tensor b is already written"),
        ("a", torch.ones(3, 2), r"tensor a must be \(2, 3\) .*got \(3, 2\)"),
        ("a", torch.ones(2, 3).half(), r"tensor a must be .*got \(2, 3\) torch\.float16"),
    ):
        with pytest.raises(ValueError, match=message):
            writer.write(name, tensor)
    with pytest.raises(ValueError, match="the export lacks tensors: a"):
        writer.close()


# Sudden ends


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that some files are on disk when a conversion ends."""
    monkeypatch.setattr(conversion, "DISTRIBUTED_FILE_BYTES", 60_000)
    monkeypatch.setattr(conversion, "FILE_BYTES", 60_000)


def test_too_little_space_is_said_at_once(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is written."""
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match=r"out needs 0\.\d GB more disk space, but only 0\.0 GB are free"):
        to_megatron(original, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("small_files")
def test_disk_that_fills_up(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clear error, no directory of the name, and --resume finishes the work once there is space."""
    real, calls = conversion.write_file, []

    def full(path: Path, tensors: Any) -> Any:
        calls.append(path)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, tensors)

    monkeypatch.setattr(conversion, "write_file", full)
    with pytest.raises(ValueError, match=r"no space left for .*out: free space and continue with --resume"):
        to_megatron(original, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    to_megatron(original, tmp_path / "out", resume=True)
    assert verify(original, tmp_path / "out").differences == []


def _convert_and_die(direction: str, source: Path, out: Path, after: int) -> None:
    conversion.DISTRIBUTED_FILE_BYTES = conversion.FILE_BYTES = 60_000
    done = 0

    def progress(num_bytes: int, total: int) -> None:
        nonlocal done
        done += num_bytes
        if done > after:
            os.kill(os.getpid(), signal.SIGKILL)

    (to_megatron if direction == "to_megatron" else to_huggingface)(source, out, progress=progress)


def test_interrupted_conversion_of_an_earlier_release(original: Path, tmp_path: Path) -> None:
    """`--resume` names the directory and what to do, and changes nothing; without it the directory is removed."""
    former = tmp_path / ".out.unfinished"
    former.mkdir()
    (former / ".progress.jsonl").write_text('{"source": "x"}\n')
    with pytest.raises(ValueError, match=rf"{former} is the interrupted .* omit --resume to remove it and start over"):
        to_megatron(original, tmp_path / "out", resume=True)
    assert [path.name for path in tmp_path.iterdir()] == [".out.unfinished"]
    assert [path.name for path in former.iterdir()] == [".progress.jsonl"]
    to_megatron(original, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.distributed
@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize("direction", ["to_megatron", "to_huggingface"])
def test_killed_half_way(direction: str, original: Path, tmp_path: Path) -> None:
    """Nothing has the name of a checkpoint or passes for one; --resume keeps the files that were whole, and the end
    is bit for bit that of an undisturbed conversion."""
    source, out = original, tmp_path / "out"
    if direction == "to_huggingface":
        source = tmp_path / "megatron"
        to_megatron(original, source)
    with pytest.raises(RuntimeError, match="-9"):
        run_ranks(_convert_and_die, 1, direction, source, out, 300_000)
    assert not out.exists()
    (staging,) = (f for f in tmp_path.iterdir() if f.name.startswith("."))
    for check in (DistributedCheckpoint, lambda path: to_megatron(path, tmp_path / "x")):
        with pytest.raises(ValueError, match=r"not a complete Megatron checkpoint|has no config\.json"):
            check(staging)
    whole = {f.name: f.stat().st_mtime_ns for f in staging.iterdir() if not f.name.startswith(".")}
    convert = to_megatron if direction == "to_megatron" else to_huggingface
    convert(source, out, resume=True)
    kept = [name for name, time in whole.items() if (out / name).stat().st_mtime_ns == time]
    assert len(kept) >= 2
    megatron, back = (out, tmp_path / "back") if direction == "to_megatron" else (source, out)
    if direction == "to_megatron":
        to_huggingface(out, back)
    tensors = {name: tensor for file in back.glob("*.safetensors") for name, tensor in load_file(file).items()}
    expected = load_file(original / WEIGHTS)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
    assert verify(original, megatron).differences == []


@pytest.mark.usefixtures("small_files")
def test_resume_of_other_files_is_refused(source: Path, tmp_path: Path) -> None:
    """Half of one model and half of another would pass every check of names and shapes."""

    def stop(num_bytes: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        to_megatron(source, tmp_path / "out", progress=stop)
    _change(source, lambda tensors: {name: tensor * 2 for name, tensor in tensors.items()})
    with pytest.raises(ValueError, match="was left by a different conversion"):
        to_megatron(source, tmp_path / "out", resume=True)
    to_megatron(source, tmp_path / "out")
    assert verify(source, tmp_path / "out").differences == []
