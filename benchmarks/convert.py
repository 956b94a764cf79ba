"""Conversion in both directions: speed relative to a plain copy, peak memory, and a projection to 32B.

    python benchmarks/convert.py [--layers 28] [--directory DIR] [--rounds 2]

A synthetic Qwen2.5-1.5B (real sizes, random bfloat16 weights, 3.1 GB) is created, converted to a Megatron checkpoint
and back. Right before each conversion, the files that it will read are copied: a loop of 16 MiB reads and
writes, then fsync. Both read from disk: the files' pages are dropped from the cache first. Each runs in a new
process, timing only the work; a round pairs one copy with one conversion, and the best of each counts.
Peak memory is VmHWM, mapped files included; its limit is 2 x the largest fused tensor + 600 MB. 32B is projected: its
bytes at the measured speed, and the memory of an idle process + the measured multiple of the largest tensor.
The result is compared bit by bit with the original at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import Qwen2Config

from megatron_fipo.convert import conversion, tables
from megatron_fipo.convert.huggingface import CheckpointWriter
from megatron_fipo.convert.verify import verify
from megatron_fipo.model.architecture import architecture

_BLOCK = 16 << 20
_QWEN_1B5 = {
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
_QWEN_32B = {
    "vocab_size": 152064,
    "hidden_size": 5120,
    "intermediate_size": 27648,
    "num_hidden_layers": 64,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
DIRECTIONS = {"to_megatron": ("hf", "megatron"), "to_hf": ("megatron", "back")}


def make_checkpoint(directory: Path, layers: int) -> None:
    """Write random finite bfloat16 numbers of absolute value below 2, in files like the published ones."""
    config = Qwen2Config(**_QWEN_1B5, num_hidden_layers=layers, dtype="bfloat16")
    directory.mkdir()
    tensors = {n: (shape, torch.bfloat16) for n, shape in tables.huggingface_shapes(architecture(config)).items()}
    writer = CheckpointWriter(directory, tensors, conversion.FILE_BYTES)
    generator = torch.Generator().manual_seed(0)
    for name, (shape, dtype) in tensors.items():
        bits = torch.randint(-(1 << 15), 1 << 15, shape, dtype=torch.int16, generator=generator)
        writer.write(name, (bits & ~0x4000).view(dtype))
    writer.close()
    config.save_pretrained(directory)


def sizes(config: dict[str, Any]) -> tuple[int, int]:
    """Return (bytes of all parameters, of the largest fused tensor) in bfloat16."""
    parameters = tables.parameters(architecture(Qwen2Config(**config)))
    counts = [2 * torch.Size(parameter.shape).numel() for parameter in parameters]
    return sum(counts), max(counts)


def drop_from_cache(directory: Path) -> None:
    """Drop the files' pages from the page cache."""
    for file in directory.iterdir():
        with open(file, "rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def plain_copy(source: Path, out: Path) -> None:
    """Read and write 16 MiB at a time, then fsync: the lower bound."""
    out.mkdir()
    for file in source.iterdir():
        with open(file, "rb", buffering=0) as reader, open(out / file.name, "wb", buffering=0) as writer:
            while block := reader.read(_BLOCK):
                writer.write(block)
            os.fsync(writer.fileno())


def work(kind: str, source: Path, out: Path) -> dict[str, float]:
    """Return seconds and peak memory of one copy or conversion in this process."""
    drop_from_cache(source)
    before = _memory("VmRSS")
    started = time.perf_counter()
    {"copy": plain_copy, "to_megatron": conversion.to_megatron, "to_hf": conversion.to_huggingface}[kind](source, out)
    return {"seconds": time.perf_counter() - started, "idle_bytes": before, "peak_bytes": _memory("VmHWM")}


def _memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field + ":"))


