"""Data sets whose duplicates and skew are known: scenes with planted near-duplicates, and photographs that were saved again.

A key says what a sample is: ``000123-0`` is an original, ``000123-2-crop`` its second copy, a crop.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from pipeline.data.order.random import uniforms
from pipeline.data.pack import synthetic
from pipeline.data.pack.shard_writer import ShardWriter

SKEW = 50.0  # samples of the most frequent class to those of the rarest
_PLANTED = 0x0DD5  # identifies the random draws
_PER_SHARD = 500
Draws = NDArray[np.float64]


def counts_of(total: int, classes: int = len(synthetic.KINDS), skew: float = SKEW) -> list[int]:
    """Returns the number of samples of each class, falling by equal factors from the first to the last.

    Args:
        total: samples of all classes, about.
        classes: number of classes.
        skew: samples of the first class to those of the last.
    """
    shares = skew ** -(np.arange(classes) / (classes - 1))
    return [max(1, round(total * float(share / shares.sum()))) for share in shares]


def write_scenes(folder: Path, originals: int, copies: float, seed: int, size: int = 64) -> int:
    """Writes skewed scenes, of which a fraction are altered copies of others.

    Args:
        folder: for ``raw-*.tar``, and ``val-*.tar`` with ten classes of equal size.
        originals: scenes that are no copies, about.
        copies: fraction of all samples that are copies.
        seed: of everything.
        size: pixels of a side.

    Returns:
        The number of samples.
    """
    labels = [label for label, count in enumerate(counts_of(originals)) for _ in range(count)]
    indices = _scenes_of(labels, seed)
    planted = round(len(labels) * copies / (1 - copies))
    u = uniforms(np.arange(planted, dtype=np.uint64), 8, seed, _PLANTED)
    sources = (u[:, 0] * len(labels)).astype(int)
    items: list[tuple[int, int]] = [(number, 0) for number in range(len(labels))]
    turns: dict[int, int] = {}
    for source in sources.tolist():
        turns[source] = turns.get(source, 0) + 1
        items.append((source, turns[source]))
    rows = {item: row for row, item in enumerate(items[len(labels) :])}
    order = np.argsort(uniforms(np.arange(len(items), dtype=np.uint64), 1, seed, _PLANTED, 1)[:, 0], kind="stable")
    with ShardWriter(folder, "raw", samples_per_shard=_PER_SHARD) as writer:
        for row in order.tolist():
            number, turn = items[row]
            scene = synthetic.render(seed, indices[number], size)
            image, name = Image.fromarray(scene.image), ""
            if turn:
                draws = u[rows[number, turn]]
                name = KINDS[int(draws[1] * len(KINDS))]
                image = ALTER[name](image, draws[2:])
            quality = 92 if name != "recompressed" else 20 + int(40 * u[rows[number, turn]][2])
            writer.write({"__key__": _key(number, turn, name), "jpg": _jpeg(image, quality), "cls": str(labels[number]).encode()})
    with ShardWriter(folder, "val", samples_per_shard=_PER_SHARD) as writer:
        for number in range(1000):
            scene = synthetic.render(seed, (1 << 40) + number, size)
            writer.write(
                {"__key__": f"val{number:06d}", "jpg": _jpeg(Image.fromarray(scene.image), 92), "cls": str(scene.label).encode()}
            )
    return len(items)


def write_resaved(folder: Path, images: Sequence[Path], copies: int, seed: int) -> int:
    """Writes photographs, each with copies that were saved again with a lower quality.

    Args:
        folder: for ``raw-*.tar``.
        images: files.
        copies: of each.
        seed: of the qualities.

    Returns:
        The number of samples.
    """
    u = uniforms(np.arange(len(images), dtype=np.uint64), copies, seed, _PLANTED)
    with ShardWriter(folder, "raw", samples_per_shard=_PER_SHARD) as writer:
        for number, path in enumerate(images):
            writer.write({"__key__": _key(number, 0, ""), "jpg": path.read_bytes()})
            with Image.open(path) as file:
                image = file.convert("RGB")
            for turn in range(1, copies + 1):
                content = _jpeg(image, 20 + int(70 * u[number, turn - 1]))
                writer.write({"__key__": _key(number, turn, "recompressed"), "jpg": content})
    return len(images) * (copies + 1)


def write_leak(folder: Path, cifar: Path, seed: int, *, images: int = 10_000, copies: int = 200) -> None:
    """Writes training images with altered copies of validation images among them, and the validation images.

    Args:
        folder: for ``raw-*.tar``, in which the copies' keys begin with ``copy``, and ``val-*.tar``.
        cifar: folder with ``train-*.tar`` and ``val-*.tar``.
        seed: of the choice and the alterations.
        images: training images.
        copies: validation images of which there is a copy.
    """
    held = list(_members(sorted(cifar.glob("val-*.tar")), 2000))
    u = uniforms(np.arange(copies, dtype=np.uint64), 8, seed, _PLANTED)
    chosen = np.argsort(uniforms(np.arange(len(held), dtype=np.uint64), 1, seed, _PLANTED, 2)[:, 0], kind="stable")[:copies]
    with ShardWriter(folder, "raw", samples_per_shard=2000) as writer:
        for key, content in _members(sorted(cifar.glob("train-*.tar")), images):
            writer.write({"__key__": key.replace("/", "_"), "jpg": content})
        for number, row in enumerate(chosen.tolist()):
            with Image.open(io.BytesIO(held[row][1])) as file:
                image = file.convert("RGB")
            name = KINDS[int(u[number, 1] * len(KINDS))]
            content = _jpeg(ALTER[name](image, u[number, 2:]), 60 if name == "recompressed" else 92)
            writer.write({"__key__": f"copy{number:04d}-{name}", "jpg": content})
    with ShardWriter(folder, "val", samples_per_shard=2000) as writer:
        for number, (_, content) in enumerate(held):
            writer.write({"__key__": f"val{number:06d}", "jpg": content})


def _members(shards: Sequence[Path], count: int) -> Iterator[tuple[str, bytes]]:
    """Yields keys and images of the first samples of shards."""
    for shard in shards:
        with tarfile.open(shard) as tar:
            for member in tar:
                file = tar.extractfile(member) if member.name.endswith(".jpg") else None
                if file is not None and count > 0:
                    count -= 1
                    yield member.name.removesuffix(".jpg"), file.read()


def original_of(key: str) -> int:
    """Number of the original that a sample is, or is a copy of."""
    return int(key.partition("-")[0])


def kind_of(key: str) -> str:
    """How a copy was altered; empty for an original."""
    return key.split("-")[2] if key.count("-") == 2 else ""


def _key(number: int, turn: int, name: str) -> str:
    return f"{number:06d}-{turn}" + (f"-{name}" if name else "")


def _scenes_of(labels: Sequence[int], seed: int) -> list[int]:
    """Returns for each label the index of another scene of that class."""
    ahead: dict[int, Iterator[int]] = {label: _of_class(label, seed) for label in set(labels)}
    return [next(ahead[label]) for label in labels]


def _of_class(label: int, seed: int) -> Iterator[int]:
    index = 0
    while True:
        if synthetic.label_of(seed, index) == label:
            yield index
        index += 1


def _jpeg(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _crop(image: Image.Image, u: Draws) -> Image.Image:
    side = image.width
    kept = round(side * (0.85 + 0.12 * float(u[0])))
    left, top = round((side - kept) * float(u[1])), round((side - kept) * float(u[2]))
    return image.crop((left, top, left + kept, top + kept))


def _rotated(image: Image.Image, u: Draws) -> Image.Image:
    turned = image.rotate(6 * (2 * float(u[0]) - 1), Image.Resampling.BICUBIC)
    rim = round(0.05 * image.width)
    return turned.crop((rim, rim, image.width - rim, image.height - rim))


def _recolored(image: Image.Image, u: Draws) -> Image.Image:
    brighter = ImageEnhance.Brightness(image).enhance(0.85 + 0.3 * float(u[0]))
    return ImageEnhance.Color(brighter).enhance(0.8 + 0.4 * float(u[1]))


def _same(image: Image.Image, u: Draws) -> Image.Image:
    return image


ALTER: dict[str, Callable[[Image.Image, Draws], Image.Image]] = {
    "crop": _crop,
    "recompressed": _same,
    "rotated": _rotated,
    "recolored": _recolored,
}
KINDS = tuple(ALTER)
