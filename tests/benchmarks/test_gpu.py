"""The GPU benchmark at toy size: everything that it measures but vLLM, on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

# Each starts the command, which imports everything and measures for ten seconds and more.
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.py"
LOSS = {
    f"loss_{size}_{name}"
    for size in ("1x20480", "80x256")
    for name in ("fused_ms", "scan_ms", "fused_share_of_copy", "loss_and_backward_ms")
}
HEAD = {"head_ms", "head_four_products_ms", "head_share_of_products", "head_naive_ms", "head_peak_gb"}
UPDATE = {
    f"te_off_{name}"
    for name in (
        *("tokens", "micro_batches", "update_seconds", "update_tflops", "mfu", "peak_gb", "log_probs_seconds"),
        *("fipo_seconds", "lm_seconds", "fipo_over_lm", "cross_entropy_seconds", "fipo_over_cross_entropy"),
        "first_log_ratio_abs_max",
    )
}
AROUND = {
    *("offload_gb", "offload_seconds", "offload_back_seconds"),
    *("checkpoint_gb", "checkpoint_first_pause_seconds", "checkpoint_pause_seconds", "checkpoint_writing_seconds"),
}
DETERMINISTIC = {
    *("update_seconds", "update_same_bits", "update_deterministic_over_default"),
    *("update_deterministic_seconds", "update_deterministic_same_bits"),
}


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=280, env=environment)


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    parts = ("loss", "head", "update", "deterministic")
    ended = _run("--toy", "--directory", str(tmp_path_factory.mktemp("benchmark")), "--parts", *parts)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.mark.distributed
def test_all_figures_are_there(figures: dict[str, Any]) -> None:
    """Each part gives its own, none of which is missing a value but those that only a GPU has."""
    wanted = LOSS | HEAD | UPDATE | AROUND | DETERMINISTIC
    assert wanted <= figures.keys()
    assert {n for n in wanted if figures[n] is None} == {"te_off_mfu", "te_off_peak_gb"}
    assert all(figures[n] > 0 for n in wanted if n.endswith(("seconds", "_ms")))


@pytest.mark.distributed
def test_figures_fit_together(figures: dict[str, Any]) -> None:
    """The first log-ratio is 0, ratios are those of the seconds, and bytes those of the toy model."""
    assert figures["te_off_first_log_ratio_abs_max"] == 0
    ratio = figures["te_off_fipo_seconds"] / figures["te_off_cross_entropy_seconds"]
    assert figures["te_off_fipo_over_cross_entropy"] == pytest.approx(ratio, rel=1e-3)
    hidden, ffn, layers, kv, vocabulary = 64, 128, 2, 32, 512
    each = 2 * hidden * hidden + 2 * hidden * kv + hidden + 2 * kv + 3 * hidden * ffn + 2 * hidden
    parameters = layers * each + hidden + vocabulary * hidden
    assert figures["offload_gb"] * 1e9 == pytest.approx(3 * 4 * parameters, rel=0.01)
    assert figures["checkpoint_gb"] * 1e9 > 12 * parameters
    assert figures["te_off_tokens"] > figures["te_off_micro_batches"] > 1


@pytest.mark.distributed
def test_updates_repeat_on_the_cpu(figures: dict[str, Any]) -> None:
    """The same update twice gives the same bits, with run.deterministic and without."""
    assert figures["update_same_bits"]
    assert figures["update_deterministic_same_bits"]


def test_without_vllm_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A part that this machine has no software for is named with what to do."""
    monkeypatch.setenv("MEGATRON_FIPO_VLLM_PYTHON", str(tmp_path / "python"))
    ended = _run("--toy", "--parts", "servers")
    assert ended.returncode == 0, ended.stderr
    assert "make vllm-env" in json.loads(ended.stdout.splitlines()[-1])["vllm"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_refuses() -> None:
    """Figures of a CPU must not pass for a GPU's."""
    ended = _run("--parts", "loss")
    assert ended.returncode == 2
    assert "no GPU is available; --toy" in ended.stderr
