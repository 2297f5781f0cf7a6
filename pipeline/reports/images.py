"""Images of reports: views as pixels, resized, with hidden patches hatched and frames drawn; encoded for a page.

Colours are those of Okabe and Ito, which are distinguishable with any colour vision.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pipeline.data.augment.views import IMAGENET_MEAN, IMAGENET_STD

Pixels = NDArray[np.uint8]

BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"


def pixels(view: Any) -> Pixels:
    """Convert a normalised view to an image.

    Args:
        view: float tensor ``[3, height, width]``, normalised with ImageNet's mean and standard deviation.

    Returns:
        uint8 ``[height, width, 3]``.
    """
    values = view.detach().float().cpu().numpy().transpose(1, 2, 0) * np.asarray(IMAGENET_STD, np.float32) + np.asarray(
        IMAGENET_MEAN, np.float32
    )
    return np.clip(np.rint(values * 255), 0, 255).astype(np.uint8)


def fitted(image: Pixels, side: int, *, sharp: bool = False) -> Image.Image:
    """Resize an image so that its longer side has ``side`` pixels.

    Args:
        image: uint8 ``[height, width, 3]``.
        side: pixels.
        sharp: enlarge with nearest-neighbour instead of smooth interpolation.
    """
    height, width = image.shape[:2]
    scale = side / max(height, width)
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    smooth = Image.Resampling.LANCZOS
    return Image.fromarray(image).resize(size, Image.Resampling.NEAREST if sharp and scale > 1 else smooth)


def veiled(image: Image.Image, hidden: NDArray[np.bool_]) -> Image.Image:
    """Hatch the hidden patches of an image in gray.

    Args:
        image: the image.
        hidden: bool ``[rows, columns]``, true where hidden.
    """
    rows, columns = hidden.shape
    hatch = Image.new("RGB", image.size, (128, 132, 136))
    draw = ImageDraw.Draw(hatch)
    for offset in range(-image.height, image.width, 8):
        draw.line([(offset, 0), (offset + image.height, image.height)], fill=(158, 162, 166), width=2)
    grid = Image.fromarray(hidden.astype(np.uint8) * 224).resize(image.size, Image.Resampling.NEAREST)
    out = Image.composite(hatch, image, grid)
    lines = ImageDraw.Draw(out)
    for row, column in np.argwhere(hidden).tolist():
        left, top = column * image.width / columns, row * image.height / rows
        lines.rectangle((left, top, left + image.width / columns - 1, top + image.height / rows - 1), outline=(96, 100, 104))
    return out


def boxed(image: Image.Image, boxes: Sequence[tuple[tuple[float, float, float, float], str, str, int]]) -> Image.Image:
    """Draw labelled frames on an image, with a white rim for contrast on any background.

    Args:
        image: the image.
        boxes: of each frame left, top, right and bottom as shares of the sides, its colour, its label of one or two letters, and
            its width in pixels.
    """
    out = image.copy()
    draw = ImageDraw.Draw(out)
    tags = []
    for (left, top, right, bottom), colour, name, width in boxes:
        x0, y0, x1, y1 = (
            left * (image.width - 1),
            top * (image.height - 1),
            right * (image.width - 1),
            bottom * (image.height - 1),
        )
        draw.rectangle((x0 - 1, y0 - 1, max(x1 + 1, x0), max(y1 + 1, y0)), outline="white", width=width + 2)
        draw.rectangle((x0, y0, max(x1, x0), max(y1, y0)), outline=colour, width=width)
        tags.append((x0, y0, colour, name))
    for x0, y0, colour, name in tags:
        x, y = min(max(x0, 0), image.width - 22), min(max(y0, 0), image.height - 22)
        draw.rectangle((x, y, x + 21, y + 21), fill=colour, outline="white")
        draw.text((x + 11, y + 11), name, fill=on(colour), font=font(17), anchor="mm")
    return out


def on(colour: str) -> str:
    """Black or white, whichever contrasts better with a colour such as ``#0072B2``."""
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "#ffffff"


def font(size: int) -> Any:
    """Pillow's built-in font, size in pixels; missing characters are drawn as boxes."""
    return ImageFont.load_default(size)


def embedded(image: Image.Image) -> str:
    """Encode an image as the value of an ``src`` attribute: PNG in base64."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
