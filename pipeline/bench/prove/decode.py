"""Compares decoded images and every augmentation with the CPU's: all formats, a broken file, on the last device, in a thread."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipeline.bench.prove.stage import Check, Setup, at_most
from pipeline.data.augment.dali import Augmenter
from pipeline.data.augment.decode import Decoder
from pipeline.data.augment.operators import Augment
from pipeline.data.augment.plan import make_plan
from pipeline.data.augment.views import Normalize, ViewSpec
from pipeline.data.pack.synthetic import render

_LEVELS = {"jpeg": 3.0, "jpeg, progressive": 3.0, "png": 0.0, "webp": 3.0, "tiff": 0.0}  # mean difference of 255 that is allowed
_OPERATORS: dict[str, dict[str, Any]] = {
    "resize": {},
    "flip": {"flip_probability": 1.0},
    "brightness": {"jitter_probability": 1.0, "brightness": 0.4},
    "contrast": {"jitter_probability": 1.0, "contrast": 0.4},
    "saturation": {"jitter_probability": 1.0, "saturation": 0.4},
    "hue": {"jitter_probability": 1.0, "hue_shift": 0.2},
    "grayscale": {"gray_probability": 1.0},
    "blur": {"blur_probability": 1.0},
    "solarization": {"solarize_probability": 1.0},
}
_PIXEL = 4 / 255  # largest mean difference of a view's pixels between devices


def example_images(count: int, side: int) -> list[np.ndarray[Any, np.dtype[np.uint8]]]:
    """Synthetic scenes, uint8 ``[height, width, 3]``, of several sizes."""
    return [np.asarray(render(1, n, side + 8 * (n % 5)).image)[: side + 4 * (n % 3)] for n in range(count)]


def encoded(pixels: list[Any], kind: str) -> list[bytes]:
    """Encode images in a format."""
    files = []
    for one in pixels:
        buffer = io.BytesIO()
        options: dict[str, Any] = {"quality": 90} if kind.startswith("jpeg") else {}
        if kind == "jpeg, progressive":
            options["progressive"] = True
        if kind == "webp":
            options["lossless"] = True
        Image.fromarray(one).save(buffer, kind.partition(",")[0].upper(), **options)
        files.append(buffer.getvalue())
    return files


def checks(setup: Setup) -> Iterator[Check]:
    """Differences to Pillow by format, a broken file, and differences between devices by operator."""
    count, side = (4, 64) if setup.toy else (64, 256)
    pixels = example_images(count, side)
    decoded: dict[str, list[Any]] = {}
    broken: list[Any] = []

    def work() -> None:
        if setup.device_id is not None:
            torch.cuda.set_device(setup.device_id)
        decoder = Decoder(threads=2, device_id=setup.device_id)
        for kind in _LEVELS:
            decoded[kind] = [_host(image) for image in decoder.decode(encoded(pixels, kind))]
        intact = encoded(pixels[:1], "jpeg")[0]
        broken.extend(decoder.decode([intact[: len(intact) // 3], b"nothing", intact]))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    for kind, most in _LEVELS.items():
        if kind not in decoded:
            yield Check(f"{kind}: decoded in a thread", "the thread ended with an error", "decoded", False)
            continue
        references = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in encoded(pixels, kind)]
        pairs = zip(decoded[kind], references, strict=True)
        apart = max(_apart(ours, theirs) for ours, theirs in pairs)
        yield at_most(f"{kind}: mean difference to Pillow, levels", apart, most)
    right = len(broken) == 3 and broken[1] is None and broken[2] is not None
    yield Check("a broken file beside an intact one", "recognized" if right else "not recognized", "recognized", right)
    yield from _operators(setup, pixels)


def _host(image: Any) -> Any:
    if image is None or isinstance(image, np.ndarray):
        return image
    return np.asarray(image.cpu())


def _apart(ours: Any, theirs: Any) -> float:
    if ours is None or ours.shape != theirs.shape:
        return float("nan")
    return float(np.abs(ours.astype(np.int16) - theirs.astype(np.int16)).mean())


def _operators(setup: Setup, pixels: list[Any]) -> Iterator[Check]:
    files = encoded(pixels, "png")
    sizes = np.array([one.shape[:2] for one in pixels], dtype=np.int64)
    ids, epochs = np.arange(len(pixels), dtype=np.uint64), np.zeros(len(pixels), dtype=np.int64)
    by_device = {None: Decoder().decode(files), setup.device_id: Decoder(device_id=setup.device_id).decode(files)}
    size, plain, values = 32 if setup.toy else 224, Augment(flip_probability=0.0), Normalize((0.0,) * 3, (1.0,) * 3)
    for name, changes in _OPERATORS.items():
        augment = replace(plain, **changes)
        spec = ViewSpec("view", size, 1, (0.3, 1.0), augment=(augment,), normalize=values)
        views = {}
        for device, inputs in by_device.items():
            plan = make_plan((spec,), ids=ids, epochs=epochs, sizes=sizes, seed=0)
            augmenter = Augmenter((spec,), batch_size=len(pixels), device_id=device)
            views[device] = augmenter.run(inputs, plan)["view"][0].cpu()
        apart = (views[setup.device_id] - views[None]).abs()
        yield at_most(f"{name}: mean difference of {setup.device} and cpu", float(apart.mean()), _PIXEL)
