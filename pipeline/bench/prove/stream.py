"""Compares the batches of the training stream, made beside matrix products on the same device, with the CPU's."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import torch

from pipeline.bench.data import Options, prepare
from pipeline.bench.prove.stage import Check, Setup, at_most
from pipeline.data.augment.operators import Augment
from pipeline.data.augment.views import ViewSpec
from pipeline.data.index.manifest import Manifest
from pipeline.data.loader.bad_samples import BadSamples
from pipeline.data.loader.batch_stream import BatchStream, StreamOptions
from pipeline.data.loader.encoded_batches import StepDataset
from pipeline.data.loader.reader import Reader
from pipeline.data.order.order import Order

_PIXEL = 0.06  # largest mean difference of normalized pixels between devices: four levels of 255


def views(*, toy: bool) -> tuple[ViewSpec, ...]:
    """Views of three sizes, each a DALI graph of its own."""
    sizes = (32, 16, 48) if toy else (224, 96, 448)
    augment = Augment(jitter_probability=0.8, brightness=0.4, contrast=0.4, saturation=0.2, hue_shift=0.1, blur_probability=0.5)
    counts = {"global": (2, sizes[0]), "local": (8, sizes[1]), "large": (2, sizes[2])}
    return tuple(ViewSpec(name, count, size, (0.1, 1.0), augment=(augment,)) for name, (count, size) in counts.items())


def checks(setup: Setup) -> Iterator[Check]:
    """Every view of every step against the CPU's, and images per second."""
    steps, batch = (3, 4) if setup.toy else (20, 64)
    manifest, about = prepare(Options(photos=setup.photos, images=max(steps * batch, 64), batch=batch), setup.folder)
    yield Check("images", about)
    number = setup.device_id
    device = torch.device("cpu") if number is None else torch.device("cuda", number)
    if number is not None:
        torch.cuda.set_device(number)
    stop = threading.Event()
    busy = threading.Thread(target=_multiply, args=(device, stop), daemon=True)
    busy.start()
    began = time.perf_counter()
    sums: list[dict[str, torch.Tensor]] = []
    images = 0
    for _, (micro,) in _stream(manifest, setup, device, batch, steps):
        sums.append({name: torch.stack([_digest(view) for view in group]) for name, group in micro.views.items()})
        images += len(micro.keys)
    seconds = time.perf_counter() - began
    stop.set()
    busy.join()
    yield Check("images per second beside the products", f"{images / seconds:.0f}")
    worst: dict[str, float] = {}
    for ours, (_, (micro,)) in zip(sums, _stream(manifest, setup, torch.device("cpu"), batch, steps), strict=True):
        for name, group in micro.views.items():
            theirs = torch.stack([_digest(view) for view in group])
            worst[name] = max(worst.get(name, 0.0), float((ours[name].cpu() - theirs).abs().max()))
    for name, apart in worst.items():
        yield at_most(f"{name}: largest difference of a quarter view's mean to the CPU's", apart, _PIXEL)


def _digest(view: torch.Tensor) -> torch.Tensor:
    """Means of the quarters of each channel of each image; they differ if crop, flip or colour differ."""
    return torch.nn.functional.adaptive_avg_pool2d(view.float(), 2)


def _stream(manifest: Manifest, setup: Setup, device: torch.device, batch: int, steps: int) -> BatchStream:
    order = Order(manifest.sizes, 0, batch)
    dataset = StepDataset(Reader(manifest, wants=("image",)), order, views(toy=setup.toy), seed=0, world=1, rank=0)
    options = StreamOptions(micro_batch=batch, workers=0 if setup.toy else 2, threads=2)
    return BatchStream(dataset, device=device, options=options, bad_samples=BadSamples(None), first=0, last=steps)


def _multiply(device: torch.device, stop: threading.Event) -> None:
    """Keep the default stream of the device busy, as training does."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    a = torch.randn(*((64, 64) if device.type == "cpu" else (4096, 4096)), device=device)
    while not stop.is_set():
        for _ in range(8):
            a = torch.mm(a, a).clamp(-1, 1)
        if device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        time.sleep(0.001)
