"""Measures the data pipeline on JPEG shards: with several loads of the GPU's JPEG engine, and beside training."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import repeat
from typing import Any

import torch

from pipeline.bench import data as on_cpu
from pipeline.bench.plain import alone
from pipeline.bench.prove.methods import overrides_of
from pipeline.bench.prove.stage import Check, Setup, at_least
from pipeline.bench.step_config import training_step
from pipeline.config.load import load
from pipeline.data.augment.views import Batch
from pipeline.data.loader.bad_samples import BadSamples
from pipeline.data.loader.batch_stream import BatchStream, StreamOptions
from pipeline.data.loader.encoded_batches import StepDataset
from pipeline.data.loader.reader import Reader
from pipeline.data.order.order import Order
from pipeline.training.compilation import compile_blocks

_CONFIG = "dinov2/vitl16_short"
_FED = 0.95  # speed of training from shards relative to that on one batch again and again
_NEEDED = 350.0  # images/s that a ViT-L/14 takes of one H100 at most


def checks(setup: Setup) -> Iterator[Check]:
    """Rates of each stage and of the whole stream; on a CPU its CPU time an image. Then training from shards."""
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
    else:
        result = on_cpu.measure(options)
        for name, milliseconds in result.milliseconds.items():
            yield Check(f"{name}, ms of CPU an image", f"{min(milliseconds):.1f}")
    yield from _training(setup, options)


def _training(setup: Setup, options: on_cpu.Options) -> Iterator[Check]:
    """Speed of training from shards relative to that with the same batch again and again."""
    samples, device = (2, torch.device("cpu")) if setup.toy else (64, torch.device(setup.device))
    precision = "bf16" if setup.device == "cuda" else "fp32"
    own = [f"train.global_batch_size={samples}", f"train.micro_batch_size={samples}", f"train.precision={precision}"]
    settings = load(_CONFIG, [*overrides_of(_CONFIG, toy=setup.toy), *own]).config
    manifest, _ = on_cpu.prepare(options, setup.folder / "training")
    warm, measured = (1, 2) if setup.toy else (5, 20)
    with alone(setup.device):
        method, advance = training_step(settings, device)
        if setup.device == "cuda":
            compile_blocks(method)  # as a run does by default
        dataset = StepDataset(
            Reader(manifest, wants=("image",)), Order(manifest.sizes, 0, samples), method.views, seed=0, world=1, rank=0
        )
        stream = BatchStream(
            dataset,
            device=device,
            options=StreamOptions(micro_batch=samples, workers=options.workers, threads=options.threads),
            bad_samples=BadSamples(None),
            first=0,
            last=warm + measured,
        )

        def seconds(batches: Iterator[Batch]) -> float:
            began = 0.0
            for number, batch in enumerate(batches, 1):
                loss = advance(batch)
                if number in (warm, warm + measured):
                    float(loss)  # the host waits for the device
                    began, spent = time.perf_counter(), time.perf_counter() - began
            return spent

        kept: list[Batch] = []

        def from_shards() -> Iterator[Batch]:
            for _, (micro,) in stream:
                kept[:] = [micro]
                yield micro

        shards = seconds(from_shards())
        again = seconds(repeat(kept[0], warm + measured))
    name = f"{_CONFIG}: speed of training from shards relative to one batch again and again"
    yield Check(name, f"{again / shards:.3g}") if setup.toy else at_least(name, again / shards, _FED)
