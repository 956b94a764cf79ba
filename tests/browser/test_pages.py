"""The HTML pages in a real browser: no errors, figures with something in them, hover, filters, a phone's width."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.config import to_yaml
from megatron_fipo.report import credit
from megatron_fipo.report.page import write_report
from tests.report.test_compare import named_run
from tests.report.test_report import CONFIG, rows_of
from tests.support.saved_rollouts import HOSTILE, hostile_text, write_rollouts

playwright = pytest.importorskip("playwright.sync_api", reason="tests/browser/install.sh")
pytestmark = pytest.mark.browser

PAGES = ("one/report.html", "one/credit.html", "all.html")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with playwright.sync_playwright() as p:
        try:
            # Root, as in a container, has no sandbox; the pages are our own.
            sandbox = [] if os.getuid() else ["--no-sandbox"]
            browser = p.chromium.launch(executable_path=found, args=sandbox)
        except playwright.Error as error:
            pytest.skip(f"no Chromium (tests/browser/install.sh): {error}")
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with hostile responses and its pages, and one page of two runs with a long name."""
    folder = tmp_path_factory.mktemp("pages")
    rollout = replace(CONFIG.rollout, group_size=4)
    runs = [named_run(folder / name, rows_of(20), rollout=rollout) for name in ("one", "another-" * 8 + "run")]
    config = replace(CONFIG, rollout=rollout, run=replace(CONFIG.run, name="<i>&one"))
    (runs[0] / "config.yaml").write_text(to_yaml(config))
    for step in (1, 2):
        write_rollouts(runs[0], step)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(credit, "_token_text", lambda run: hostile_text)
        write_report(runs[0])
    write_report(runs, folder / "all.html")
    return folder


@pytest.fixture
def open_page(browser: Any, pages: Path) -> Iterator[Any]:
    """Opens one of the pages at a width; whatever went wrong on it is in `page.errors`."""
    contexts = []

    def open_(name: str, width: int = 1280, touch: bool = False) -> Any:
        context = browser.new_context(viewport={"width": width, "height": 844}, has_touch=touch)
        contexts.append(context)
        page = context.new_page()
        page.errors = []
        page.on("console", lambda m: page.errors.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else page.errors.append(r.url))
        page.goto((pages / name).as_uri())
        keep = os.environ.get("BROWSER_SCREENSHOTS")
        if keep:
            page.screenshot(path=f"{keep}/{name.replace('/', '_')}.{width}.png", full_page=True)
        return page

    yield open_
    for context in contexts:
        context.close()


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("width", [390, 1280])
def test_no_errors_and_no_horizontal_overflow(open_page: Any, name: str, width: int) -> None:
    """A page opens without an error or a request outside, and is as wide as a phone or a screen, no wider."""
    page = open_page(name, width)
    assert page.errors == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.eval_on_selector_all("details", "all => all.forEach(d => d.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("name", ["one/report.html", "all.html"])
def test_figures_show_something(open_page: Any, name: str) -> None:
    """Every figure is decoded at its full size and has at least 20 colours."""
    page = open_page(name)
    colours = page.evaluate(
        """() => [...document.images].map(image => {
            const canvas = document.createElement("canvas");
            [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
            const context = canvas.getContext("2d");
            context.drawImage(image, 0, 0);
            const pixels = new Uint32Array(context.getImageData(0, 0, canvas.width, canvas.height).data.buffer);
            return [image.naturalWidth, image.naturalHeight, new Set(pixels).size];
        })"""
    )
    assert len(colours) > 15
    assert all((w, h) == (960, 615) and n >= 20 for w, h, n in colours)


def data_of(page: Any) -> dict[str, Any]:
    return json.loads(page.text_content("#data"))


def shown_of(page: Any) -> dict[str, Any]:
    """The response that is shown, as the data has it."""
    head = page.text_content("#response p").split()
    number, step = int(head[1]), int(head[4].rstrip(":"))
    return next(r for r in data_of(page)["responses"] if (r["id"], r["step"]) == (number, step))


@pytest.mark.parametrize("touch", [False, True])
def test_numbers_of_a_token(open_page: Any, touch: bool) -> None:
    """Pointing at a token, or tapping it on a phone, shows its own numbers."""
    page = open_page("one/credit.html", 390 if touch else 1280, touch)
    response = shown_of(page)
    token = page.locator("#tokens span").nth(3)
    token.tap() if touch else token.hover()
    text = page.text_content("#numbers")
    assert f"token 4: weight {response['w'][3] / 1000:.3f}, Future-KL {response['s'][3] / 1000:.3f}" in text
    assert f"{response['old'][3] / 1000:.3f} before the step, {response['new'][3] / 1000:.3f} in the update" in text
    assert page.errors == []


def test_shading_follows_the_switch(open_page: Any) -> None:
    """Tokens above 1 are orange, those below blue, those at 1 plain; the switch shades by Future-KL instead."""
    page = open_page("one/credit.html")
    response = shown_of(page)

    def signs() -> list[int]:
        colours = page.eval_on_selector_all("#tokens span", "all => all.map(s => getComputedStyle(s).backgroundColor)")
        return [0 if c == "rgba(0, 0, 0, 0)" else 1 if c.startswith("rgba(221, 122, 31") else -1 for c in colours]

    assert signs() == [(w > 1000) - (w < 1000) for w in response["w"]]
    page.select_option("#shade", "s")
    assert signs() == [(s > 0) - (s < 0) for s in response["s"]]
    assert "Future-KL ±" in page.text_content("#response p")


def test_hostile_texts_are_shown_as_they_are(open_page: Any) -> None:
    """No response ran or became markup; its characters are on the page."""
    page = open_page("one/credit.html")
    assert page.evaluate("window.hacked") is None
    assert page.locator("#response img, #list img, #credited img").count() == 0
    seen = set()
    for button in page.locator("#list button").all():
        button.click()
        seen.add(page.text_content("#response pre >> nth=0"))
    assert seen == set(HOSTILE)
    assert page.evaluate("window.hacked") is None
    assert page.text_content("h1") == "<i>&one: token credit"
    assert page.errors == []


def test_search_filter_and_sort(open_page: Any) -> None:
    """The list keeps the responses that hold the text and have the sign, in the order asked for."""
    page = open_page("one/credit.html")
    everything = data_of(page)["responses"]

    def listed() -> list[dict[str, Any]]:
        keys = "all => all.map(b => [b.response.step, b.response.id])"
        found = page.eval_on_selector_all("#list button", keys)
        return [next(r for r in everything if [r["step"], r["id"]] == key) for key in found]

    assert len(listed()) == len(everything) == 24
    page.select_option("#sign", "-1")
    assert len(listed()) == 6
    assert all(r["advantage"] < 0 for r in listed())
    page.select_option("#sign", "")
    for order in ("reward", "length", "weight"):
        page.select_option("#sort", order)
        values = [r[order] for r in listed()]
        assert values == sorted(values, reverse=True)
        assert len(values) == 24
    texts = data_of(page)["texts"]
    page.fill("#search", "TOKEN17")
    assert {(r["step"], r["id"]) for r in listed()} == {
        (r["step"], r["id"]) for r in everything if any("token17" in texts[t] for t in r["tokens"])
    }
    page.fill("#search", "no such text")
    assert page.text_content("#list") == "No matching response."
    assert page.errors == []
