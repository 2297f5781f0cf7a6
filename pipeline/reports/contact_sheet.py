"""Contact sheet of shards: images sampled evenly from all shards, without augmentation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from pipeline.data.formats.composite import Shown, composite, default_shown
from pipeline.data.index.captions import REPLACED
from pipeline.data.index.manifest import Manifest
from pipeline.data.order.random import choose
from pipeline.reports import images, page
from pipeline.untrusted import printable

_SIDE, _GAP, _LINE, _COLUMNS = 224, 16, 18, 8
_DRAW = 0xC0A7  # random stream of this draw


def write(manifest: Manifest, out: Path, count: int, seed: int = 0, *, shown: Shown | None = None) -> None:
    """Draw some samples of an index, sampled from all shards.

    Args:
        manifest: the index.
        out: output file; an image if its name ends in ``.png``, else a self-contained HTML page.
        count: number of samples.
        seed: seed of the selection.
        shown: of images with declared channels, those that are shown; by default the first three.

    Raises:
        DataError: missing shards, or a file that cannot be written.
    """
    cells = gather(manifest, count, seed, shown=shown)
    if out.suffix.lower() == ".png":
        with page.writing(out):
            sheet(cells).save(out)
        return
    page.write(
        out,
        "contact_sheet",
        title="preview of shards",
        cells=cells,
        total=manifest.total,
        shards=len(manifest.shards),
        replaced=manifest.notes.get(REPLACED, 0),
        width=_SIDE,
    )


def gather(manifest: Manifest, count: int, seed: int = 0, *, shown: Shown | None = None) -> list[tuple[Image.Image, str, str]]:
    """Image, key and description of some samples, in the order of the shards; gray where an image cannot be decoded."""
    from pipeline.data.augment.decode import decoder_of
    from pipeline.data.loader.reader import Reader
    from pipeline.data.settings import StorageSettings
    from pipeline.data.storage import Storage

    chosen = choose(manifest.total, count, seed, _DRAW)
    near = Storage(StorageSettings(access="range_read", outage_timeout=20.0))  # do not download whole shards for a few samples
    records = Reader(manifest, wants=("image", "caption", "label"), store=near).fetch(manifest.ids(chosen))
    decoder, cells = decoder_of(manifest.fields), []
    for record in records:
        pixels = decoder.decode([record.image])[0] if record.image is not None else None
        about = [f"{record.width} x {record.height}"]
        if record.label >= 0:
            about.append(f"class {record.label}")
        if record.caption:
            about.append(printable(" ".join(record.caption.split())))
        if pixels is None:
            about.insert(0, f"cannot be used ({record.status if record.status != 'ok' else 'undecodable'})")
            pixels = np.full((_SIDE, _SIDE, 3), 128, np.uint8)
        elif manifest.fields.channels is not None:
            pixels = composite(pixels, shown or default_shown(manifest.fields.channels.count))
        cells.append(
            (images.fitted(pixels, _SIDE, sharp=True), printable(f"{record.shard_name}  {record.key}"), "  ".join(about))
        )
    return cells


def sheet(cells: list[tuple[Image.Image, str, str]]) -> Image.Image:
    """The samples in rows, as one image."""
    columns = min(_COLUMNS, len(cells))
    rows = -(-len(cells) // columns)
    width, height = _SIDE + _GAP, _SIDE + 2 * _LINE + _GAP
    out = Image.new("RGB", (columns * width + _GAP, rows * height + _GAP), "white")
    draw = ImageDraw.Draw(out)
    for number, (image, name, about) in enumerate(cells):
        x, y = _GAP + number % columns * width, _GAP + number // columns * height
        out.paste(image, (x + (_SIDE - image.width) // 2, y + _SIDE - image.height))
        draw.text((x, y + _SIDE + 2), _clipped(name, 34), fill="#1c2126", font=images.font(12))
        draw.text((x, y + _SIDE + _LINE), _clipped(about, 34), fill="#5d6872", font=images.font(12))
    return out


def _clipped(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."
