"""Baseline data pipelines with the same views and shards: torchvision's transforms, and DALI's own reader.

Both make DINOv2's views: two of 224 pixels and eight of 96, with the augmentation of :func:`specs`. They read images at the same
offsets as ours, and neither tokenises, checks or records anything.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from nvidia.dali import fn, pipeline_def, types
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from pipeline.data.augment.operators import Augment
from pipeline.data.augment.views import IMAGENET_MEAN, IMAGENET_STD, ViewSpec
from pipeline.data.index.manifest import Manifest
from pipeline.errors import ConfigError

try:
    from torchvision import transforms as classic
    from torchvision.transforms import v2
except ImportError as error:
    raise ConfigError("torchvision is not installed", where="fovea bench data", hint="Run pip install 'fovea[bench]'") from error

Views = list[torch.Tensor]


def specs(*, globals_: int = 2, locals_: int = 8) -> tuple[ViewSpec, ...]:
    """DINOv2's views with the blur of its paper."""
    colour = Augment(jitter_probability=0.8, brightness=0.4, contrast=0.4, saturation=0.2, hue_shift=0.1, gray_probability=0.2)
    firsts = (replace(colour, blur_probability=1.0), replace(colour, blur_probability=0.1, solarize_probability=0.2))
    return (
        ViewSpec("global", globals_, 224, (0.32, 1.0), augment=firsts),
        ViewSpec("local", locals_, 96, (0.05, 0.32), augment=(replace(colour, blur_probability=0.5),)),
    )


def spans(manifest: Manifest) -> list[tuple[str, int, int]]:
    """File, offset and length of every accepted image; shards must be local."""
    entries = []
    for number, shard in enumerate(manifest.shards):
        offsets, sizes = (manifest.column(number, f"image_{part}").tolist() for part in ("offset", "size"))
        entries += [(shard.url, offset, size) for offset, size in zip(offsets, sizes, strict=True)]
    return entries


def transform(spec: ViewSpec, view: int, *, hue: bool, kind: str) -> Callable[[Any], torch.Tensor]:
    """One view's transforms, ``classic`` on Pillow images or ``v2`` on uint8 tensors."""
    a, t = spec.augment[view % len(spec.augment)], classic if kind == "classic" else v2
    assert spec.crop_scale is not None
    steps: list[Any] = [
        t.RandomResizedCrop(spec.size, scale=spec.crop_scale, interpolation=classic.InterpolationMode.BICUBIC, antialias=True),
        t.RandomHorizontalFlip(a.flip_probability),
        t.RandomApply(
            [t.ColorJitter(a.brightness, a.contrast, a.saturation, a.hue_shift if hue else 0.0)], p=a.jitter_probability
        ),
        t.RandomGrayscale(a.gray_probability),
        t.RandomApply([t.GaussianBlur(a.blur_kernel, a.blur_sigma)], p=a.blur_probability),
    ]
    if a.solarize_probability:
        steps.append(t.RandomSolarize(a.solarize_threshold, a.solarize_probability))
    end = [classic.ToTensor()] if kind == "classic" else [v2.ToDtype(torch.float32, scale=True)]
    return t.Compose([*steps, *end, t.Normalize(IMAGENET_MEAN, IMAGENET_STD)])


class _Images(Dataset[Views]):
    def __init__(self, spans: list[tuple[str, int, int]], views: tuple[ViewSpec, ...], *, hue: bool, kind: str) -> None:
        self._spans, self._kind = spans, kind
        self._transforms = [transform(spec, view, hue=hue, kind=kind) for spec in views for view in range(spec.count)]
        self._files: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> Views:
        path, offset, size = self._spans[index]
        if path not in self._files:
            self._files[path] = os.open(path, os.O_RDONLY)
        image: Any = Image.open(io.BytesIO(os.pread(self._files[path], size, offset))).convert("RGB")
        if self._kind == "v2":
            image = v2.functional.pil_to_tensor(image)
        return [transform(image) for transform in self._transforms]


def torchvision_batches(manifest: Manifest, *, batch: int, hue: bool, kind: str, workers: int) -> Iterator[Views]:
    """Endless batches of a torch ``DataLoader`` with torchvision's transforms."""
    dataset = _Images(spans(manifest), specs(), hue=hue, kind=kind)
    loader = DataLoader(
        dataset, batch_size=batch, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0
    )
    while True:
        yield from loader


