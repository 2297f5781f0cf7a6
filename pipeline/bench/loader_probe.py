"""One measurement of one loader, in a process of its own: ``python -m pipeline.bench.loader_probe REQUEST``, both in JSON."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.bench.loader_peers import PEERS, Loader, Setup


def _cpu() -> float:
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def _resident() -> float:
    """Resident memory, MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def _opened(request: dict[str, Any], *, decoded: bool = False) -> Loader:
    setup = Setup(**{**request["setup"], "shards": tuple(request["setup"]["shards"])})
    peer = PEERS[request["peer"]](setup, decoded=decoded)
    if request.get("state") is not None:
        peer.load(request["state"])
    return peer


def throughput(request: dict[str, Any]) -> dict[str, float]:
    """CPU seconds of an epoch after the first samples, and the memory that the loader has added."""
    before = _resident()
    samples: Iterator[Any] = iter(_opened(request, decoded=request["decoded"]))
    for _ in islice(samples, request["setup"]["batch"]):
        pass
    begin, count = _cpu(), sum(1 for _ in samples)
    return {"samples": count, "cpu": _cpu() - begin, "memory": _resident() - before}


def start(request: dict[str, Any]) -> dict[str, float]:
    """CPU and wall seconds from an interpreter with torch to the first decoded batch, of an epoch or after a state was loaded."""
    begin, clock = _cpu(), time.perf_counter()
    first = list(islice(iter(_opened(request, decoded=True)), request["setup"]["batch"]))
    return {"cpu": _cpu() - begin, "wall": time.perf_counter() - clock, "samples": len(first)}


def keys(request: dict[str, Any]) -> dict[str, Any]:
    """The keys of the first ``count`` samples of this rank, or of all, and the state after them."""
    peer = _opened(request)
    names = [key for key, _ in islice(iter(peer), request.get("count"))]
    return {"keys": names, "state": peer.state(len(names)) if request.get("count") else None}


def worker(request: dict[str, Any]) -> dict[str, float]:
    """Memory of one worker process of a DataLoader that no other process shares, after an epoch, MB."""
    import psutil
    from torch.utils.data import DataLoader, IterableDataset

    class Wrapped(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(_opened(request))

    loader = DataLoader(Wrapped(), batch_size=request["setup"]["batch"], num_workers=1, collate_fn=list)
    most = 0.0
    for _ in loader:
        for child in psutil.Process().children():
            try:
                most = max(most, child.memory_full_info().uss / 1e6)
            except psutil.Error:
                continue
    return {"memory": most}


MODES = {"throughput": throughput, "start": start, "keys": keys, "worker": worker}


def main() -> None:
    """Run the request of the command line and print the result on the last line."""
    request = json.loads(sys.argv[1])
    import torch

    torch.set_num_threads(1)
    print("\n" + json.dumps(MODES[request["mode"]](request)), flush=True)


if __name__ == "__main__":
    main()
