"""Published data sets by name: file on the Hugging Face hub, revision and checksum."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import hf_hub_download


@dataclass(frozen=True)
class Published:
    repository: str  # dataset repository
    revision: str
    file: str
    sha256: str

    @property
    def url(self) -> str:
        return f"https://huggingface.co/datasets/{self.repository}/resolve/{self.revision}/{self.file}"


PUBLISHED = {
    "dapo-math-17k": Published(
        repository="BytedTsinghua-SIA/DAPO-Math-17k",
        revision="65877096c24ffa7abc4e4fa5edb95cf3413a5674",
        file="data/dapo-math-17k.parquet",  # 299 MB: 1.79 million rows, about 100 per problem
        sha256="534375d6bb8630d22ab46a56e11f2ffec1d288d8f7d04099bc82d68948705941",
    ),
    "aime-2024": Published(
        repository="BytedTsinghua-SIA/AIME-2024",
        revision="aa49075e24ad594b79fdf0bdcefa735c2181be67",
        file="data/aime-2024.parquet",  # 960 rows, 32 per problem
        sha256="12154e38a716d12db5731f9a022ae69a610c4f7d0e0dcc04e902887a686877e7",
    ),
    "aime-2025": Published(
        repository="math-ai/aime25",
        revision="563bb8404243c5f09de6ec262f2db674fe5bce9b",
        file="test.jsonl",  # bare questions, no repeats
        sha256="b4e273c02d3e7fe1b74b59eae768fc8230bfb0f79539890cb56f4361caac0331",
    ),
}


def fetch(name: str, output: Path) -> Path:
    """Return the file of a published set, downloaded into the hub's cache if needed.

    `output` is the path it will be prepared to, for the advice in errors.

    Raises:
        ValueError: the hub is unreachable, or the checksum is wrong; the message explains the manual download.
    """
    published = PUBLISHED[name]
    try:
        path = Path(
            hf_hub_download(published.repository, published.file, repo_type="dataset", revision=published.revision)
        )
    except OSError as error:  # the hub's errors are OSErrors
        raise ValueError(
            f"cannot download {name}: {' '.join(str(error).split())}\n"
            f"Download {published.url}\nmanually, and run: "
            f"megatron-fipo data prepare {Path(published.file).name} {output}"
        ) from None
    if (found := sha256_of(path)) != published.sha256:
        raise ValueError(
            f"{path} has checksum {found}, expected {published.sha256} for {name}: the download is damaged; "
            "remove that file and try again"
        )
    return path


def sha256_of(path: Path) -> str:
    """Return the SHA-256 checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
