"""Fixtures for tests of reports."""

import pytest

from megatron_fipo.report import page


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the figures out, which take a second a page."""
    monkeypatch.setattr(page, "_draw", lambda *arguments: None)
