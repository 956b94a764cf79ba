"""NeMo-Aligner's contract for a generative actor: its own class where the package is installed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:

    class AlignableGenerativeInterface: ...

else:
    try:
        from nemo_aligner.models.alignable_interface import AlignableGenerativeInterface
    except ImportError:

        class AlignableGenerativeInterface:
            """Substitute for the base class where the `aligner` extra is not installed."""


__all__ = ["AlignableGenerativeInterface"]
