import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from megatron_fipo.config import RewardConfig
from megatron_fipo.reward import Score, make_reward, math
from megatron_fipo.reward.math import extract_answer
from tests.support.waiting import PATIENCE

TIMEOUT = 4.0  # a busy machine takes a second for an easy answer


@pytest.fixture(scope="module")
def reward():
    """A verifier with one worker process and a short limit."""
    verifier = make_reward(RewardConfig(function="math", workers=1, timeout_seconds=TIMEOUT))
    yield verifier
    verifier.close()


def accuracy(reward, response, truth):
    (score,) = reward([response], [truth], ["test"])
    assert score.reward == 2 * score.accuracy - 1
    return score.accuracy


def workers():
    """The worker processes of this one that run."""
    return [p for p in psutil.Process().children() if _is_worker(p)]


def _is_worker(process):
    try:
        return process.status() != psutil.STATUS_ZOMBIE and "math_worker.py" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # it ended between the two looks; a zombie counts as such
        return False


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"so \boxed{34}", "34"),
        (r"\boxed{1}, no: \boxed{2}", "2"),
        (r"\boxed{1} and \boxed{2}", "1, 2"),
        (r"$\boxed{1}$, $\boxed{2}$ or $\boxed{1}$.", "1, 2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\boxed{3}}", r"\boxed{3}"),
        (r"\fbox{3}", "3"),
        (r"\boxed{5} and so \boxed{6", None),
        (r"\boxed{12", None),
        ("the result is 12", None),
        ("Answer: $\\frac{1}{2}$.", r"\frac{1}{2}"),
        ("**Answer:** 34", "34"),
        (r"Answer: \boxed{34}", "34"),
        ("\\boxed{33}\n\nAnswer: 34", "34"),
        ("Answer: 33\n\\boxed{34}", "34"),
        (r"\boxed{[1, 2)}", "[1, 2)"),
        ("", None),
    ],
)
def test_extract_answer(response, answer):
    """The last box or `Answer:` line, whichever is later, if it is finished; neighbouring boxes are one list."""
    assert extract_answer(response) == answer


def test_extraction_is_linear():
    """A megabyte of opened boxes, or of nested ones, takes well under a second of this process each."""
    started = time.process_time()
    assert extract_answer(r"\boxed{" * 150_000) is None
    assert extract_answer(r"\boxed{" * 120_000 + "1" + "}" * 120_000).endswith("}")
    assert extract_answer("{" * 1_000_000) is None
    assert extract_answer(r"\boxed{a" + "." * 500_000 + "b}") == "a" + "." * 500_000 + "b"
    assert extract_answer(r"\boxed{1}" + " " * 500_000 + r"x\boxed{2}") == "2"
    assert extract_answer(r"\boxed{" + r"\] " * 200_000 + "x}").endswith("x")
    assert time.process_time() - started < 5.0


@pytest.mark.parametrize(
    ("response", "truth", "expected"),
    [
        (r"\boxed{0.5}", r"\frac{1}{2}", 1),
        (r"\boxed{\frac12}", "0.5", 1),
        (r"\boxed{1/2}", r"\frac12", 1),
        (r"\boxed{\sqrt{8}}", r"2\sqrt{2}", 1),
        (r"\boxed{x^2+2x+1}", "(x+1)^2", 1),
        (r"\boxed{x=5}", "5", 1),
        (r"\boxed{12\text{ cm}}", "12", 1),
        (r"\boxed{1,000}", "1000", 1),
        (r"\boxed{50\%}", "0.5", 1),
        (r"\boxed{50\%}", "50", 1),
        (r"\boxed{[1,2)}", "[1, 2)", 1),
        (r"\boxed{[1,2]}", "[1, 2)", 0),
        (r"\boxed{(2,1)}", "(1,2)", 0),
        (r"\boxed{\{1,2\}}", r"\{2,1\}", 1),
        (r"\boxed{1} and \boxed{2}", r"\{1, 2\}", 1),
        (r"\boxed{1} and \boxed{2}", "2", 0),
        (r"\boxed{\boxed{3}}", "3", 1),
        ("Answer: $\\frac{1}{2}$.", "0.5", 1),
        (r"\boxed{100000000000000000000}", "10^{20}", 1),
        (r"\boxed{\begin{pmatrix}1&2\end{pmatrix}}", r"\begin{bmatrix}1&2\end{bmatrix}", 1),
        (r"\boxed{½ 🙂 \ud800}", "7", 0),
        (r"\boxed{}", "7", 0),
        (r"\boxed{7", "7", 0),
        ("it is 7", "7", 0),
        (r"\boxed{8}", "7", 0),
    ],
)
def test_equivalence(reward, response, truth, expected):
    """Equivalent forms are right, different values and truncated or missing answers wrong."""
    assert accuracy(reward, response, truth) == expected


