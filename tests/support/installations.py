"""Installations of Transformer Engine that are not there: laid out as pip lays it, whole or broken, in a directory."""

from __future__ import annotations

from pathlib import Path

VERSION = "2.20.2"
BROKEN = {
    "RuntimeError": "raise RuntimeError('cuDNN 9.12.0 or later is required')",
    "OSError": "raise OSError('libnccl.so.2: cannot open shared object file: No such file or directory')",
    "ImportError": "raise ImportError('undefined symbol: _ZN3c104cuda')",
    "FileNotFoundError": "raise FileNotFoundError('Could not find shared object file for torch lib.')",
}


def install_transformer_engine(directory: Path, error: str | None = None) -> Path:
    """Make `transformer_engine` importable from `directory`; its torch library is in wheel_lib/, as in pip's wheel.

    Args:
        error: name in BROKEN of what its import raises.
    """
    package = directory / "transformer_engine"
    (package / "wheel_lib").mkdir(parents=True)
    (package / "wheel_lib" / "transformer_engine_torch.cpython-311-x86_64-linux-gnu.so").touch()
    (package / "pytorch" / "optimizers").mkdir(parents=True)
    # The package itself hides an ImportError of its torch part, and no other error.
    (package / "__init__.py").write_text("try:\n    from . import pytorch\nexcept ImportError:\n    pass\n")
    (package / "pytorch" / "__init__.py").write_text(
        BROKEN[error] if error else "print('Transformer Engine says hello')"
    )
    (package / "pytorch" / "fp8.py").write_text("FP8GlobalStateManager = fp8_autocast = None\n")
    (package / "pytorch" / "optimizers" / "__init__.py").write_text(
        "class FusedAdam: pass\nFusedSGD = multi_tensor_applier = multi_tensor_l2norm = multi_tensor_scale = None\n"
    )
    metadata = directory / f"transformer_engine-{VERSION}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: transformer-engine\nVersion: {VERSION}\n")
    return directory
