"""New weights on all servers: one version at a time, whole or not at all.

A server is paused and its weights carry the version `unfinished` from before the first tensor until all have arrived,
so that no response of mixed weights is accepted. A server on which that fails keeps that version,
and is restarted by its supervisor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from megatron_fipo.rollout.vllm.buckets import Bucket, buckets
from megatron_fipo.rollout.vllm.control import UNFINISHED, Control, ControlError
from megatron_fipo.rollout.vllm.transport import TRANSFER_SECONDS, Transport

_SECONDS = 120.0  # for a control route to answer


class Update:
    """This rank's part of one update.

    Args:
        targets: the servers that this rank feeds and that can take weights, with their incarnations.
        checked: send checksums, and compare what was loaded with what was sent.
    """

    def __init__(
        self,
        transport: Transport,
        version: str,
        targets: Mapping[int, tuple[Control, int]],
        checked: bool,
    ) -> None:
        self.failures: dict[int, str] = {}
        self.problem: str | None = None  # of this rank, so that no server got the weights
        self.compared = (0, 0)  # parameters compared on one server, tensors received there
        self.checked = checked
        self._transport = transport
        self._version = version
        self._targets = dict(targets)

    def run(self, weights: Iterator[tuple[str, torch.Tensor]], limit: int) -> None:
        """Send everything, in buckets of `limit` bytes.

        All tensors are consumed whatever happens, since taking the next one is a collective over ranks; what went wrong
        is in `failures` and `problem`.
        """
        with ThreadPoolExecutor(max(1, len(self._targets))) as pool:
            self._on_all(pool, self._begin)
            for number, bucket in enumerate(buckets(weights, limit)):
                metadata = self._stage(number, bucket)
                if metadata is not None:
                    self._on_all(
                        pool,
                        lambda s, control, incarnation, metadata=metadata: self._transport.deliver(
                            s, control, metadata
                        ),
                    )
            if self.problem is None:
                self._on_all(pool, lambda s, control, incarnation: self._complete(control))
        self._transport.finish(self._version, self.problem is None)

    def _on_all(self, pool: ThreadPoolExecutor, action: Callable[..., None]) -> None:
        """Run `action` on all servers at the same time; later calls skip those that fail."""
        futures = {s: pool.submit(action, s, *target) for s, target in self._targets.items()}
        for server, future in futures.items():
            try:
                future.result()
            except (ControlError, RuntimeError) as error:  # torch's collectives raise RuntimeError
                self.failures[server] = str(error)
                del self._targets[server]

    def _begin(self, server: int, control: Control, incarnation: int) -> None:
        begin(control)
        self._transport.connect(server, control, incarnation)
        control.post("/start_weight_update", timeout=_SECONDS)

    def _stage(self, number: int, bucket: Bucket) -> dict[str, Any] | None:
        if self.problem is not None:
            return None
        try:
            return self._transport.stage(self._version, number, bucket, self.checked)
        except OSError as error:
            self.problem = f"weights could not be written: {error}"
            return None

    def _complete(self, control: Control) -> None:
        self.compared = complete(control, self._version, self.checked)


def begin(control: Control) -> None:
    """Pause the server; its responses do not count until `complete`."""
    control.post("/pause", timeout=_SECONDS, mode="keep")
    control.post("/update_weight_version", {"new_version": UNFINISHED}, timeout=_SECONDS)


def complete(control: Control, version: str, checked: bool) -> tuple[int, int]:
    """Finish the update; return the number of parameters compared and of tensors received, if `checked`.

    Raises:
        ControlError: the server failed, or holds other weights than it received.
    """
    control.post("/finish_weight_update", timeout=TRANSFER_SECONDS)
    results = control.loaded(_SECONDS) if checked else []
    different = [name for result in results for name in result["different"]]
    if different:
        raise ControlError(f"{control.url} does not compute with the weights it got: {', '.join(different[:5])}")
    # The cache is of the old weights. vLLM 0.32 drops it at the pause, except for what paused requests hold.
    reset = control.post("/reset_prefix_cache", timeout=_SECONDS, reset_running_requests="true")
    if reset.get("success") is False:
        raise ControlError(f"{control.url} still holds a cache of the old weights: /reset_prefix_cache failed")
    control.post("/update_weight_version", {"new_version": version}, timeout=_SECONDS)
    control.post("/resume", timeout=_SECONDS)
    return (results[0]["compared"], results[0]["received"]) if results else (0, 0)


def reload(control: Control, version: str, metadata: list[dict[str, Any]]) -> None:
    """Load a version into a restarted server, from the files in `metadata`; checked where those have checksums.

    Raises:
        ControlError: it did not take them.
    """
    begin(control)
    control.post("/init_weight_transfer_engine", {"init_info": {"transport": "file"}}, timeout=_SECONDS)
    control.post("/start_weight_update", timeout=_SECONDS)
    for update_info in metadata:
        control.post("/update_weights", {"update_info": update_info}, timeout=TRANSFER_SECONDS)
    complete(control, version, checked=all(update_info["checksums"] for update_info in metadata))
