"""Former names and defaults of settings: an old run's saved configuration is read through them.

A user's file must have the current names, and gets the current defaults.
"""

from __future__ import annotations

import re
from typing import Any

RENAMED = {
    "rollout.placement": "rollout.server.placement",
    "rollout.num_servers": "rollout.server.count",
    "rollout.nodes": "rollout.server.nodes",
    "rollout.gpus_per_node": "rollout.server.gpus_per_node",
    "rollout.servers": "rollout.server.urls",
    "rollout.vllm_python": "rollout.server.python",
    "rollout.tensor_parallel": "rollout.server.tensor_parallel_size",
    "rollout.max_concurrency": "rollout.server.max_num_seqs",
    "rollout.gpu_memory_utilization": "rollout.server.gpu_memory_utilization",
    "rollout.kv_cache_gb": "rollout.server.kv_cache_gb",
    "rollout.prefix_cache": "rollout.server.enable_prefix_caching",
    "rollout.seeded": "rollout.server.seeded",
    "rollout.weight_transport": "rollout.server.weight_transport",
    "rollout.weight_bucket_mb": "rollout.server.weight_bucket_mb",
    "rollout.weight_directory": "rollout.server.weight_directory",
    "rollout.verify_weights": "rollout.server.verify_weights",
    "rollout.deadline_seconds": "rollout.server.request_timeout_seconds",
    "rollout.start_seconds": "rollout.server.start_timeout_seconds",
    "rollout.settle_seconds": "rollout.server.drain_timeout_seconds",
    "rollout.importance_sampling": "rollout.correction.importance_sampling",
    "rollout.importance_sampling_cap": "rollout.correction.importance_sampling_cap",
    "rollout.mismatch_warning": "rollout.correction.mismatch_warning",
}
# Values of a setting in runs that are older than it, where its default differs.
FORMER_DEFAULTS = {"trainer.mini_batch_order": "groups"}
_INTERPOLATION = re.compile(r"\$\{\s*([\w.]+)\s*\}")


def check_names(given: dict[Any, Any]) -> None:
    """Check that unresolved settings have their current names, also in interpolations.

    Raises:
        ValueError: some do not; the message has the current names.
    """
    found = {old for old in RENAMED if _parent(given, old) is not None} | {
        name for text in _texts(given) for name in _INTERPOLATION.findall(text) if name in RENAMED
    }
    if found:
        lines = "\n".join(f"  - {old} is now {new}" for old, new in RENAMED.items() if old in found)
        raise ValueError(f"renamed settings; use the new names:\n{lines}")


def with_current_names(saved: dict[Any, Any]) -> dict[Any, Any]:
    """Return a run's saved settings under their current names, with former defaults; `saved` is changed.

    Raises:
        ValueError: a setting has both names, or a section is no mapping.
    """
    for old, new in RENAMED.items():
        parent = _parent(saved, old)
        if parent is None:
            continue
        section, name = _section(saved, new)
        if name in section:
            raise ValueError(f"{old} is now {new}, and both are given; remove {old}")
        section[name] = parent.pop(old.rpartition(".")[2])
    for dotted, value in FORMER_DEFAULTS.items():
        section, name = _section(saved, dotted)
        section.setdefault(name, value)
    return saved


def _section(saved: dict[Any, Any], dotted: str) -> tuple[dict[Any, Any], str]:
    """Return the mapping of a setting, made if there is none, and the setting's name in it."""
    *sections, name = dotted.split(".")
    node: Any = saved
    for section in sections:
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise ValueError(f"{dotted.rpartition('.')[0]} must be a mapping, not {node!r}")
    return node, name


def _parent(given: Any, dotted: str) -> dict[Any, Any] | None:
    """Return the mapping that has the last part of a dotted name; None if there is none."""
    *sections, name = dotted.split(".")
    for section in sections:
        given = given.get(section) if isinstance(given, dict) else None
    return given if isinstance(given, dict) and name in given else None


def _texts(node: Any) -> list[str]:
    if isinstance(node, str):
        return [node]
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return [text for child in children for text in _texts(child)]
