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

from pipeline.config.sizes import grid_of
from pipeline.data.formats.composite import Shown, composite
from pipeline.evaluation.attention import shaded
from pipeline.evaluation.features import all_gather, all_gather_table, extract
from pipeline.evaluation.images import ImageSet
from pipeline.evaluation.retrieval import match_captions
from pipeline.evaluation.tiles import fitted, letterboxed
from pipeline.models.eval_model import EvalModel

Sheet = NDArray[np.uint8]
_RIGHT, _WRONG, _UNKNOWN = (40, 160, 70), (190, 60, 50), (150, 150, 150)
_FRAME, _INK, _LETTERS, _POINTS = 3, (30, 30, 30), 17, 12


def thumbs(images: Tensor, *, mean: Sequence[float], std: Sequence[float], side: int, shown: Shown | None = None) -> Sheet:
    """Denormalise images ``[n, channels, h, w]`` to uint8 ``[n, side, side, 3]``; rectangular ones keep their aspect ratio.

    Args:
        images: normalised.
        mean, std: of the normalisation.
        side: side of a thumbnail, pixels.
        shown: channels shown as red, green and blue, or ``pca``; ``None`` for RGB images.
    """
    size = fitted((images.shape[-2], images.shape[-1]), side)
    if shown is not None:
        resized = F.interpolate(images.detach().float().cpu(), size, mode="bilinear", antialias=True)
        return letterboxed(np.stack([composite(one, shown) for one in resized.permute(0, 2, 3, 1).numpy()]), side)
    shape = (1, 3, 1, 1)
    pixels = images.detach().float().cpu() * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)
    small = F.interpolate(pixels, size, mode="bilinear", antialias=True).clamp(0, 1).permute(0, 2, 3, 1)
    return letterboxed((255 * small).round().byte().numpy(), side)


def attention_sheet(
    images: Tensor,
    attention: Tensor,
    *,
    patch: int,
    mean: Sequence[float],
    std: Sequence[float],
    tile: int = 96,
    heads: int = 8,
    shown: Shown | None = None,
) -> Sheet:
    """Images above the class token's attention: the mean of all heads, then one row per head.

    Args:
        images: normalised, ``[n, channels, height, width]``.
        attention: ``[n, heads, patches]``, in rows.
        patch: side of a patch, pixels.
        mean, std: of the normalisation.
        tile: side of one image, pixels.
        heads: maximum number of rows of single heads.
        shown: as for :func:`thumbs`.

    Returns:
        uint8 ``[(2 + heads) * tile, n * tile, 3]``; each map is dark to bright from its own minimum to its own maximum.
    """
    grid = grid_of(images.shape[-2:], patch, attention.shape[2])
    height, width = fitted((images.shape[-2], images.shape[-1]), tile)
    maps = torch.cat([attention.mean(1, keepdim=True), attention[:, :heads]], dim=1).float().cpu().numpy()
    rows = [thumbs(images, mean=mean, std=std, side=tile, shown=shown)]
    for row in maps.transpose(1, 0, 2):
        small = [Image.fromarray(shaded(one.reshape(grid))) for one in row]
        resized = [np.asarray(one.resize((width, height), Image.Resampling.NEAREST)) for one in small]
        rows.append(letterboxed(np.stack(resized), tile))
    return np.concatenate([np.concatenate(list(row), axis=1) for row in rows])


