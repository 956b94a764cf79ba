"""Text for a terminal: names, paths and answers come from files and models, and a terminal obeys control characters."""

from __future__ import annotations

import re

# C0 and C1 but the line feed, DEL, what turns text around, and halves of surrogate pairs, which cannot be encoded.
_CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object) -> str:
    r"""Return the text with a space for each tab, and other control characters as `\x1b` and the like."""
    return _CONTROL.sub(lambda found: " " if found[0] == "\t" else ascii(found[0])[1:-1], str(text))
