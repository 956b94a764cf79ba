"""Which configs can be measured."""

from __future__ import annotations

import pytest

from megatron_fipo.scaling.measure.specification import measured_config
from tests.support.policies import make_config


def test_placebo_is_not_measured() -> None:
    """Its update is more than the measured one, which is said before a rank starts; --loss lm has no weights at all."""
    config = make_config("base", algorithm={"influence": "placebo"})
    with pytest.raises(ValueError, match=r"adds a forward pass .*: set algorithm\.influence=fipo"):
        measured_config(config, "fipo")
    assert measured_config(config, "lm").algorithm.influence == "placebo"
