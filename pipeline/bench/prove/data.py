"""Measures the data pipeline on JPEG shards, with several loads of the GPU's JPEG engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pipeline.bench import data as on_cpu
from pipeline.bench.prove.stage import Check, Setup, at_least

_NEEDED = 350.0  # images/s that a ViT-L/14 takes of one H100 at most


def checks(setup: Setup) -> Iterator[Check]:
    """Rates of each stage and of the whole stream; on a CPU its CPU time an image."""
    images, batch = (8, 4) if setup.toy else (512, 64)
    options = on_cpu.Options(
        photos=setup.photos,
        images=images,
        rounds=1 if setup.toy else 3,
        batch=batch,
        threads=1 if setup.toy else 4,
        workers=0 if setup.toy else 2,
    )
    result: Any
    if setup.device == "cuda":
        from pipeline.bench.gpu import measure

        result = measure(options)
        for name, rate in result.rates.items():
            yield Check(name, f"{rate:.4g}")
        best = max(rate for name, rate in result.rates.items() if name.startswith("our stream"))
        yield at_least("our stream, images per second", best, _NEEDED)
        return
    result = on_cpu.measure(options)
    for name, milliseconds in result.milliseconds.items():
        yield Check(f"{name}, ms of CPU an image", f"{min(milliseconds):.1f}")
