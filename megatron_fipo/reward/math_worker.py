"""A process that decides whether two mathematical answers are equal; `math.py` starts it by path and ends it.

It reads one JSON line a question, [answer, ground truth], from standard input, and writes one byte each: `1` or `0`.
A first byte `r` says that it is ready. It imports nothing of this package, so that it starts in a second.
"""

import json
import logging
import os
import resource
import signal
import sys

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

EXTRACTION = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())


def equivalent(answer: str, ground_truth: str) -> bool:
    gold, prediction = (
        parse(rf"\boxed{{{text}}}", EXTRACTION, parsing_timeout=None)  # the caller's deadline replaces the timeouts
        for text in (ground_truth, answer)
    )
    return bool(verify(gold, prediction, timeout_seconds=None))


def main(timeout_seconds: float, memory_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable()
    replies = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a library prints must not look like a reply
    equivalent(r"\frac{1}{2}", "0.5")  # builds the parser, which would cost the first answer most of its time
    os.write(replies, b"r")
    for line in sys.stdin:  # ends with the parent, which holds the only other end
        # The default action of the alarm is to end the process, even in the midst of one long multiplication that
        # holds the interpreter lock: a busy worker does not outlive a dead parent either.
        signal.setitimer(signal.ITIMER_REAL, timeout_seconds)
        verdict = equivalent(*json.loads(line))
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.write(replies, b"1" if verdict else b"0")


if __name__ == "__main__":
    main(timeout_seconds=float(sys.argv[1]), memory_bytes=int(sys.argv[2]))
