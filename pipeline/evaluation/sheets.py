"""Image sheets: attention maps, and retrieval results by caption or by image."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from pipeline.data.loader.reader import Reader
from pipeline.evaluation.attention import shaded
from pipeline.evaluation.online import Pictures
from pipeline.evaluation.pairs import numbered
from pipeline.evaluation.table import all_gather_table, extract, gathered
from pipeline.models.eval_model import EvalModel

Sheet = NDArray[np.uint8]
_RIGHT, _WRONG, _UNKNOWN = (40, 160, 70), (190, 60, 50), (150, 150, 150)
_FRAME, _INK, _LETTERS, _POINTS = 3, (30, 30, 30), 17, 12


def thumbs(images: Tensor, *, mean: Sequence[float], std: Sequence[float], side: int) -> Sheet:
    """Denormalise images ``[n, 3, h, w]`` to uint8 ``[n, side, side, 3]``."""
    shape = (1, 3, 1, 1)
    pixels = images.detach().float().cpu() * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)
    small = F.interpolate(pixels, (side, side), mode="bilinear", antialias=True).clamp(0, 1).permute(0, 2, 3, 1)
    found: Sheet = (255 * small).round().byte().numpy()
    return found


def attention_sheet(
    images: Tensor, attention: Tensor, *, mean: Sequence[float], std: Sequence[float], tile: int = 96, heads: int = 8
) -> Sheet:
    """Images above the class token's attention: the mean of all heads, then one row per head.

    Args:
        images: normalised, ``[n, 3, size, size]``.
        attention: ``[n, heads, patches]``, a square grid of patches.
        mean, std: of the normalisation.
        tile: side of one image, pixels.
        heads: maximum number of rows of single heads.

    Returns:
        uint8 ``[(2 + heads) * tile, n * tile, 3]``; each map is dark to bright from its own minimum to its own maximum.
    """
    side = round(attention.shape[2] ** 0.5)
    maps = torch.cat([attention.mean(1, keepdim=True), attention[:, :heads]], dim=1).float().cpu().numpy()
    rows = [thumbs(images, mean=mean, std=std, side=tile)]
    for row in maps.transpose(1, 0, 2):
        small = [Image.fromarray(shaded(one.reshape(side, side))) for one in row]
        rows.append(np.stack([np.asarray(one.resize((tile, tile), Image.Resampling.NEAREST)) for one in small]))
    return np.concatenate([np.concatenate(list(row), axis=1) for row in rows])


class Finding:
    """Nearest images to some captions (for models with a text encoder) or else to some images.

    Features are compared identically on all ranks, so that the sheet does not depend on their number.

    Args:
        pictures: images that are searched; divided among the ranks.
        reader: reads their captions.
        group: a gloo group, or ``None`` for the default.
        rows: number of queries, captions or images, the first of the list.
        columns: number of nearest images shown.
        tile: side of one image, pixels.
    """

    def __init__(
        self,
        pictures: Pictures,
        reader: Reader,
        *,
        group: dist.ProcessGroup | None = None,
        rows: int = 6,
        columns: int = 8,
        tile: int = 112,
    ) -> None:
        self._pictures, self._reader, self._group = pictures, reader, group
        self._rows, self._columns, self._tile = rows, columns, tile
        self._captions: list[tuple[str, ...]] | None = None
        self._thumbs: Sheet | None = None

    def __call__(self, subject: EvalModel) -> tuple[str, Sheet] | None:
        """The kind of sheet (``retrieval`` or ``neighbours``) and the sheet, the same on all ranks.

        The query is on the left. A green frame marks an image that matches the caption, or one of the same class; a red one marks
        another image, a gray one has no class. ``None`` if there is no query or nothing to search.
        """
        found = all_gather_table(extract(self._pictures, subject.embedded, labelled=False), self._group)
        if self._thumbs is None:
            self._thumbs = self._seen(subject)
        features = F.normalize(found.values.double(), dim=1)
        if subject.texts is not None:
            return self._by_captions(subject, features, found.ids)
        count = min(self._rows, len(features))
        similarity = features[:count] @ features.T
        similarity[torch.arange(count), torch.arange(count)] = -torch.inf
        best = _nearest(similarity, min(self._columns, len(features) - 1))
        if not best.numel():
            return None
        labels = found.labels.tolist()
        return "neighbours", self._drawn(
            [self._thumbs[row] for row in range(count)],
            best,
            [[_frame(labels[row], labels[place]) for place in places] for row, places in enumerate(best.tolist())],
        )

    def _by_captions(self, subject: EvalModel, features: Tensor, ids: list[int]) -> tuple[str, Sheet] | None:
        if self._captions is None:
            self._captions = [record.captions for record in self._reader.fetch(np.array(ids, dtype=np.uint64))]
        asked = [(place, own[0]) for place, own in enumerate(self._captions) if own][: self._rows]
        if subject.texts is None or not asked:
            return None
        with torch.inference_mode():
            texts = subject.texts([caption for _, caption in asked]).double().cpu()
        best = _nearest(F.normalize(texts, dim=1) @ features.T, min(self._columns, len(features)))
        owners = numbered(self._captions, merge=True)[0].tolist()
        frames = [
            [_RIGHT if owners[place] == owners[own] else _WRONG for place in places]
            for (own, _), places in zip(asked, best.tolist(), strict=True)
        ]
        return "retrieval", self._drawn([_written(caption, self._tile) for _, caption in asked], best, frames)

    def _seen(self, subject: EvalModel) -> Sheet:
        """All images as thumbnails, in the order of the list."""
        side, none = self._tile, np.zeros((0, self._tile, self._tile, 3), dtype=np.uint8)
        parts = [
            (thumbs(shown.images, mean=subject.mean, std=subject.std, side=side), shown.numbers.numpy())
            for shown in self._pictures.shown()
        ]
        mine = (np.concatenate([none, *(p[0] for p in parts)]), np.concatenate([np.zeros(0, np.int64), *(p[1] for p in parts)]))
        every = gathered(mine, self._group)
        order = np.argsort(np.concatenate([part[1] for part in every]))
        whole: Sheet = np.concatenate([part[0] for part in every])[order]
        return whole

    def _drawn(self, first: Sequence[Sheet], best: Tensor, frames: Sequence[Sequence[tuple[int, int, int]]]) -> Sheet:
        if self._thumbs is None:
            raise RuntimeError("pictures are drawn before they were seen")
        gap = np.full((self._tile, 2 * _FRAME, 3), 255, dtype=np.uint8)
        rows = []
        for asked, places, colours in zip(first, best.tolist(), frames, strict=True):
            cells = [_framed(self._thumbs[place], colour) for place, colour in zip(places, colours, strict=True)]
            rows.append(np.concatenate([asked, gap, *cells], axis=1))
        return np.concatenate(rows)


def _nearest(similarity: Tensor, count: int) -> Tensor:
    """Indices of the largest values of each row; the first among equals."""
    return similarity.argsort(dim=1, descending=True, stable=True)[:, :count]


def _frame(wanted: int, there: int) -> tuple[int, int, int]:
    if wanted < 0 or there < 0:
        return _UNKNOWN
    return _RIGHT if wanted == there else _WRONG


def _framed(picture: Sheet, colour: tuple[int, int, int]) -> Sheet:
    found = np.empty_like(picture)
    found[:] = colour
    inner = slice(_FRAME, -_FRAME)
    found[inner, inner] = picture[inner, inner]
    return found


def _written(text: str, side: int) -> Sheet:
    """A caption on white; text that does not fit is truncated."""
    image = Image.new("RGB", (side, side), "white")
    words = textwrap.wrap(text, _LETTERS, max_lines=(side - 8) // (_POINTS + 2), placeholder=" …")
    font = ImageFont.load_default(_POINTS)
    for number, row in enumerate(words):
        ImageDraw.Draw(image).text((4, 4 + number * (_POINTS + 2)), row, fill=_INK, font=font)
    return np.asarray(image)