def in_fresh_process(kind: str, source: Path, out: Path) -> dict[str, float]:
    """Run `work` in a new process."""
    command = [sys.executable, "-W", "ignore", __file__, "--worker", kind, str(source), str(out)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def measure(directory: Path, rounds: int) -> dict[str, Any]:
    """Measure all rounds."""
    figures: dict[str, Any] = {}
    for direction, (source, out) in DIRECTIONS.items():
        copies, conversions = [], []
        for _ in range(rounds):
            copies.append(in_fresh_process("copy", directory / source, directory / "copy"))
            shutil.rmtree(directory / "copy")
            shutil.rmtree(directory / out, ignore_errors=True)
            conversions.append(in_fresh_process(direction, directory / source, directory / out))
        num_bytes = sum(f.stat().st_size for f in (directory / source).iterdir())
        copy, ours = (min(runs, key=lambda run: run["seconds"]) for runs in (copies, conversions))
        figures[direction] = {
            "gigabytes_per_second": num_bytes / ours["seconds"] / 1e9,
            "copy_gigabytes_per_second": num_bytes / copy["seconds"] / 1e9,
            "ratio_to_copy": copy["seconds"] / ours["seconds"],
            "seconds": [run["seconds"] for run in conversions],
            "copy_seconds": [run["seconds"] for run in copies],
            "peak_bytes": max(run["peak_bytes"] for run in conversions),
            "idle_bytes": ours["idle_bytes"],
        }
    return figures


def project(figures: dict[str, Any], largest: int) -> None:
    """Add the memory limit and the projection to 32B."""
    bytes_32b, largest_32b = sizes(_QWEN_32B)
    figures["peak_limit_bytes"] = 2 * largest + 600_000_000
    figures["projected_32b_limit_bytes"] = 2 * largest_32b + 600_000_000
    for direction in DIRECTIONS:
        one = figures[direction]
        multiple = (one["peak_bytes"] - one["idle_bytes"]) / largest
        one["projected_32b_seconds"] = bytes_32b / one["gigabytes_per_second"] / 1e9
        one["projected_32b_peak_bytes"] = one["idle_bytes"] + multiple * largest_32b


def show(figures: dict[str, Any]) -> None:
    """Print the results."""
    table = Table(
        title=f"Conversion of {figures['bytes'] / 1e9:.2f} GB (Qwen2.5-1.5B, {figures['layers']} layers), one process"
    )
    for column in ("what", "to Megatron", "to Hugging Face", "limit"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for label, key, scale, form, limit in (
        ("GB/s", "gigabytes_per_second", 1, "{:.2f}", ""),
        ("  plain 16 MiB copy with fsync, GB/s", "copy_gigabytes_per_second", 1, "{:.2f}", ""),
        ("  ratio", "ratio_to_copy", 1, "{:.2f}", ">= 0.60"),
        ("peak memory, GB", "peak_bytes", 1e9, "{:.2f}", f"{figures['peak_limit_bytes'] / 1e9:.2f}"),
        ("  of it before the conversion, GB", "idle_bytes", 1e9, "{:.2f}", ""),
        ("32B, projected: minutes", "projected_32b_seconds", 60, "{:.1f}", ""),
        (
            "32B, projected: peak memory, GB",
            "projected_32b_peak_bytes",
            1e9,
            "{:.2f}",
            f"{figures['projected_32b_limit_bytes'] / 1e9:.2f}",
        ),
    ):
        table.add_row(label, *(form.format(figures[direction][key] / scale) for direction in DIRECTIONS), limit)
    differing = "every bit is the same" if not figures["differing_tensors"] else str(figures["differing_tensors"])
    table.add_row("result against the original", differing, "", "")
    table.add_row("1-minute load average before the run", f"{figures['load_average']:.1f}", "", "")
    Console(width=110).print(table)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument(
        "--directory", type=Path, default=Path("."), help="directory on the disk to measure; needs 4 x the model's size"
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Run the benchmark."""
    args = parse_arguments()
    if args.worker:
        kind, source, out = args.worker
        print(json.dumps(work(kind, Path(source), Path(out))))
        return
    num_bytes, largest = sizes({**_QWEN_1B5, "num_hidden_layers": args.layers})
    figures: dict[str, Any] = {"bytes": num_bytes, "largest_tensor_bytes": largest, "layers": args.layers}
    figures |= {"load_average": os.getloadavg()[0], "torch": torch.__version__, "cpus": os.cpu_count()}
    with tempfile.TemporaryDirectory(prefix="convert-", dir=args.directory) as directory:
        root = Path(directory)
        make_checkpoint(root / "hf", args.layers)
        figures |= measure(root, args.rounds)
        figures["differing_tensors"] = [str(d) for d in verify(root / "back", root / "megatron").differences]
        figures["differing_tensors"] += [str(d) for d in verify(root / "hf", root / "megatron").differences]
    project(figures, largest)
    show(figures)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