class NearestImages:
    """Draws the nearest images to some captions (for models with a text encoder) or else to some images.

    Features are compared identically on all ranks, so that the sheet does not depend on their number.

    Args:
        images: images that are searched; divided among the ranks.
        group: a gloo group, or ``None`` for the default.
        rows: number of queries, captions or images, the first of the list.
        columns: number of nearest images shown.
        tile: side of one image, pixels.
    """

    def __init__(
        self,
        images: ImageSet,
        *,
        group: dist.ProcessGroup | None = None,
        rows: int = 6,
        columns: int = 8,
        tile: int = 112,
    ) -> None:
        self._images, self._group = images, group
        self._rows, self._columns, self._tile = rows, columns, tile
        self._captions: list[tuple[str, ...]] | None = None
        self._thumbs: Sheet | None = None

    def __call__(self, model: EvalModel) -> tuple[str, Sheet] | None:
        """The kind of sheet (``retrieval`` or ``neighbours``) and the sheet, the same on all ranks.

        The query is on the left. A green frame marks an image that matches the caption, or one of the same class; a red one marks
        another image, a gray one has no class. ``None`` if there is no query or nothing to search.
        """
        table = all_gather_table(extract(self._images, model.embedded, labelled=False), self._group)
        if self._thumbs is None:
            self._thumbs = self._all_thumbs(model)
        features = F.normalize(table.values.double(), dim=1)
        if model.texts is not None:
            return self._by_captions(self._thumbs, model, features, table.ids)
        count = min(self._rows, len(features))
        similarity = features[:count] @ features.T
        similarity[torch.arange(count), torch.arange(count)] = -torch.inf
        nearest = _nearest(similarity, min(self._columns, len(features) - 1))
        if not nearest.numel():
            return None
        labels = table.labels.tolist()
        return "neighbours", self._draw(
            self._thumbs,
            [self._thumbs[row] for row in range(count)],
            nearest,
            [[_frame(labels[row], labels[image]) for image in images] for row, images in enumerate(nearest.tolist())],
        )

    def _by_captions(self, thumbs: Sheet, model: EvalModel, features: Tensor, ids: list[int]) -> tuple[str, Sheet] | None:
        if self._captions is None:
            reader = self._images.reader("caption")
            self._captions = [record.captions for record in reader.fetch(np.array(ids, dtype=np.uint64))]
        queries = [(image, own[0]) for image, own in enumerate(self._captions) if own][: self._rows]
        if model.texts is None or not queries:
            return None
        with torch.inference_mode():
            texts = model.texts([caption for _, caption in queries]).double().cpu()
        nearest = _nearest(F.normalize(texts, dim=1) @ features.T, min(self._columns, len(features)))
        owners = match_captions(self._captions, merge=True)[0].tolist()
        frames = [
            [_RIGHT if owners[image] == owners[own] else _WRONG for image in images]
            for (own, _), images in zip(queries, nearest.tolist(), strict=True)
        ]
        return "retrieval", self._draw(thumbs, [_write(caption, self._tile) for _, caption in queries], nearest, frames)

    def _all_thumbs(self, model: EvalModel) -> Sheet:
        """All images as thumbnails, in the order of the list."""
        side, none = self._tile, np.zeros((0, self._tile, self._tile, 3), dtype=np.uint8)
        parts = [
            (
                thumbs(batch.images, mean=model.mean, std=model.std, side=side, shown=model.composite),
                batch.positions.numpy(),
            )
            for batch in self._images
        ]
        own = (np.concatenate([none, *(p[0] for p in parts)]), np.concatenate([np.zeros(0, np.int64), *(p[1] for p in parts)]))
        all_parts = all_gather(own, self._group)
        order = np.argsort(np.concatenate([part[1] for part in all_parts]))
        gathered: Sheet = np.concatenate([part[0] for part in all_parts])[order]
        return gathered

    def _draw(
        self, thumbs: Sheet, queries: Sequence[Sheet], nearest: Tensor, frames: Sequence[Sequence[tuple[int, int, int]]]
    ) -> Sheet:
        gap = np.full((self._tile, 2 * _FRAME, 3), 255, dtype=np.uint8)
        rows = []
        for query, images, colours in zip(queries, nearest.tolist(), frames, strict=True):
            cells = [_add_frame(thumbs[image], colour) for image, colour in zip(images, colours, strict=True)]
            rows.append(np.concatenate([query, gap, *cells], axis=1))
        return np.concatenate(rows)


def _nearest(similarity: Tensor, count: int) -> Tensor:
    """Indices of the largest values of each row; the first among equals."""
    return similarity.argsort(dim=1, descending=True, stable=True)[:, :count]


def _frame(query: int, image: int) -> tuple[int, int, int]:
    """Colour of a frame by class numbers, -1 for none."""
    if query < 0 or image < 0:
        return _UNKNOWN
    return _RIGHT if query == image else _WRONG


def _add_frame(thumb: Sheet, colour: tuple[int, int, int]) -> Sheet:
    framed = np.empty_like(thumb)
    framed[:] = colour
    inner = slice(_FRAME, -_FRAME)
    framed[inner, inner] = thumb[inner, inner]
    return framed


def _write(text: str, side: int) -> Sheet:
    """A caption on white; text that does not fit is truncated."""
    image = Image.new("RGB", (side, side), "white")
    lines = textwrap.wrap(text, _LETTERS, max_lines=(side - 8) // (_POINTS + 2), placeholder=" …")
    font = ImageFont.load_default(_POINTS)
    for number, line in enumerate(lines):
        ImageDraw.Draw(image).text((4, 4 + number * (_POINTS + 2)), line, fill=_INK, font=font)
    return np.asarray(image)
