"""Compiled kernels are kept on the node, where nobody else can put any."""

from __future__ import annotations

from pathlib import Path

from megatron_fipo.machine import caches


def test_places_on_the_node(tmp_path: Path) -> None:
    """In TMPDIR, with one directory of this user alone; a place that is set stays."""
    found = caches.node_local({"TMPDIR": str(tmp_path), "TRITON_CACHE_DIR": "/fast/triton"})
    (base,) = tmp_path.iterdir()
    assert base.stat().st_mode & 0o777 == 0o700
    assert found == {
        "VLLM_CACHE_ROOT": f"{base}/vllm",
        "TORCHINDUCTOR_CACHE_DIR": f"{base}/inductor",
        "FLASHINFER_WORKSPACE_BASE": f"{base}/flashinfer",
        "CUDA_CACHE_PATH": f"{base}/nv",
    }
    assert caches.node_local({"TMPDIR": str(tmp_path), **found, "TRITON_CACHE_DIR": "x"}) == {}


def test_a_place_that_others_may_write_to(tmp_path: Path) -> None:
    """It is left alone; kernels are kept beside it."""
    (base,) = [Path(caches.node_local({"TMPDIR": str(tmp_path)})["CUDA_CACHE_PATH"]).parent]
    base.chmod(0o777)
    other = Path(caches.node_local({"TMPDIR": str(tmp_path)})["CUDA_CACHE_PATH"]).parent
    assert (other != base, other.parent, other.stat().st_mode & 0o777) == (True, tmp_path, 0o700)
