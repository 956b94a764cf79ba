"""Time an operation on all ranks at once, since they share memory and links in training, too."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

_LEAST_SECONDS = 2e-3  # minimum duration of a sample; shorter operations are repeated within it
_SAMPLES = (3, 50)
_QUEUE_CYCLES = 200_000_000  # GPU sleep while launches queue up, about 0.1 s


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median over samples, then over ranks.

    Attributes:
        spread: interquartile range of the samples over their median, of the noisiest rank.
        waited: on some rank, launches meant to be queued waited for the device, so the seconds are the host's.
    """

    seconds: float
    spread: float
    samples: int
    waited: bool = False


class Bench:
    """Benchmark that all ranks of the default process group run together."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._waited = False

    def time(self, call: Callable[[], object], budget: float, queued: bool = False) -> Timing:
        """Time `call` in at least 3 samples, more if `budget` seconds allow.

        Args:
            queued: on a GPU, time kernels launched before the first one started. `Timing.waited` says that a call could
                not be queued because it waits for the device.
        """
        self._waited = False
        call()  # warm-up
        # All ranks take the same number of samples: by the slowest rank's time and the smallest budget.
        gathered = self._gather([self._sample(call, 1, queued), budget])
        first, budget = max(gathered[:, 0].max().item(), 1e-9), gathered[:, 1].min().item()
        inner = max(1, math.ceil(_LEAST_SECONDS / first))
        count = int(min(_SAMPLES[1], max(_SAMPLES[0], budget / (inner * first))))
        samples = torch.tensor([self._sample(call, inner, queued) for _ in range(count)], dtype=torch.float64)
        low, middle, high = samples.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
        found = self._gather([middle, (high - low) / middle, float(self._waited)])
        waited = bool(found[:, 2].any())
        return Timing(found[:, 0].median().item(), found[:, 1].max().item(), count, waited)

    def is_past(self, moment: float) -> bool:
        """Return whether any rank's monotonic clock has passed `moment`, so that all ranks stop together."""
        return self._gather([time.monotonic() - moment])[:, 0].max().item() > 0

    def _sample(self, call: Callable[[], object], inner: int, queued: bool) -> float:
        dist.barrier()
        if self.device.type == "cuda":
            return self._device_sample(call, inner, queued)
        start = time.perf_counter()
        for _ in range(inner):
            call()
        return (time.perf_counter() - start) / inner

    def _device_sample(self, call: Callable[[], object], inner: int, queued: bool) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        if queued:
            torch.cuda._sleep(_QUEUE_CYCLES)
        start.record()
        for _ in range(inner):
            call()
        self._waited |= queued and start.query()  # the device has begun before everything was launched
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / inner

    def _gather(self, values: list[float]) -> torch.Tensor:
        """Gather each rank's values as [ranks, values]."""
        local = torch.tensor(values, dtype=torch.float64, device=self.device)
        everyone = [torch.empty_like(local) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, local)
        return torch.stack(everyone).cpu()