@pytest.mark.slow
@pytest.mark.parametrize("answer", [r"10^{10^{10}}", r"9^{9^{9^{9}}}", "(" * 900 + "1" + ")" * 900])
def test_runaway_answers_cost_only_themselves(reward, answer):
    """An answer that would run for ever or fill the memory is wrong within the limit; the next one is judged."""
    accuracy(reward, r"\boxed{0.5}", "1/2")  # the worker is up
    assert accuracy(reward, rf"\boxed{{{answer}}}", "7") == 0.0
    assert accuracy(reward, r"\boxed{0.5}", "1/2") == 1.0


def test_huge_answers_never_reach_a_worker(reward, monkeypatch):
    """A megabyte of digits is wrong at once, and right if it is the ground truth to the letter."""
    digits = "9" * 1_000_000
    monkeypatch.setattr(math._Worker, "ask", lambda *question: pytest.fail("a worker was asked"))
    assert accuracy(reward, rf"\boxed{{{digits}}}", "7") == 0.0
    assert accuracy(reward, rf"\boxed{{{digits}}}", digits) == 1.0


def test_killed_worker_is_replaced(reward):
    """A worker killed between two calls, or during one, leaves the next answers judged as ever."""
    accuracy(reward, r"\boxed{0.5}", "1/2")
    workers()[0].kill()
    while workers():
        time.sleep(0.01)
    assert accuracy(reward, r"\boxed{0.25}", "1/4") == 1.0
    (worker,) = workers()
    threading.Timer(0.5, worker.kill).start()
    assert accuracy(reward, r"\boxed{10^{10^{10}}}", "7") == 0.0
    assert accuracy(reward, r"\boxed{0.75}", "3/4") == 1.0


def test_stopped_worker_is_ended_by_the_parent(reward):
    """The limit holds from outside: a worker that cannot even receive its own alarm is wrong in time."""
    accuracy(reward, r"\boxed{0.5}", "1/2")
    (worker,) = workers()
    worker.send_signal(signal.SIGSTOP)
    assert accuracy(reward, r"\boxed{1.5}", "3/2") == 0.0
    assert accuracy(reward, r"\boxed{1.5}", "3/2") == 1.0


def test_order_and_off_the_main_thread():
    """Two workers, many answers, called from a thread: every score stands where its response does."""
    verifier = make_reward(RewardConfig(function="math", workers=2, timeout_seconds=20.0))
    responses = [rf"\boxed{{{i}/2}}" for i in range(40)]
    truths = [str(i / 2) if i % 3 else "-1" for i in range(40)]
    scores: list[Score] = []
    thread = threading.Thread(target=lambda: scores.extend(verifier(responses, truths, [""] * 40)))
    thread.start()
    thread.join()
    verifier.close()
    assert [s.accuracy for s in scores] == [float(i % 3 != 0) for i in range(40)]


def test_lazy_start_and_close():
    """No process before the first question that needs one, and none after `close()`, which may be repeated."""
    before = len(workers())
    verifier = make_reward(RewardConfig(function="math", workers=1, timeout_seconds=20.0))
    assert accuracy(verifier, r"\boxed{7}", "7") == 1.0  # equal to the letter
    assert len(workers()) == before
    assert accuracy(verifier, r"\boxed{7.0}", "7") == 1.0
    assert len(workers()) == before + 1
    verifier.close()
    verifier.close()
    assert len(workers()) == before


ORPHANING = """
import os, sys, threading, time
from megatron_fipo.config import RewardConfig
from megatron_fipo.reward import make_reward
reward = make_reward(RewardConfig(function="math", workers=2, timeout_seconds=3.0))
reward([r"\\boxed{0.5}"], ["1/2"], [""])
busy = r"\\boxed{10^{10^{10}}}"
threading.Thread(target=reward, args=([busy], ["7"], [""]), daemon=True).start()
time.sleep(0.5)
reward([r"\\boxed{0.25}"], ["1/4"], [""])
print("ready", flush=True)
time.sleep(60)
"""


def test_workers_do_not_outlive_a_killed_parent():
    """When the parent is killed, an idle worker ends at once and a busy one within its limit."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", ORPHANING]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n"
        children = psutil.Process(parent.pid).children()
        assert len(children) == 2
        parent.kill()
    gone, alive = psutil.wait_procs(children, timeout=PATIENCE)
    assert (len(gone), alive) == (2, [])
