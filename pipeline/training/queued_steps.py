"""Steps that the host has queued: what is recorded of a step, and the means over the steps since the last log line."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.data.augment.views import Batch
from pipeline.runtime.process_group import World
from pipeline.training.applied import Applied
from pipeline.training.signatures import Taken


@dataclass(frozen=True)
class QueuedStep:
    """A step whose work is queued on the device, and what its bookkeeping needs once it is known whether it was applied.

    Attributes:
        index: the step's number.
        applied: whether it was applied.
        keys: names of this rank's samples.
        terms: loss terms, means over the micro-batches.
        metrics: the method's metrics.
        line: its line of ``Plan.record`` but for ``applied``, ``None`` without a record.
        signature: its signature, ``None`` without signatures.
    """

    index: int
    applied: Applied
    keys: list[str]
    terms: dict[str, Tensor]
    metrics: dict[str, Tensor]
    line: dict[str, Any] | None
    signature: Taken | None


def record_line(step: int, batches: list[Batch], terms: dict[str, Tensor]) -> dict[str, Any]:
    """A line of ``Plan.record`` but for ``applied``: this rank's samples, a digest of their pixels, and the exact loss terms."""
    keys = [key for batch in batches for key in batch.keys]
    pixels = hashlib.blake2b(digest_size=8)
    for batch in batches:
        for views in batch.views.values():
            for view in views:
                pixels.update(view.cpu().numpy().tobytes())
    return {
        "step": step,
        "keys": keys,
        "sides": batches[0].sides,
        "pixels": pixels.hexdigest(),
        "terms": {name: float(term).hex() for name, term in terms.items()},
    }


class Meter:
    """Means since the last log line, kept on the device and averaged over ranks only when read."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._samples, self._since = 0, time.perf_counter()

    def add(self, terms: dict[str, Tensor], metrics: dict[str, Tensor], samples: int) -> None:
        """Add a step's loss terms and metrics, scalars on the device."""
        total = torch.stack(list(terms.values())).sum()
        for name, value in {"loss": total, **terms, **metrics}.items():
            self._sums[name] = self._sums[name] + value.detach().float() if name in self._sums else value.detach().float()
            self._counts[name] = self._counts.get(name, 0) + 1
        self._samples += samples

    def flush(self) -> dict[str, float]:
        """Means over steps and ranks, and images per second as ``rate``; starts again. Collective."""
        names = sorted(self._sums)
        means = torch.stack([self._sums[n] / self._counts[n] for n in names])
        dist.all_reduce(means)
        means /= self._world.size
        now = time.perf_counter()
        rate = self._samples / max(now - self._since, 1e-9)
        self._sums, self._counts, self._samples, self._since = {}, {}, 0, now
        return {**dict(zip(names, means.tolist(), strict=True)), "rate": rate}
