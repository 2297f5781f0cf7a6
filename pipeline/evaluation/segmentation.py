"""Linear segmentation: a linear classifier on each patch token, evaluated per pixel (mIoU).

The target of a patch is the share of each class among its pixels, on the centre square at the tower's input size; ignored classes
are excluded from training and evaluation. For evaluation, logits are upsampled bilinearly and compared with that same square or,
as in published results, with the whole class map at its own resolution. In the latter case square windows of the image's height
(or width) slide over it, each overlapping the next by a third, and overlapping windows are averaged by their logits.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pipeline.data.index.manifest import Manifest
from pipeline.data.loader.reader import Reader
from pipeline.errors import DataError
from pipeline.evaluation.heads import RATES, Heads, held_out, train_heads
from pipeline.evaluation.online import Pictures
from pipeline.evaluation.table import Table, all_reduce_sum, extract
from pipeline.models.eval_model import EvalModel

IGNORED = 255


def confusion(predicted: Tensor, wanted: Tensor, classes: int) -> Tensor:
    """Confusion matrix, int64 ``[classes, classes]``; rows are the true classes.

    Args:
        predicted: classes, any shape.
        wanted: true classes, same shape; values that are not a class are skipped.
        classes: number of classes.
    """
    known = (wanted >= 0) & (wanted < classes)
    return torch.bincount(wanted[known] * classes + predicted[known], minlength=classes**2).view(classes, classes)


def ious(matrix: Tensor) -> Tensor:
    """Intersection over union of each class, float64 ``[classes]``; nan for a class neither present nor predicted."""
    hits = matrix.diagonal().double()
    return hits / (matrix.sum(0) + matrix.sum(1) - matrix.diagonal()).double()


def mean_iou(matrix: Tensor) -> float:
    """Mean IoU over the classes that are present or predicted."""
    return float(ious(matrix).nanmean())


def class_map(data: bytes, *, size: int, classes: int, ignore: Sequence[int], key: str) -> NDArray[np.int64]:
    """The classes of the pixels of an image's centre square, ``[size, size]``; ignored pixels are 255.

    Raises:
        DataError: not an image of class numbers, or other numbers than those.
    """
    numbers = _numbers(data, key)
    height, width = numbers.shape
    side = min(height, width)
    steps = (np.arange(size) + 0.5) * side / size
    cut = numbers[np.ix_(((height - side) / 2 + steps).astype(int), ((width - side) / 2 + steps).astype(int))]
    return _known(cut, classes, ignore, key)


def whole_map(data: bytes, *, classes: int, ignore: Sequence[int], key: str) -> NDArray[np.int64]:
    """The classes of all pixels, ``[height, width]``, otherwise as :func:`class_map`."""
    return _known(_numbers(data, key), classes, ignore, key)


def places(manifest: Manifest) -> list[float]:
    """Positions of the windows along the longer side of the longest image, with an overlap of a third.

    A single centred one if all images are square.
    """
    rows = [(manifest.column(n, "height"), manifest.column(n, "width")) for n in range(len(manifest.shards))]
    longest = max((float((np.maximum(h, w) / np.minimum(h, w)).max()) for h, w in rows if len(h)), default=1.0)
    count = math.ceil((longest - 1) * 1.5 - 1e-9) + 1
    return [n / (count - 1) for n in range(count)] if count > 1 else [0.5]


def over_windows(logits: Sequence[Tensor], places: Sequence[float], height: int, width: int) -> Tensor:
    """Most likely class of each pixel by the mean logits of the windows that cover it.

    Args:
        logits: of each window, ``[classes, side, side]``, one per patch.
        places: positions of the windows along the longer side, 0 to 1.
        height, width: of the class map, pixels.

    Returns:
        int64 ``[height, width]``.
    """
    side = min(height, width)
    total = logits[0].new_zeros(len(logits[0]), height, width)
    for one, place in zip(logits, places, strict=True):
        top, left = round((height - side) * place), round((width - side) * place)
        large = F.interpolate(one[None], size=(side, side), mode="bilinear", align_corners=False)[0]
        total[:, top : top + side, left : left + side] += large
    # The argmax of the sum equals that of the mean: all classes of a pixel are covered by the same windows.
    return total.argmax(0)


def _numbers(data: bytes, key: str) -> NDArray[np.int64]:
    hint = "store class numbers as a gray or palette PNG"
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode not in ("L", "P", "I", "I;16"):
                raise DataError(f"the class map has mode {image.mode}", where=key, hint=hint)
            return np.asarray(image).astype(np.int64)
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"the class map cannot be read ({error})", where=key, hint=hint) from error


def _known(cut: NDArray[np.int64], classes: int, ignore: Sequence[int], key: str) -> NDArray[np.int64]:
    cut = np.where(np.isin(cut, list(ignore)), IGNORED, cut)
    wrong = np.unique(cut[(cut >= classes) & (cut != IGNORED)])
    if len(wrong):
        raise DataError(
            f"the class map holds {wrong[:4].tolist()}, but there are {classes} classes, 0 to {classes - 1}",
            where=key,
            hint="set evaluation.segmentation.num_classes, or name what is no class in evaluation.segmentation.ignore_index",
        )
    return cut


class Segmentation:
    """Linear segmentation evaluator; see the module.

    Args:
        train, test: images of samples with class maps.
        readers: read their class maps.
        size: side of the images, pixels.
        classes: number of classes.
        ignore: values that are not a class.
        names: class names for per-class scores; the class numbers by default.
        rates, epochs, batch: of the training; the best learning rate is chosen on held-out images.
        hold_out: share of the held-out images.
        windows: crops of the images of ``test`` at the positions of :func:`places`, by position: whole class maps are then
            evaluated at their own resolution. Without them, the centre squares are evaluated at ``size``.
        group: a gloo group, or ``None`` for the default.
    """

    def __init__(
        self,
        train: Pictures,
        test: Pictures,
        readers: tuple[Reader, Reader],
        *,
        size: int,
        classes: int,
        ignore: Sequence[int] = (IGNORED,),
        names: Sequence[str] = (),
        rates: Sequence[float] = RATES,
        epochs: int = 20,
        batch: int = 16,
        hold_out: float = 0.1,
        windows: Mapping[float, Pictures] | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self._train, self._test, self._readers, self._size = train, test, readers, size
        self._classes, self._ignore = classes, tuple(ignore)
        self._names = list(names) or [str(number) for number in range(classes)]
        self._rates, self._epochs, self._batch, self._hold_out, self._group = tuple(rates), epochs, batch, hold_out, group
        self._windows = dict(windows or {})

    def __call__(self, subject: EvalModel) -> dict[str, float]:
        """Train and evaluate.

        Returns:
            ``segmentation/miou``, ``segmentation/pixels`` (pixel accuracy), ``segmentation/majority`` (mIoU of always predicting
            the most frequent class of the training split), ``segmentation/iou/<class>`` and the chosen learning rate.

        Raises:
            DataError: on all ranks, if a split is empty, or a class map is unreadable or out of range.
        """

        def features(images: Tensor) -> Tensor:
            found: Tensor = subject.tokens(images).patches
            return found

        train = extract(self._train, features, labelled=False)
        seen = [extract(one, features, labelled=False) for one in self._windows.values() or (self._test,)]
        test = seen[0]
        maps = (
            torch.stack(given) if (given := self._maps(train, 0)) else torch.zeros(0, self._size, self._size, dtype=torch.int64)
        )
        wanted = self._maps(test, 1, whole=bool(self._windows))
        counts = all_reduce_sum(torch.tensor([len(train), len(test)]), self._group)
        if int(counts.min()) < 2:
            raise DataError(
                f"{int(counts[0])} pictures to learn from and {int(counts[1])} to judge",
                where="evaluation.segmentation",
                hint="give shards with .seg.png members",
            )
        patch = subject.tower.patch
        shares = _shares(maps, patch, self._classes)
        mine = held_out(self._train.total, self._hold_out)[train.numbers]
        there = torch.zeros(self._train.total, dtype=torch.int64)
        there[train.numbers[~mine]] = 1
        heads = train_heads(
            train.values[~mine],
            shares[~mine],
            train.numbers[~mine],
            order=all_reduce_sum(there, self._group).nonzero().squeeze(1),
            rates=self._rates,
            epochs=self._epochs,
            batch=self._batch,
            group=self._group,
            device=self._train.device,
        )
        choosing = [self._judged(heads, rate, [train.values[mine]], list(maps[mine])) for rate in range(len(self._rates))]
        best = max(range(len(self._rates)), key=lambda rate: mean_iou(choosing[rate]))
        matrix = self._judged(heads, best, [table.values for table in seen], wanted, list(self._windows) or None)
        commonest = int(all_reduce_sum(shares.double().sum((0, 1)), self._group).argmax())
        majority = torch.zeros_like(matrix)
        majority[:, commonest] = matrix.sum(1)
        return {
            "segmentation/miou": mean_iou(matrix),
            "segmentation/pixels": int(matrix.diagonal().sum()) / max(int(matrix.sum()), 1),
            "segmentation/majority": mean_iou(majority),
            "segmentation/rate": self._rates[best],
        } | {f"segmentation/iou/{self._names[i]}": v for i, v in enumerate(ious(matrix).tolist()) if v == v}

    def _maps(self, table: Table, which: int, *, whole: bool = False) -> list[Tensor]:
        """Class maps of this rank's samples, ``[size, size]`` or whole; an error on one rank is raised on all."""
        found, problem = [], None
        known: dict[str, Any] = {"classes": self._classes, "ignore": self._ignore}
        try:
            for record in self._readers[which].fetch(np.array(table.ids, dtype=np.uint64)):
                if record.segmentation is None:
                    raise DataError("there is no class map", where=record.key, hint="give each sample a .seg.png")
                if whole:
                    given: NDArray[Any] = whole_map(record.segmentation, key=record.key, **known).astype(np.uint8)
                else:
                    given = class_map(record.segmentation, size=self._size, key=record.key, **known)
                found.append(torch.from_numpy(given))
        except DataError as error:
            problem = error
        problems: list[DataError | None] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(problems, problem, group=self._group)
        for one in problems:
            if one is not None:
                raise one
        return found

    def _judged(
        self, heads: Heads, rate: int, tokens: Sequence[Tensor], maps: Sequence[Tensor], places: Sequence[float] | None = None
    ) -> Tensor:
        """Confusion matrix over all ranks, from the tokens ``[n, patches, width]`` of each window."""
        matrix = torch.zeros(self._classes, self._classes, dtype=torch.int64)
        one = Heads(heads.weight[rate : rate + 1], heads.bias[rate : rate + 1], heads.mean, heads.scale)
        for row, wanted in enumerate(maps):
            side = round(tokens[0].shape[1] ** 0.5)
            logits = [one(square[row])[0].T.reshape(self._classes, side, side) for square in tokens]
            predicted = over_windows(logits, places or (0.5,), *wanted.shape[-2:])
            matrix += confusion(predicted, wanted.long(), self._classes)
        return all_reduce_sum(matrix, self._group)


def _shares(maps: Tensor, patch: int, classes: int) -> Tensor:
    """Shares of the classes among the pixels of each patch, ``[n, patches, classes]``; ignored pixels do not count."""
    found = []
    for one in maps:
        rows, columns = one.shape[0] // patch, one.shape[1] // patch
        cut = one[: rows * patch, : columns * patch].view(rows, patch, columns, patch).transpose(1, 2).reshape(-1, patch * patch)
        counts = torch.zeros(len(cut), max(classes, IGNORED) + 1).scatter_add_(1, cut, torch.ones(cut.shape))
        found.append(counts[:, :classes] / (patch * patch))
    return torch.stack(found) if found else torch.zeros(0, 1, classes)
