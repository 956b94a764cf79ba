"""Code, messages, comments and documentation use one term for a concept; former terms do not return."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SEARCHED = ("megatron_fipo", "csrc", "docs", "examples", "slurm", "README.md")
SUFFIXES = {".py", ".html", ".h", ".cpp", ".cu", ".cuh", ".md", ".yaml", ".sh", ".env"}

# Where former names are listed, in order to be read.
ALIASES = {"megatron_fipo/former_names.py"}
SECTION = ("docs/metrics.md", "## Former names")

# Current term -> former ones, as regular expressions. Only words that have no other use here.
TERMS = {
    "sample, generate": r"\bdr[ae]wn? (?:the |a |all )?(?:responses?|tokens?|prompts?|samples?)\b"
    r"|\b(?:responses?|tokens?|samples?|batch(?:es)?) (?:is|are|was|were) drawn\b|\bdrawn (?:anew|ahead)\b",
    "all_correct, all_incorrect, correct, incorrect": r"all_(?:right|wrong)\b"
    r"|\blength/(?:right|wrong)|\b(?:right|wrong)_median\b",
    "generated/reward, ...": r"\breward/(?:mean|accuracy|verifier_)",
    "approx_kl": r"\bpolicy_kl\b|\bkPolicyKl\b",
    "mismatch/abs_mean, ...": r"\brollout_mismatch_(?:abs|k1|k3|outside_fraction|ratio)",
    "metadata": r"\btold\b",
    "local": r"\bmine\b",
    "supervisor, managed server": r"\b[Kk]eepers?\b",
    "score": r"\bverdicts?\b|\bjudge[sd]?\b",
    "log tail": r"\blast words\b",
    "placement": r"\bclass Place\b|\bplaces\(",
    "pending request, dispatch, probe, timeouts": r"\bpatience\b|\bhands? out\b|\b_hand_out\b|\b_Turn\b|\b_look_at\b",
    "random data": r"\bmade-up\b",
    "user error": r"\bto mend\b|\bis mended\b",
    "must be one of, not available": r"\bis none of\b|\bnot to be had\b",
    "outcome": r"\b(?:what )?became of\b|\bwhat becomes of\b",
    "shut down cleanly": r"\bin good order\b",
    "without reporting an error": r"\bwithout a word\b",
    "node-hours are spent": r"\bnodes? (?:is|are|were) burnt\b|\bburnt\b",
    "partial response; in-flight target; prefetch, drain": r"\bdrafts?\b|\bgoals?\b|\bstart_next\b|\bis_ahead\b",
    "reaches 0.54x the throughput": r"\bdraws at\b",
    "free_gb, skipped, extents, staging": r"\bspare_gb\b|\"left_out\"|\"places\"|name\}\.unfinished",
    "fast_path, BlockStats, kMinimal": r"\b[Cc]alm\b|\bkCalm|\bSurvey\b|\bkBare\b",
    "bit_and, bit_or, and_not": r"\bLanes::(?:both|either|without)\b",
    "ThreadCoords, finalize_segment": r"\bPlace<|\bsettle(?:_long_segment)?\(",
    "clip bound tolerance": r"\b(?:PINNED|kPinned\w*|pinned_(?:low|high|upper|lower))\b",
}


def _files() -> Iterator[Path]:
    for name in SEARCHED:
        path = ROOT / name
        found = [path] if path.is_file() else sorted(path.rglob("*"))
        yield from (f for f in found if f.is_file() and f.suffix in SUFFIXES)


def _text(path: Path) -> str:
    """Return a file's text without its list of former names."""
    name = str(path.relative_to(ROOT))
    if name in ALIASES:
        return ""
    return path.read_text().partition(SECTION[1])[0] if name == SECTION[0] else path.read_text()


@pytest.mark.parametrize("term", TERMS)
def test_former_terms_are_gone(term: str) -> None:
    """No file of the package, the kernels, the documentation, the examples or the scripts has a former term."""
    former = re.compile(TERMS[term])
    hits = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in _files()
        for number, line in enumerate(_text(path).splitlines(), start=1)
        if former.search(line)
    ]
    assert not hits, f"say {term}:\n" + "\n".join(hits)


def test_files_are_found() -> None:
    """The search covers every part of the project."""
    found = {path.relative_to(ROOT).parts[0] for path in _files()}
    assert found == set(SEARCHED)
    assert len(list(_files())) > 250


@pytest.mark.parametrize(
    ("term", "line"),
    [
        ("sample, generate", "a response could not be sampled: tokens were drawn with other weights"),
        ("all_correct, all_incorrect, correct, incorrect", '"sampling/groups_all_right"'),
        ("all_correct, all_incorrect, correct, incorrect", '"eval/length/wrong_median"'),
        ("mismatch/abs_mean, ...", '"mismatch/rollout_mismatch_abs_max"'),
        ("must be one of, not available", "--dtype 'fp8' is none of bf16, fp16"),
        ("placement", "class Place:"),
        ("bit_and, bit_or, and_not", "Lanes::without(mask, high)"),
    ],
)
def test_former_terms_are_recognized(term: str, line: str) -> None:
    """A line with a former term is a hit."""
    assert re.search(TERMS[term], line)


@pytest.mark.parametrize(
    "line",
    [
        "markers are drawn over the line",
        "the legend is drawn above the panel",
        "a pinned block of memory",
        "a quiet learning rate",
    ],
)
def test_other_uses_stay(line: str) -> None:
    """Ordinary uses of the same words are not hits."""
    assert not any(re.search(former, line) for former in TERMS.values())


def test_docstrings_say_what_the_thing_is_or_does() -> None:
    """No docstring of the project begins with "Of", "What", "Those" or "As"."""
    riddle = re.compile(r'^\s*r?"""(?:Of|What|Those|As) ')
    files = [
        p for folder in ("megatron_fipo", "tests", "benchmarks", "examples") for p in (ROOT / folder).rglob("*.py")
    ]
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in [*files, ROOT / "setup.py", ROOT / "docs" / "pages.py"]
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if riddle.match(line)
    ]
    assert not found, "\n".join(found)