def write_dali_indices(manifest: Manifest, folder: Path) -> tuple[list[str], list[str]]:
    """Tars and the index files for DALI's reader, created from our index."""
    tars, indices = [], []
    for number, shard in enumerate(manifest.shards):
        offsets, sizes = (manifest.column(number, f"image_{part}").tolist() for part in ("offset", "size"))
        lines = [
            f"jpg {offset} {size} {key}.jpg" for offset, size, key in zip(offsets, sizes, manifest.rows(number).keys, strict=True)
        ]
        path = folder / f"{number:05d}.idx"
        path.write_text("\n".join([f"v1.2 {len(lines)}", *lines]) + "\n")
        tars.append(shard.url)
        indices.append(str(path))
    return tars, indices


def _chance(p: float) -> Any:
    return fn.random.coin_flip(probability=p, dtype=types.BOOL)


def _solarize(x: Any, solarized: Any, threshold: int) -> Any:
    if solarized:
        x = fn.lookup_table(
            x, keys=list(range(256)), values=[v if v < threshold else 255 - v for v in range(256)], dtype=types.UINT8
        )
    return x


def _dali_view(images: Any, spec: ViewSpec, view: int, hue: bool) -> Any:
    a = spec.augment[view % len(spec.augment)]

    def around(value: float) -> Any:
        return fn.random.uniform(range=[1 - value, 1 + value])

    assert spec.crop_scale is not None
    x = fn.random_resized_crop(
        images,
        size=list(spec.shape),
        random_area=list(spec.crop_scale),
        random_aspect_ratio=list(spec.crop_ratio),
        interp_type=types.INTERP_CUBIC,
        antialias=True,
    )
    jittered, grayed, blurred, solarized = (
        _chance(a.jitter_probability),
        _chance(a.gray_probability),
        _chance(a.blur_probability),
        _chance(a.solarize_probability),
    )
    if jittered:
        turned = {"hue": fn.random.uniform(range=[-360 * a.hue_shift, 360 * a.hue_shift])} if hue else {}
        x = fn.color_twist(
            x, brightness=around(a.brightness), contrast=around(a.contrast), saturation=around(a.saturation), **turned
        )
    if grayed:
        gray = fn.color_space_conversion(x, image_type=types.RGB, output_type=types.GRAY)
        x = fn.color_space_conversion(gray, image_type=types.GRAY, output_type=types.RGB)
    if blurred:
        x = fn.gaussian_blur(x, window_size=a.blur_kernel, sigma=fn.random.uniform(range=list(a.blur_sigma)))
    if a.solarize_probability:
        x = _solarize(x, solarized, a.solarize_threshold)
    return fn.crop_mirror_normalize(
        x,
        dtype=types.FLOAT,
        output_layout="CHW",
        mean=[255 * m for m in IMAGENET_MEAN],
        std=[255 * s for s in IMAGENET_STD],
        mirror=fn.random.coin_flip(probability=a.flip_probability),
    )


@pipeline_def(enable_conditionals=True)
def _dali_graph(tars: list[str], indices: list[str], views: tuple[ViewSpec, ...], hue: bool, decoder: dict[str, Any]) -> Any:
    encoded = fn.readers.webdataset(
        paths=tars, index_paths=indices, ext=["jpg"], random_shuffle=True, initial_fill=256, missing_component_behavior="error"
    )
    images = fn.decoders.image(encoded, output_type=types.RGB, **decoder)
    return tuple(_dali_view(images, spec, view, hue) for spec in views for view in range(spec.count))


def dali_batches(
    manifest: Manifest, folder: Path, *, batch: int, hue: bool, threads: int, device_id: int | None = None, hw_load: float = 0.65
) -> Iterator[Views]:
    """Endless batches of DALI's webdataset reader with DALI's random operators; contrast pivots on a constant, hue is YIQ's.

    On a GPU images are decoded inside the pipeline, the share ``hw_load`` of them by the JPEG engine.
    """
    tars, indices = write_dali_indices(manifest, folder)
    decoder = (
        {"device": "cpu"} if device_id is None else {"device": "mixed", "hw_decoder_load": hw_load, "jpeg_fancy_upsampling": True}
    )
    pipeline = _dali_graph(
        tars,
        indices,
        specs(),
        hue,
        decoder,
        batch_size=batch,
        num_threads=threads,
        device_id=device_id,
        prefetch_queue_depth=1 if device_id is None else 2,
        seed=1,
    )
    pipeline.build()
    while True:
        yield [torch.from_dlpack(out.as_tensor()) for out in pipeline.run()]
