"""Page of a batch as a step was trained on it: views, keys and captions of the samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from pipeline.data.augment.views import Batch
from pipeline.reports import images, page
from pipeline.untrusted import printable

_MOST = 64  # samples of a page
_LARGE, _SMALL = 112, 72  # sides in pixels


@dataclass(frozen=True)
class _Row:
    """A sample: its key, what is known of it, and its views, each with a description."""

    title: str
    note: str
    images: list[tuple[Image.Image, str]]
    width: int = _LARGE
    sharp: bool = True


def write(out: Path, batches: Sequence[Batch], *, step: int, rank: int) -> None:
    """Write the page of a rank's micro-batches; of more than 64 samples the first.

    Args:
        out: the HTML file.
        batches: the micro-batches.
        step: number of the step.
        rank: the rank.
    """
    total = sum(len(batch.keys) for batch in batches)
    rows = [row for number, batch in enumerate(batches) for row in _rows(batch, number)][:_MOST]
    page.write(out, "batch", title=f"step {step}, rank {rank}", step=step, rank=rank, rows=rows, total=total)


def _rows(batch: Batch, micro_batch: int) -> list[_Row]:
    rows = []
    labels = batch.labels.tolist()
    for index, key in enumerate(batch.keys[:_MOST]):
        about = [
            f"micro-batch {micro_batch}",
            f"sample {batch.ids[index]}",
            *([f"class {labels[index]}"] if labels[index] >= 0 else []),
        ]
        if caption := batch.captions[index] if batch.captions else "":
            about.append(f"\u201c{' '.join(caption.split())[:200]}\u201d")
        views = []
        for kind, group in batch.views.items():
            for number, view in enumerate(group):
                if view.dim() == 4 and view.shape[1] == 3:
                    side = _LARGE if len(group) <= 2 else _SMALL
                    image = images.fitted(images.pixels(view[index]), side, sharp=True)
                    views.append((image, f"{kind} {number + 1} of {printable(key)}"))
        rows.append(_Row(printable(key), printable(" \u00b7 ".join(about)), views))
    return rows
