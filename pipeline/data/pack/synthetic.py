"""The built-in synthetic data set *scenes*: procedural images of textured shapes in spatial relations.

An image shows several *dominant* objects of one kind, the class, and one or two smaller objects of other kinds (distractors), on
a ground. A kind is a texture with a shape; each texture occurs with two shapes and each shape with two textures, so neither alone
determines the class. A kind has two opposite colours, which cancel in the mean; brightness, positions, sizes, rotations, light,
ground and noise are drawn for each image and are independent of the class. Raw pixels are therefore of little use, and the
features that determine the class survive crops, flips and mild colour jitter.

Every image has a class, captions that describe the spatial relation of two of its objects, and a segmentation: 0 for the
ground, otherwise one plus the kind of the object a pixel belongs to.

Everything is a function of (seed, index), so any part of the data set can be generated anywhere.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.data.order.random import permutation, uniforms
from pipeline.data.pack import shifts
from pipeline.data.pack.generated import write_generated
from pipeline.errors import DataError

Plane = NDArray[np.float32]

TEXTURES = ("striped", "dotted", "checkered", "ringed", "wavy")
SHAPES = ("circle", "square", "triangle", "cross", "star")
KINDS = tuple((texture, shape) for texture in range(5) for shape in (texture, (texture + 1) % 5))
CLASS_NAMES = tuple(f"{TEXTURES[texture]} {SHAPES[shape]}" for texture, shape in KINDS)
GROUNDS = ("smooth", "rough", "misty", "grainy")

# Difficulty of the data set. Lengths are fractions of the image's side, densities are periods per object radius.
DOMINANT = (3, 5)
"""Minimum and maximum number of objects of the image's class."""
DOMINANT_RADIUS = (0.2, 0.32)
DISTRACTORS = (1, 2)
"""Minimum and maximum number of distractors."""
DISTRACTOR_RADIUS = (0.08, 0.13)
TEXTURE_PERIODS = (1.4, 2.2)
CONTRAST = (0.1, 0.5)
"""Minimum and maximum brightness difference between the two colours of a texture, of 1."""
CHROMA = 0.3
"""Maximum deviation of the ground's colour from gray, of 1."""
OPPOSITION = 0.4
"""Distance of a kind's two colours from gray, on opposite sides, of 1."""
GROUND_RELIEF = 0.25
"""Brightness amplitude of the ground's texture, of 1."""
LIGHT = 0.35
"""Maximum change of brightness from one side of the image to the other, of 1."""
NOISE = 0.06
"""Maximum standard deviation of pixel noise, of 1."""
INSIDE_P = 0.25
"""Fraction of the images in which the first distractor lies on the largest object."""

JPEG_QUALITY = 92
VERSION = 3
"""Increase it when the images change: existing data sets are then generated again."""

_LAYOUT, _PIXELS, _LABELS = 0x5CE0, 0x5CE1, 0x5CE2  # identify the random draws
_DRAWS = 20  # random numbers per object


@dataclass(frozen=True)
class SceneObject:
    """One object of a scene.

    Attributes:
        kind: index in :data:`KINDS`.
        x: centre, fraction of the side, from the left.
        y: centre, fraction of the side, from the top.
        radius: fraction of the side.
    """

    kind: int
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """One sample.

    Attributes:
        image: uint8 ``[size, size, 3]``.
        label: class index, position in :data:`CLASS_NAMES`.
        class_name: its name.
        caption: the spatial relation of two objects, and the ground.
        captions: paraphrases of the caption; the first is ``caption``.
        segmentation: uint8 ``[size, size]``, 0 for the ground, else kind + 1.
        objects: the objects, the farthest first.
        ground: name of the ground.
    """

    image: NDArray[np.uint8]
    label: int
    class_name: str
    caption: str
    captions: tuple[str, ...]
    segmentation: NDArray[np.uint8]
    objects: tuple[SceneObject, ...]
    ground: str


