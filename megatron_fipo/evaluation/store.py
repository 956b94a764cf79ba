"""The directory of an evaluation: finished samples from which the same command goes on, and what came of them.

settings.json          what the samples depend on
drawn/*.parquet        finished samples, some in a file, each file written whole
samples.parquet        a row a sample, with prompt, ground truth and class of its answer
problems.parquet       a row a problem
summary.json           the figures
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from megatron_fipo.config import Config
from megatron_fipo.data import PromptSet
from megatron_fipo.evaluation.problem_table import problem_table
from megatron_fipo.evaluation.sample import Sample, full_table, read_samples, sample_table
from megatron_fipo.evaluation.summary import Evaluation
from megatron_fipo.whole_file import read_object, time_in, write_table, write_whole

_BLOCKS, _BLOCK_BYTES = 64, 1 << 16  # of each weight file that are looked at: 32B parameters are 65 GB
BEGAN = "the evaluation's beginning"
_WEIGHT_FILES = ("*.safetensors", "*.distcp")


class Store:
    """All ranks may add samples at the same time; the rest is rank 0's."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._drawn = directory / "drawn"
        self._rows: dict[Path, int] = {}

    def began(self) -> datetime:
        """Return the time that chat templates are told: of the evaluation's beginning, now if it has not begun."""
        path = self.directory / "settings.json"
        kept = read_object(path).get(BEGAN) if path.exists() else None
        return time_in(path, kept) if kept else datetime.now()

    def claim(self, settings: Mapping[str, Any], write: bool = True) -> None:
        """Make this the directory of samples that depend on `settings`. More benchmarks may come later.

        Raises:
            ValueError: it holds samples of other settings.
        """
        path = self.directory / "settings.json"
        held = read_object(path) if path.exists() else {}
        names = held.keys() & settings.keys() if held else ()
        different = [f"  - {n}: {held[n]} -> {settings[n]}" for n in sorted(names) if held[n] != settings[n]]
        if different:
            listed = "\n".join(different)
            raise ValueError(
                f"{self.directory} holds samples that were drawn with other settings:\n{listed}\n"
                f"Go back to them, give another --out, or remove {self.directory} to start anew"
            )
        if write:
            self._drawn.mkdir(parents=True, exist_ok=True)
            write_whole(path, _json({**held, **settings}))

    def add(self, samples: Sequence[Sample]) -> None:
        """Keep finished samples. No two files share one, so the first one names the file."""
        benchmark, problem, number = min(sample.key for sample in samples)
        write_table(sample_table(samples), self._drawn / f"{benchmark}-{problem}-{number}.parquet")

    def read(self) -> list[Sample]:
        """All finished samples, of this evaluation and of others with the same settings."""
        return [sample for file in self._files() for sample in read_samples(file)]

    def count(self) -> int:
        """How many there are, without reading them."""
        for file in self._files():
            if file not in self._rows:
                self._rows[file] = pq.read_metadata(file).num_rows
        return sum(self._rows.values())

    def finish(
        self, result: Evaluation, samples: Sequence[Sample], benchmarks: Mapping[str, PromptSet], weights: str
    ) -> None:
        """Write the tables and the figures."""
        write_table(full_table(samples, benchmarks), self.directory / "samples.parquet")
        write_table(problem_table(samples, benchmarks), self.directory / "problems.parquet")
        content = {"weights": weights, **result.scores(), **asdict(result)}
        write_whole(self.directory / "summary.json", _json(content))

    def _files(self) -> list[Path]:
        return sorted(self._drawn.glob("[!.]*.parquet"))


def settings_of(config: Config, benchmarks: Mapping[str, PromptSet], began: datetime | None = None) -> dict[str, Any]:
    """What a sample depends on, by the names that a user knows; the layout and k are not among it."""
    settings = {
        **({BEGAN: began.isoformat()} if began else {}),
        "the weights": weights_fingerprint(Path(config.model.megatron_path or config.model.hf_path)),
        "model.dtype": config.model.dtype,
        "model.overrides": config.model.overrides,
        "rollout.engine": config.rollout.engine,
        "rollout.max_response_tokens": config.rollout.max_response_tokens,
        "eval.temperature": config.eval.temperature,
        "eval.top_p": config.eval.top_p,
        "run.seed": config.run.seed,
        "reward.function": config.reward.function,
        **{f"the problems of {name}": prompts.fingerprint for name, prompts in benchmarks.items()},
    }
    return json.loads(json.dumps(settings))


def weights_fingerprint(directory: Path) -> str:
    """Changes with the weights of a checkpoint, and not with its place. Parts of each file stand for the whole: an
    update changes numbers everywhere."""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(file for pattern in _WEIGHT_FILES for file in directory.glob(pattern)):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with open(file, "rb") as stream:
            for block in range(_BLOCKS):
                stream.seek(max(0, size - _BLOCK_BYTES) * block // (_BLOCKS - 1))
                digest.update(stream.read(_BLOCK_BYTES))
    return digest.hexdigest()


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"
