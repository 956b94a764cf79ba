"""Process that decides whether two mathematical answers are equal, started by path from `math.py`.

Reads one JSON line per comparison, [answer, ground truth], from standard input, and writes one byte each: `1` or `0`,
or `e` if undecided. A first byte `r` signals readiness. Imports only the two modules beside it, by path and not
through this package, so that it starts in a second.
"""

import json
import logging
import os
import re
import resource
import signal
import sys

# Appended to the path: this folder's `math` must not hide the standard library's.
sys.path.append(os.path.dirname(os.path.abspath(__file__)))
from math_comparison import equal, parse
from math_notation import to_latex


def equivalent(answer: str, ground_truth: str) -> bool:
    """Return whether two answers are equal; text that is not mathematical is compared as a string.

    Raises:
        Exception: the ground truth cannot be read, or the comparison failed.
    """
    if _as_text(answer) == _as_text(ground_truth):
        return True
    truth = parse(to_latex(ground_truth))
    try:
        read = parse(to_latex(answer))
    except MemoryError:
        raise
    except Exception:
        return False
    return equal(truth, read)


def _as_text(text: str) -> str:
    """Return the text without styles, case, and spaces that do not separate numbers."""
    text = re.sub(r"\\(?:text|textbf|mathrm|mbox)\s*\{([^{}]*)\}", r"\1", text).replace("\\ ", " ").strip(" .$")
    return re.sub(r"(?<=\d)\s+(?=\d)|(\s+)", lambda found: "" if found[1] else " ", text).casefold()


def main(timeout_seconds: float, memory_bytes: int) -> None:
    """Serve comparisons until standard input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable()
    replies = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # prevents library output from looking like a reply
    equivalent(r"\frac{1}{2}", "0.5")  # builds the parser, which would cost the first answer most of its time
    os.write(replies, b"r")
    for line in sys.stdin:  # ends when the parent dies, which holds the only other end
        # The alarm's default action ends the process even during a long multiplication that holds the interpreter
        # lock, so that a busy worker does not outlive its parent either.
        signal.setitimer(signal.ITIMER_REAL, timeout_seconds)
        reply = _reply(*json.loads(line))
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.write(replies, reply)


def _reply(answer: str, ground_truth: str) -> bytes:
    try:
        return b"1" if equivalent(answer, ground_truth) else b"0"
    except MemoryError:  # ends this process; the next answer gets a new one with free memory
        raise
    except Exception:
        return b"e"


if __name__ == "__main__":
    main(timeout_seconds=float(sys.argv[1]), memory_bytes=int(sys.argv[2]))
