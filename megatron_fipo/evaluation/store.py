"""Directory of an evaluation: finished samples, from which an interrupted evaluation continues, and its results.

settings.json          settings that the samples depend on
samples/*.parquet      finished samples, several per file, each file written atomically
samples.parquet        a row per sample, with prompt, ground truth and answer class
problems.parquet       a row per problem
summary.json           the metrics
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

from megatron_fipo.atomic_file import read_json, time_in, write_atomically, write_table
from megatron_fipo.config import Config
from megatron_fipo.data import PromptSet
from megatron_fipo.evaluation.problem_table import problem_table
from megatron_fipo.evaluation.sample import Sample, full_table, read_samples, sample_table
from megatron_fipo.evaluation.summary import Evaluation
from megatron_fipo.former_names import SAMPLES, current_evaluation_settings, problems_setting

_BLOCKS, _BLOCK_BYTES = 64, 1 << 16  # blocks of each weight file that are hashed: 32B parameters are 65 GB
START, WEIGHTS = "start_time", "weights_fingerprint"  # keys of settings.json, with those of `problems_setting`
_WEIGHT_FILES = ("*.safetensors", "*.distcp")


class Store:
    """Store of samples. All ranks may add samples concurrently; everything else is done by rank 0."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._samples = directory / "samples"
        self._settings_file = directory / "settings.json"
        self._rows: dict[Path, int] = {}

    def began(self) -> datetime:
        """Return the time used by chat templates: the evaluation's start, or now if it has not begun."""
        start = self._settings().get(START)
        return time_in(self._settings_file, start) if start else datetime.now()

    def claim(self, settings: Mapping[str, Any], write: bool = True) -> None:
        """Claim the directory for samples with these `settings`. Benchmarks can be added later.

        Raises:
            ValueError: it contains samples with other settings.
        """
        held = self._settings()
        names = held.keys() & settings.keys()
        different = [f"  - {n}: {held[n]} -> {settings[n]}" for n in sorted(names) if held[n] != settings[n]]
        if different:
            listed = "\n".join(different)
            raise ValueError(
                f"{self.directory} contains samples with other settings:\n{listed}\n"
                f"Restore these settings, choose another --out, or remove {self.directory} to start over"
            )
        if write:
            self._samples.mkdir(parents=True, exist_ok=True)
            write_atomically(self._settings_file, _json({**held, **settings}))

    def add(self, samples: Sequence[Sample]) -> None:
        """Save finished samples. No two files share a sample, so the first one names the file."""
        benchmark, problem, number = min(sample.key for sample in samples)
        write_table(sample_table(samples), self._samples / f"{benchmark}-{problem}-{number}.parquet")

    def read(self) -> list[Sample]:
        """Return all finished samples, including those of earlier evaluations with the same settings."""
        return [sample for file in self._files() for sample in read_samples(file)]

    def count(self) -> int:
        """Return the number of samples without reading them."""
        for file in self._files():
            if file not in self._rows:
                self._rows[file] = pq.read_metadata(file).num_rows
        return sum(self._rows.values())

    def finish(
        self, result: Evaluation, samples: Sequence[Sample], benchmarks: Mapping[str, PromptSet], weights: str
    ) -> None:
        """Write the tables and the metrics."""
        write_table(full_table(samples, benchmarks), self.directory / "samples.parquet")
        write_table(problem_table(samples, benchmarks), self.directory / "problems.parquet")
        content = {"weights": weights, **result.scores(), **asdict(result)}
        write_atomically(self.directory / "summary.json", _json(content))

    def _settings(self) -> dict[str, Any]:
        return current_evaluation_settings(read_json(self._settings_file)) if self._settings_file.exists() else {}

    def _files(self) -> list[Path]:
        folders = (self._samples, self.directory / SAMPLES)
        return sorted(file for folder in folders for file in folder.glob("[!.]*.parquet"))


def settings_of(config: Config, benchmarks: Mapping[str, PromptSet], began: datetime | None = None) -> dict[str, Any]:
    """Return the settings that a sample depends on, by user-visible names; layout and k are not included."""
    settings = {
        **({START: began.isoformat()} if began else {}),
        WEIGHTS: weights_fingerprint(Path(config.model.megatron_path or config.model.hf_path)),
        "model.dtype": config.model.dtype,
        "model.overrides": config.model.overrides,
        "rollout.engine": config.rollout.engine,
        "rollout.max_response_tokens": config.rollout.max_response_tokens,
        "eval.temperature": config.eval.temperature,
        "eval.top_p": config.eval.top_p,
        "run.seed": config.run.seed,
        "reward.function": config.reward.function,
        **{problems_setting(name): prompts.fingerprint for name, prompts in benchmarks.items()},
    }
    return json.loads(json.dumps(settings))


def weights_fingerprint(directory: Path) -> str:
    """Return a hash of a checkpoint's weights that does not depend on its path.

    Only parts of each file are hashed, since an update changes values everywhere.
    """
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
