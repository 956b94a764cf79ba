"""The CUDA kernels compile for every architecture of setup.py, and keep what they need in registers. No GPU needed."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CUDA = Path(__file__).parents[2] / "csrc" / "cuda"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")

# Two blocks of 256 threads share a multiprocessor's 65536 registers.
MAX_REGISTERS = 128
# Bytes a thread keeps in memory for want of registers. Of the loss that is the state of its walk over segments and
# tiles; inside the loop over rows nothing is stored, and at most four values are read back for a lane's four tokens.
MAX_SPILLS = {"scan": 0, "loss": 160, "lm_head": 0}

pytestmark = [
    pytest.mark.slow,  # nine compilations of 4 to 9 s
    pytest.mark.skipif(
        shutil.which("nvcc") is None, reason="nvcc is not on PATH: NO CUDA KERNEL IS COMPILED OR CHECKED"
    ),
]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", sorted(CUDA.glob("*.cu")), ids=lambda path: path.stem)
def test_compiles_within_the_registers(source, architecture, tmp_path, record_property):
    command = ["nvcc", "-std=c++17", "-O3", f"-arch={architecture}", "-Xptxas", "-v", "-Werror", "all-warnings"]
    compiler = subprocess.run(
        [*command, "-cubin", "-o", str(tmp_path / "kernels.cubin"), str(source)], capture_output=True, text=True
    )
    assert compiler.returncode == 0, compiler.stderr
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", compiler.stderr)]
    spills = [int(number) for number in re.findall(r"(\d+) bytes spill stores", compiler.stderr)]
    assert registers
    assert spills
    record_property("registers", max(registers))
    record_property("spills", max(spills))
    print(f"{source.name} for {architecture}: {max(registers)} registers, {max(spills)} bytes spilled")
    assert max(registers) <= MAX_REGISTERS
    assert max(spills) <= MAX_SPILLS[source.stem]


def test_setup_builds_these_architectures():
    setup = (CUDA.parents[1] / "setup.py").read_text()
    assert f"CUDA_ARCHITECTURES = {ARCHITECTURES!r}".replace("'", '"') in setup