def label_of(seed: int, index: int) -> int:
    """Returns the class of a scene: any ten scenes from a multiple of ten on have ten different classes."""
    return int(permutation(len(KINDS), seed, index // len(KINDS), _LABELS)[index % len(KINDS)])


def render(seed: int, index: int, size: int = 64, shift: shifts.Shift = "none") -> Scene:
    """Renders one scene.

    Args:
        seed: seed of the data set.
        index: index of the scene.
        size: side in pixels.
        shift: another domain, see :mod:`pipeline.data.pack.shifts`; classes and layout stay.

    Returns:
        The scene. Layout, label and captions do not depend on ``size``.
    """
    if size < 8:
        raise DataError(f"scenes of {size} pixels are too small", where="size", hint="Use at least 8")
    seed, index = int(seed), int(index)
    label = label_of(seed, index)
    most = DOMINANT[1] + DISTRACTORS[1]
    u = uniforms(np.array([index], dtype=np.uint64), 32 + most * _DRAWS, seed, _LAYOUT)[0].tolist()
    objects = _scene_objects(label, u)
    ground = GROUNDS[int(u[3] * len(GROUNDS))]
    image, segmentation = _paint(objects, ground, u, seed, index, size, shifts.other_weave if shift == "texture" else _weave)
    image = shifts.shifted(image, shift, seed, index)
    captions = _captions(label, objects, ground, u)
    return Scene(image, label, CLASS_NAMES[label], captions[0], captions, segmentation, objects, ground)


def write(
    directory: str | Path,
    *,
    train: int,
    val: int,
    size: int = 64,
    seed: int = 0,
    samples_per_shard: int = 1000,
    shift: shifts.Shift = "none",
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Writes the data set as shards ``scenes-train-00000.tar``… and ``scenes-val-00000.tar``….

    Does nothing if the same data set exists already (according to ``scenes.json``).

    Args:
        directory: output directory.
        train: number of training scenes.
        val: number of validation scenes, disjoint from the training scenes.
        size: side in pixels.
        seed: seed of the data set.
        samples_per_shard: scenes per shard.
        shift: see :func:`render`.
        progress: called with (scenes done, total scenes).

    Returns:
        Paths of all shards, training first.
    """
    numbers = {"version": VERSION, "train": train, "val": val, "size": size, "seed": seed, "samples_per_shard": samples_per_shard}
    return write_generated(
        directory,
        "scenes",
        lambda index: _sample(render(seed, index, size, shift)),
        {**numbers, "look": _look(), **({"shift": [shift, shifts.VERSION]} if shift != "none" else {})},
        train=train,
        val=val,
        samples_per_shard=samples_per_shard,
        progress=progress,
    )


def _look() -> list[Any]:
    knobs = (DOMINANT, DOMINANT_RADIUS, DISTRACTORS, DISTRACTOR_RADIUS, TEXTURE_PERIODS, CONTRAST)
    return [*map(list, knobs), CHROMA, OPPOSITION, GROUND_RELIEF, LIGHT, NOISE, INSIDE_P, JPEG_QUALITY]


def _sample(scene: Scene) -> dict[str, Any]:
    image_file, classes = io.BytesIO(), io.BytesIO()
    Image.fromarray(scene.image).save(image_file, "JPEG", quality=JPEG_QUALITY)
    Image.fromarray(scene.segmentation).save(classes, "PNG", compress_level=1)
    about = {
        "caption": scene.caption,
        "captions": list(scene.captions),
        "class_name": scene.class_name,
        "ground": scene.ground,
        "label": scene.label,
        "objects": [
            {"kind": CLASS_NAMES[t.kind], "x": round(t.x, 4), "y": round(t.y, 4), "radius": round(t.radius, 4)}
            for t in scene.objects
        ],
    }
    return {
        "jpg": image_file.getvalue(),
        "cls": scene.label,
        "txt": scene.caption,
        "seg.png": classes.getvalue(),
        "json": about,
    }


def _between(u: float, bounds: tuple[float, float]) -> float:
    return bounds[0] + u * (bounds[1] - bounds[0])


def _count(u: float, bounds: tuple[int, int]) -> int:
    return bounds[0] + int(u * (bounds[1] - bounds[0] + 1))


def _scene_objects(label: int, u: list[float]) -> tuple[SceneObject, ...]:
    """Places dominant objects, the largest first, in cells of a shifted grid; then distractors in the gaps, or on the largest."""
    dominant, others = _count(u[0], DOMINANT), _count(u[1], DISTRACTORS)
    cells = _cells(u[8:24])
    objects = []
    for number in range(dominant):
        v = u[32 + number * _DRAWS :]
        column, row = cells[number]
        x, y = (column + 0.5 + 0.5 * (v[0] - 0.5)) / 3, (row + 0.5 + 0.5 * (v[1] - 0.5)) / 3
        objects.append(SceneObject(label, x, y, _between(v[2], DOMINANT_RADIUS)))
    objects.sort(key=lambda item: -item.radius)
    for number in range(others):
        v = u[32 + (dominant + number) * _DRAWS :]
        kind = int(v[3] * (len(KINDS) - 1))
        kind += kind >= label
        radius = _between(v[2], DISTRACTOR_RADIUS)
        if number == 0 and u[2] < INSIDE_P:
            host = objects[0]
            free = 0.3 * max(host.radius - radius, 0.0)
            x, y = host.x + free * (2 * v[0] - 1), host.y + free * (2 * v[1] - 1)
        else:
            column, row = cells[dominant + number]
            x, y = (column + 0.5 + 0.5 * (v[0] - 0.5)) / 3, (row + 0.5 + 0.5 * (v[1] - 0.5)) / 3
        objects.append(SceneObject(kind, x, y, radius))
    return tuple(objects)


def _cells(u: list[float]) -> list[tuple[int, int]]:
    """Returns the nine cells of a 3 x 3 grid in random order."""
    order = sorted(range(9), key=lambda cell: u[cell])
    return [(cell % 3, cell // 3) for cell in order]


def _paint(
    objects: tuple[SceneObject, ...], ground: str, u: list[float], seed: int, index: int, size: int, weave: shifts.Weave
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    axis = (np.arange(size, dtype=np.float32) + np.float32(0.5)) / np.float32(size)
    noise = uniforms(np.array([index], dtype=np.uint64), size * size, seed, _PIXELS)[0].astype(np.float32).reshape(size, size)
    noise -= np.float32(0.5)
    image = _ground(ground, axis, noise, u)
    segmentation = np.zeros((size, size), dtype=np.uint8)
    for number, item in enumerate(objects):
        _draw(image, segmentation, item, axis, u[32 + number * _DRAWS : 32 + (number + 1) * _DRAWS], weave)
    angle = 2 * math.pi * u[4]
    strength = LIGHT * u[5]
    light = 1 + strength * (np.cos(angle) * (axis - 0.5)[None, :] + np.sin(angle) * (axis - 0.5)[:, None])
    image *= light.astype(np.float32)[:, :, None]
    image += (noise * np.float32(NOISE * u[6] * math.sqrt(12)))[:, :, None]
    image *= np.float32(255)
    np.clip(image, 0, 255, out=image)
    return image.astype(np.uint8), segmentation


def _ground(name: str, axis: Plane, noise: Plane, u: list[float]) -> Plane:
    color = _color(_between(u[24], (0.15, 0.85)), u[25:28])
    size = len(axis)
    a, b = 2 * math.pi * u[28], 2 * math.pi * u[29]
    if name == "smooth":
        return np.broadcast_to(color, (size, size, 3)).copy()
    if name == "misty":
        waves = np.sin(5 * axis + np.float32(a))[:, None] * np.sin(4 * axis + np.float32(b))[None, :]
        relief = waves * np.float32(0.5)
    elif name == "grainy":
        relief = noise
    else:
        coarse = max(size // 4, 2)
        near = np.minimum((axis * coarse).astype(np.int64), coarse - 1)
        relief = noise[:coarse, :coarse][near[:, None], near[None, :]]
    return color + (np.float32(GROUND_RELIEF) * relief)[:, :, None]


def _color(brightness: float, u: list[float]) -> Plane:
    """Draws a colour of about the given brightness."""
    stray = np.array(u, dtype=np.float32) - np.float32(0.5)
    stray -= stray @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    return np.clip(np.float32(brightness) + np.float32(CHROMA) * stray, 0, 1)


def _opposites(kind: int, low: float, high: float, u: float, v: float) -> tuple[Plane, Plane]:
    """Returns the kind's two opposite colours; which of them is brighter is random."""
    # The two kinds of a texture have hues at right angles, so that the network must distinguish more than textures.
    angle = math.pi * (kind // 2 / len(KINDS) + kind % 2 / 2)
    axis = np.array([2, -1, -1]) * (math.cos(angle) / math.sqrt(6)) + np.array([0, 1, -1]) * (math.sin(angle) / math.sqrt(2))
    axis = (axis - axis @ np.array([0.299, 0.587, 0.114])).astype(np.float32)
    axis *= np.float32(OPPOSITION * (0.7 + 0.6 * v) * (1 if u < 0.5 else -1))
    return np.clip(np.float32(low) + axis, 0, 1), np.clip(np.float32(high) - axis, 0, 1)


def _draw(
    image: Plane, segmentation: NDArray[np.uint8], item: SceneObject, axis: Plane, u: list[float], pattern: shifts.Weave
) -> None:
    size = len(axis)
    reach = item.radius * 1.25 + 1 / size
    left, right = max(int((item.x - reach) * size), 0), min(int((item.x + reach) * size) + 1, size)
    top, bottom = max(int((item.y - reach) * size), 0), min(int((item.y + reach) * size) + 1, size)
    if left >= right or top >= bottom:
        return
    turn = 2 * math.pi * u[4]
    cos, sin = np.float32(math.cos(turn) / item.radius), np.float32(math.sin(turn) / item.radius)
    dx, dy = (axis[left:right] - np.float32(item.x))[None, :], (axis[top:bottom] - np.float32(item.y))[:, None]
    x, y = dx * cos + dy * sin, dy * cos - dx * sin
    texture, shape = KINDS[item.kind]
    cover = np.clip(np.float32(0.5) - _distance(SHAPES[shape], x, y) * np.float32(item.radius * size), 0, 1)
    periods = np.float32(_between(u[5], TEXTURE_PERIODS))
    sharp = np.float32(item.radius * size / (periods * 2))
    weave = np.clip(np.float32(0.5) + sharp * pattern(TEXTURES[texture], x * periods, y * periods, u[6]), 0, 1)
    low = u[7] * (1 - CONTRAST[1])
    high = low + _between(u[8], CONTRAST)
    dark, bright = _opposites(item.kind, low, high, u[9], u[10])
    paint = dark + weave[:, :, None] * (bright - dark)
    region = image[top:bottom, left:right]
    region += cover[:, :, None] * (paint - region)
    segmentation[top:bottom, left:right][cover > 0.5] = item.kind + 1


def _distance(shape: str, x: Plane, y: Plane) -> Plane:
    """Returns how far a point is outside (negative: inside) a shape of about radius one, in radii."""
    ax, ay = np.abs(x), np.abs(y)
    if shape == "circle":
        return np.sqrt(x * x + y * y) - np.float32(0.95)
    if shape == "square":
        return np.maximum(ax, ay) - np.float32(0.82)
    if shape == "triangle":
        return np.maximum(ax * np.float32(0.866) + y * np.float32(0.5), -y) - np.float32(0.58)
    if shape == "cross":
        arm, end = np.float32(0.36), np.float32(1.0)
        return np.minimum(np.maximum(ax - end, ay - arm), np.maximum(ax - arm, ay - end))
    radius = np.sqrt(x * x + y * y)
    return radius - (np.float32(0.78) + np.float32(0.32) * np.cos(5 * np.arctan2(y, x)))


def _weave(texture: str, x: Plane, y: Plane, u: float) -> Plane:
    """Returns a pattern with one period per unit, positive in one colour and negative in the other, of slope about 2 per unit."""
    if texture == "striped":
        return _triangle(x + np.float32(u))
    if texture == "ringed":
        return _triangle(np.sqrt(x * x + y * y) + np.float32(u))
    if texture == "wavy":
        return _triangle(y + np.float32(0.45) * _triangle(x) + np.float32(u))
    if texture == "checkered":
        product = _triangle(x + np.float32(u)) * _triangle(y + np.float32(u))
        return np.sign(product) * np.minimum(np.abs(_triangle(x + np.float32(u))), np.abs(_triangle(y + np.float32(u))))
    fx, fy = x + np.float32(u), y + np.float32(u)
    fx, fy = fx - np.rint(fx), fy - np.rint(fy)
    return np.float32(2) * (np.float32(0.3) - np.sqrt(fx * fx + fy * fy))


def _triangle(x: Plane) -> Plane:
    """A triangle wave of period one between -0.5 and 0.5."""
    return np.float32(2) * np.abs(x - np.rint(x)) - np.float32(0.5)


def _captions(label: int, objects: tuple[SceneObject, ...], ground: str, u: list[float]) -> tuple[str, ...]:
    dominant = [item for item in objects if item.kind == label]
    first, other = dominant[0], next(item for item in objects if item.kind != label)
    a, b = CLASS_NAMES[first.kind], CLASS_NAMES[other.kind]
    relation = _relation(first, other)
    back = _relation(other, first)
    number = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")[len(dominant)]
    on = f"on {'an' if ground[0] in 'aeiou' else 'a'} {ground} ground"
    texts = [f"a {a} {relation} a {b} {on}" if relation else "", f"a {b} {back} a {a} {on}"]
    if u[7] < 0.5 or not relation:
        texts.reverse()
    size = f"a {a} bigger than a {b}" if first.radius > other.radius else f"a {a} smaller than a {b}"
    many = f"{number} {a}{_plural(a)} with a {b}" if len(dominant) > 1 else f"one {a} with a {b}"
    return tuple(text for text in (*texts, f"{size} {on}", f"{many} {on}") if text)


def _plural(name: str) -> str:
    return "es" if name.endswith("s") else "s"


def _relation(a: SceneObject, b: SceneObject) -> str:
    """Returns where ``a`` is relative to ``b``; empty if ``b`` lies on ``a``."""
    dx, dy = a.x - b.x, a.y - b.y
    gap = math.hypot(dx, dy)
    if gap + a.radius < b.radius * 1.05:
        return "inside"
    if gap + b.radius < a.radius * 1.05:
        return ""
    if abs(dx) >= abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"
