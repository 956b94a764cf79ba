"""`eval` with a real vLLM server on the CPU, by the command: the embedded engine's samples, and no server left over."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import pytest

from megatron_fipo.config import to_yaml
from megatron_fipo.evaluation.store import Store
from tests.support.policies import make_config, make_task, quickstart_script

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[3]
PROBLEMS, HANDED_ON = 128, 64  # in all; responses that are judged and kept together
SECONDS = 600.0  # for a command to come so far, whatever else the machine does
GONE_SECONDS = 120.0  # for Python's resource trackers to clean up behind the processes of a server
VLLM = ("rollout.engine=vllm", "rollout.server.kv_cache_gb=0.0625")


class Evaluation(NamedTuple):
    """`megatron-fipo eval` in a working directory of its own, which it leaves its samples in, too.

    The directory tells its processes from all others: they keep it, whatever they call themselves.
    """

    config: Path
    out: Path

    @contextmanager
    def started(self, *overrides: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
        """The command; when this ends, neither it nor a process that it started is left."""
        self.out.mkdir(exist_ok=True)
        arguments = ["eval", str(self.config), *overrides, "--out", str(self.out)]
        ours = {"PYTHONPATH": str(ROOT), "FIPO_TEST_COUNTS": str(self.counts)}
        with (self.out / "said").open("w") as said:
            process = subprocess.Popen(
                [sys.executable, "-m", "megatron_fipo.cli", *arguments],
                stdout=said,
                stderr=said,
                cwd=self.out,
                env={**os.environ, **ours, **environment},
            )
        try:
            yield process
        finally:
            process.kill()
            process.wait()
            for pid in self.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def run(self, *overrides: str, **environment: str) -> tuple[int, list[str]]:
        """The command's exit code, and the command lines of the processes that outlived it."""
        with self.started(*overrides, **environment) as process:
            return process.wait(timeout=SECONDS), self.left_over()

    @property
    def counts(self) -> Path:
        return self.out / "counts"

    def said(self) -> str:
        return (self.out / "said").read_text()

    def judged(self) -> list[int]:
        """How many responses were judged at each call."""
        return [int(line) for line in self.counts.read_text().splitlines()] if self.counts.exists() else []

    def await_judging(self, process: subprocess.Popen[bytes]) -> None:
        """Until the first responses have come."""
        deadline = time.monotonic() + SECONDS
        while not self.judged():
            assert process.poll() is None, self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.1)

    def processes(self) -> dict[int, str]:
        """Command lines of those that are in its directory, by process."""
        found = {}
        for place in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                if (place / "cwd").readlink() == self.out:
                    found[int(place.name)] = (place / "cmdline").read_text().replace("\0", " ")
        return found

    def left_over(self) -> list[str]:
        deadline = time.monotonic() + GONE_SECONDS
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.1)
        return list(self.processes().values())

    def result(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The figures, and a row a sample."""
        summary = json.loads((self.out / "summary.json").read_text())
        return summary, pq.read_table(self.out / "samples.parquet").to_pylist()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The greedy answer of a random float32 policy to each of many problems, few at a time."""
    home = tmp_path_factory.mktemp("evaluation")
    base, quickstart = make_task(home / "base"), quickstart_script()
    problems = quickstart.distinct_problems(random.Random(3), PROBLEMS, held=True)
    quickstart.write_problems(problems, home / "problems.parquet")
    settings = make_config(
        base,
        run={"directory": str(home / "run")},
        data={"train": "unused", "validation": str(home / "problems.parquet"), "max_prompt_tokens": 16},
        rollout={"max_response_tokens": 16, "batch_size": 32, "server": {"max_num_seqs": 8}},
        reward={"function": "tests.support.samples:counted_parity", "overlong_buffer_tokens": 0},
        eval={"samples": 1, "temperature": 0.0, "top_p": 1.0},
    )
    (home / "config.yaml").write_text(to_yaml(settings))
    return home / "config.yaml"


@pytest.fixture(scope="module")
def embedded(config: Path) -> Evaluation:
    """One with the embedded engine."""
    evaluation = Evaluation(config, config.parent / "embedded")
    assert evaluation.run("rollout.engine=hf") == (0, []), evaluation.said()
    return evaluation


class Stopped(NamedTuple):
    """Attributes:
    servers: command lines of vLLM's processes before.
    left_over: of all its processes after.
    kept, judged: samples in its store, responses that came to be judged.
    """

    evaluation: Evaluation
    exit_code: int
    servers: list[str]
    left_over: list[str]
    kept: int
    judged: int


@pytest.fixture(scope="module")
def stopped(config: Path) -> Stopped:
    """One with a server, signalled while it judged the first responses."""
    evaluation = Evaluation(config, config.parent / "served")
    with evaluation.started(*VLLM, FIPO_TEST_WAIT_AT="1") as process:
        evaluation.await_judging(process)
        servers = [line for line in evaluation.processes().values() if "vllm" in line.lower()]
        process.send_signal(signal.SIGUSR1)
        exit_code, left_over = process.wait(timeout=SECONDS), evaluation.left_over()
    kept, judged = Store(evaluation.out).count(), sum(evaluation.judged())
    return Stopped(evaluation, exit_code, servers, left_over, kept, judged)


def test_signalled(stopped: Stopped) -> None:
    """It ends its server and says that the same command goes on; what was judged is kept, and is not everything."""
    assert stopped.exit_code == 75, stopped.evaluation.said()
    assert len(stopped.servers) >= 3, stopped.servers  # two guards, the server, its engine
    assert stopped.left_over == []
    assert HANDED_ON <= stopped.kept == stopped.judged < PROBLEMS


def test_goes_on(stopped: Stopped, embedded: Evaluation) -> None:
    """The same command draws what is not there, and has the tokens, verdicts and figures of the embedded engine."""
    evaluation = stopped.evaluation
    assert evaluation.run(*VLLM) == (0, []), evaluation.said()
    assert sum(evaluation.judged()) == PROBLEMS
    assert f"{stopped.kept} of {PROBLEMS} samples are already finished" in evaluation.said()
    figures, rows = evaluation.result()
    assert len({row["response"] for row in rows}) > PROBLEMS / 8
    assert 0.2 < figures["avg@k"] < 0.8
    assert (figures, rows) == embedded.result()


def test_failure(config: Path) -> None:
    """Where judging raises, the command fails, and its server is gone all the same."""
    evaluation = Evaluation(config, config.parent / "failed")
    assert evaluation.run(*VLLM, FIPO_TEST_STOP_AT="1") == (1, []), evaluation.said()
    assert "1 rollout servers of vllm" in evaluation.said()
    assert "stopped as the test wants it" in evaluation.said()
