"""The tests' own tools: ranks that fail, and the table of the longest tests."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from tests import durations
from tests.support.processes import alive, note_pid, pids
from tests.support.ranks import run_ranks


def _fail_on_one(directory: Path, how: str) -> None:
    note_pid(directory)
    dist.barrier()
    if dist.get_rank() == 1:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("the cause")
    time.sleep(600)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("raised", r"(?s)^rank 1:\nTraceback .*in _fail_on_one\n.*\nValueError: the cause\n$"),
        ("killed", r"^ranks ended with \[None, -9, None\]"),
    ],
)
def test_a_failed_rank_ends_its_world(how: str, says: str, tmp_path: Path) -> None:
    """The error is the failed rank's and nothing else, and no rank is left, though the others would sleep on."""
    with pytest.raises(RuntimeError, match=says):
        run_ranks(_fail_on_one, 3, tmp_path, how)
    assert len(pids(tmp_path)) == 3
    assert not any(map(alive, pids(tmp_path)))


RESULTS = """<testsuites><testsuite name="pytest">
<testcase classname="tests.actor.test_x" name="test_slow[tp2]" time="12.34" />
<testcase classname="tests.test_y" name="test_quick" time="0.26" />
</testsuite></testsuites>"""


def test_the_longest_tests_are_written_into_the_page(tmp_path: Path) -> None:
    """Between the markers, longest first, and what stands around them stays; without markers nothing is written."""
    results, page = tmp_path / "test.xml", tmp_path / "page.md"
    results.write_text(RESULTS)
    page.write_text(f"before\n{durations.BEGIN}old\n{durations.END}after\n")
    durations.rewrite(page, durations.table(results))
    lines = page.read_text().splitlines()
    assert lines[0] == "before"
    assert lines[2] == "2 tests, 13 s of tests in all. The 2 longest:"
    assert lines[6:8] == [
        "| 12.3 | `tests/actor/test_x.py::test_slow[tp2]` |",
        "| 0.3 | `tests/test_y.py::test_quick` |",
    ]
    assert lines[-1] == "after"
    page.write_text("nothing")
    with pytest.raises(ValueError, match="must have a line '<!-- durations -->'"):
        durations.rewrite(page, "")
