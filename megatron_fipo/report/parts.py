"""Common parts of the reports: style, document, figures, tables, and terminal text."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape

from rich.console import Console, RenderableType

from megatron_fipo.printable import printable

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --page: #f4f5f6; --ink: #22272b; --soft: #636b72; --line: #dde1e4 }
@media (prefers-color-scheme: dark) {
  :root { --paper: #1f1f1f; --page: #141414; --ink: #e4e6e8; --soft: #a0a7ad; --line: #383c40 }
  img { filter: invert(.88) hue-rotate(180deg) }
}
body { margin: 0 auto; padding: 1rem; max-width: 84rem; background: var(--page); color: var(--ink);
       font: 16px/1.5 system-ui, sans-serif }
h1 { margin: .5rem 0; font-size: 1.5rem; overflow-wrap: anywhere } h2 { margin: 2rem 0 .7rem; font-size: 1.1rem }
h3 { margin: .5rem 0 0; font-size: 1rem; overflow-wrap: anywhere } section > p { margin: 0 0 .4rem }
p, figcaption { color: var(--soft) }
table { border-collapse: collapse; background: var(--paper); font-variant-numeric: tabular-nums }
th, td { padding: .35rem .8rem; border-bottom: 1px solid var(--line); text-align: right }
th:first-child { text-align: left; font-weight: 500 } .text { text-align: left }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)) }
figure { margin: 0; padding: .6rem; background: var(--paper); border: 1px solid var(--line); border-radius: .4rem;
         max-width: 48rem }
img { display: block; width: 100%; height: auto } figcaption { margin: .3rem .4rem .2rem; font-size: .875rem }
details { margin: 2rem 0 } summary { cursor: pointer } pre { overflow-x: auto; font-size: .8rem }
.wide { overflow-x: auto } .swatch { display: inline-block; width: .8em; height: .8em; margin-right: .4em }
@media (max-width: 30rem) { body { padding: .6rem } th, td { padding: .3rem .4rem; font-size: .875rem } }
"""


class Html(str):
    """HTML that is not escaped again; all other text is."""


def _html(text: str) -> str:
    return text if isinstance(text, Html) else escape(text)


# A page loads nothing and runs no scripts, so that even an escaping error is harmless.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def document(title: str, body: str, style: str = "") -> str:
    """Return a page with its title, which is plain text; `body` is HTML, `style` additional CSS."""
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_STYLE}{style}</style>
<h1>{escape(title)}</h1>
{body}
</html>
"""


def figure_text(text: str) -> str:
    """Escape text for matplotlib, which parses text between two dollar signs as TeX."""
    return printable(text).replace("$", r"\$")


def figure(title: str, caption: str, png: bytes) -> str:
    """Return a figure with the image embedded."""
    data = base64.b64encode(png).decode()
    return (
        f'<figure><img alt="{escape(title)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def table(head: Sequence[str], lines: Sequence[Sequence[str]], classes: Mapping[int, str] | None = None) -> str:
    """Return a table that scrolls horizontally if it is too wide.

    Args:
        lines: the first cell of each line is its name.
        classes: column -> CSS classes of its cells.
    """

    def cell(column: int, text: str, heads: bool) -> str:
        kind = f' class="{classes[column]}"' if classes and column in classes else ""
        if heads:
            return f"<th{kind}>{_html(text)}</th>"
        return f"<td{kind}>{_html(text)}</td>" if column else f"<th scope=row{kind}>{_html(text)}</th>"

    def row(line: Sequence[str], heads: bool = False) -> str:
        return "<tr>" + "".join(cell(n, text, heads) for n, text in enumerate(line)) + "</tr>"

    rows = "\n".join([row(head, heads=True), *(row(line) for line in lines)])
    return f"<div class=wide><table>\n{rows}\n</table></div>"


def terminal_text(*parts: RenderableType, width: int = 100) -> str:
    """Return tables and lines as terminal text of at most `width` characters per line."""
    text = io.StringIO()
    console = Console(file=text, width=width, markup=False, highlight=False)
    for part in parts:
        console.print(part)
    return "\n".join(line.rstrip() for line in printable(text.getvalue()).strip("\n").split("\n"))
