"""Dimensions of the served model."""

from __future__ import annotations

from typing import NamedTuple

from megatron_fipo.shapes.architecture import Architecture


class ServedModel(NamedTuple):
    """The model, as far as responses must fit it.

    Attributes:
        vocabulary: token IDs are below this.
        routed: its dimensions, where responses must come with their routing.
    """

    vocabulary: int = 1 << 31
    routed: Architecture | None = None


ANY_MODEL = ServedModel()
