"""Linear segmentation: a linear layer on each patch token says of what the patch is; judged pixel by pixel (mIoU).

A patch learns the shares of the classes among its pixels. To be judged, logits are enlarged bilinearly to the picture. Everything
happens on the centre square, in the size that the tower sees; pixels of the classes to be ignored are neither learned nor judged.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pipeline.data.reader import Reader
from pipeline.errors import DataError
from pipeline.evaluation.heads import RATES, Heads, held_out, train_heads
from pipeline.evaluation.online import Pictures
from pipeline.evaluation.subject import Subject
from pipeline.evaluation.table import Table, extract, summed

IGNORED = 255


def confusion(predicted: Tensor, wanted: Tensor, classes: int) -> Tensor:
    """How often which class was taken for which: int64 ``[classes, classes]``, rows the right ones.

    Args:
        predicted: classes, any shape.
        wanted: likewise; those that are no class are left out.
        classes: how many.
    """
    known = (wanted >= 0) & (wanted < classes)
    return torch.bincount(wanted[known] * classes + predicted[known], minlength=classes**2).view(classes, classes)


def ious(matrix: Tensor) -> Tensor:
    """Intersection over union of each class, float64 ``[classes]``; nan for one that is neither there nor predicted."""
    hits = matrix.diagonal().double()
    return hits / (matrix.sum(0) + matrix.sum(1) - matrix.diagonal()).double()


def mean_iou(matrix: Tensor) -> float:
    """The mean over the classes that are there or predicted."""
    return float(ious(matrix).nanmean())


def class_map(data: bytes, *, size: int, classes: int, ignore: Sequence[int], key: str) -> NDArray[np.int64]:
    """The classes of the pixels of a picture's centre square, ``[size, size]``; what is ignored is 255.

    Raises:
        DataError: it is no picture of class numbers, or holds others than those.
    """
    mend = "store class numbers as a gray or palette PNG"
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode not in ("L", "P", "I", "I;16"):
                raise DataError(f"the class map has mode {image.mode}", where=key, mend=mend)
            numbers = np.asarray(image).astype(np.int64)
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"the class map cannot be read ({error})", where=key, mend=mend) from error
    height, width = numbers.shape
    side = min(height, width)
    steps = (np.arange(size) + 0.5) * side / size
    cut = numbers[np.ix_(((height - side) / 2 + steps).astype(int), ((width - side) / 2 + steps).astype(int))]
    cut = np.where(np.isin(cut, list(ignore)), IGNORED, cut)
    wrong = np.unique(cut[(cut >= classes) & (cut != IGNORED)])
    if len(wrong):
        raise DataError(
            f"the class map holds {wrong[:4].tolist()}, but there are {classes} classes, 0 to {classes - 1}",
            where=key,
            mend="set evaluation.segmentation.classes, or name what is no class in evaluation.segmentation.ignore",
        )
    return cut


class Segmentation:
    """The evaluator; see the module.

    Args:
        train, test: pictures of samples with class maps.
        readers: where their class maps are read from.
        size: side of the pictures, pixels.
        classes: how many.
        ignore: numbers that are no class.
        names: of the classes, for per-class scores; their numbers if not given.
        rates, epochs, batch: of the training; the best rate is chosen on held-out pictures.
        hold_out: their share.
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
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self._train, self._test, self._readers, self._size = train, test, readers, size
        self._classes, self._ignore = classes, tuple(ignore)
        self._names = list(names) or [str(number) for number in range(classes)]
        self._rates, self._epochs, self._batch, self._hold_out, self._group = tuple(rates), epochs, batch, hold_out, group

    def __call__(self, subject: Subject) -> dict[str, float]:
        """``segmentation/miou``, ``segmentation/pixels`` (share of right pixels), ``segmentation/majority`` (mIoU of always
        saying the commonest class of the training split), ``segmentation/iou/<class>`` and the rate that was chosen.

        Raises:
            DataError: on all ranks, if a split is empty, or a class map is unreadable or out of range.
        """

        def features(images: Tensor) -> Tensor:
            found: Tensor = subject.tokens(images).patches
            return found

        train = extract(self._train, features, labelled=False)
        test = extract(self._test, features, labelled=False)
        maps = self._maps(train, 0), self._maps(test, 1)
        counts = summed(torch.tensor([len(train), len(test)]), self._group)
        if int(counts.min()) < 2:
            raise DataError(
                f"{int(counts[0])} pictures to learn from and {int(counts[1])} to judge",
                where="evaluation.segmentation",
                mend="give shards with .seg.png members",
            )
        patch = subject.tower.patch
        shares = _shares(maps[0], patch, self._classes)
        mine = held_out(self._train.total, self._hold_out)[train.numbers]
        there = torch.zeros(self._train.total, dtype=torch.int64)
        there[train.numbers[~mine]] = 1
        heads = train_heads(
            train.values[~mine],
            shares[~mine],
            train.numbers[~mine],
            order=summed(there, self._group).nonzero().squeeze(1),
            rates=self._rates,
            epochs=self._epochs,
            batch=self._batch,
            group=self._group,
            device=self._train.device,
        )
        choosing = [self._judged(heads, rate, train.values[mine], maps[0][mine]) for rate in range(len(self._rates))]
        best = max(range(len(self._rates)), key=lambda rate: mean_iou(choosing[rate]))
        matrix = self._judged(heads, best, test.values, maps[1])
        commonest = int(summed(shares.double().sum((0, 1)), self._group).argmax())
        majority = torch.zeros_like(matrix)
        majority[:, commonest] = matrix.sum(1)
        return {
            "segmentation/miou": mean_iou(matrix),
            "segmentation/pixels": float(matrix.diagonal().sum() / matrix.sum().clamp_min(1)),
            "segmentation/majority": mean_iou(majority),
            "segmentation/rate": self._rates[best],
        } | {f"segmentation/iou/{self._names[i]}": v for i, v in enumerate(ious(matrix).tolist()) if v == v}

    def _maps(self, table: Table, which: int) -> Tensor:
        """Class maps ``[n, size, size]`` of this rank's samples; what is wrong on one rank is raised on all."""
        found, problem = [], None
        try:
            for record in self._readers[which].fetch(np.array(table.ids, dtype=np.uint64)):
                if record.segmentation is None:
                    raise DataError("there is no class map", where=record.key, mend="give each sample a .seg.png")
                given = class_map(
                    record.segmentation, size=self._size, classes=self._classes, ignore=self._ignore, key=record.key
                )
                found.append(torch.from_numpy(given))
        except DataError as error:
            problem = error
        problems: list[DataError | None] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(problems, problem, group=self._group)
        for one in problems:
            if one is not None:
                raise one
        return torch.stack(found) if found else torch.zeros(0, self._size, self._size, dtype=torch.int64)

    def _judged(self, heads: Heads, rate: int, tokens: Tensor, maps: Tensor) -> Tensor:
        """The confusion matrix of all ranks."""
        matrix = torch.zeros(self._classes, self._classes, dtype=torch.int64)
        one = Heads(heads.weight[rate : rate + 1], heads.bias[rate : rate + 1], heads.mean, heads.scale)
        for x, wanted in zip(tokens, maps, strict=True):
            side = round(len(x) ** 0.5)
            logits = one(x)[0].T.reshape(1, self._classes, side, side)
            large = F.interpolate(logits, size=(self._size, self._size), mode="bilinear", align_corners=False)
            matrix += confusion(large[0].argmax(0), wanted, self._classes)
        return summed(matrix, self._group)


def _shares(maps: Tensor, patch: int, classes: int) -> Tensor:
    """Shares of the classes among the pixels of each patch, ``[n, patches, classes]``; what is ignored counts for nothing."""
    found = []
    for one in maps:
        rows, columns = one.shape[0] // patch, one.shape[1] // patch
        cut = one[: rows * patch, : columns * patch].view(rows, patch, columns, patch).transpose(1, 2).reshape(-1, patch * patch)
        counts = torch.zeros(len(cut), max(classes, IGNORED) + 1).scatter_add_(1, cut, torch.ones(cut.shape))
        found.append(counts[:, :classes] / (patch * patch))
    return torch.stack(found) if found else torch.zeros(0, 1, classes)
