"""Linear segmentation: a linear classifier on each patch token, evaluated per pixel (mIoU).

The target of a patch is the share of each class among its pixels, on the centre square at the tower's input size; ignored classes
are excluded from training and evaluation. For evaluation, logits are upsampled bilinearly and compared with that same square or,
as in published results, with the whole class map at its own resolution. In the latter case square windows of the image's height
(or width) slide over it, each overlapping the next by a third, and overlapping windows are averaged by their logits.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pipeline.config.sizes import grid_of, size_text
from pipeline.data.index.manifest import Manifest
from pipeline.data.loader.reader import Reader
from pipeline.errors import ConfigError, DataError
from pipeline.evaluation.base import Evaluator
from pipeline.evaluation.features import FeatureTable, all_reduce_sum, extract
from pipeline.evaluation.images import EvalData
from pipeline.evaluation.linear_heads import LinearHeads, gather_positions, held_out_mask, train_heads
from pipeline.evaluation.settings import SegmentationSettings
from pipeline.models.eval_model import EvalModel

IGNORED = 255


def confusion(predicted: Tensor, target: Tensor, classes: int) -> Tensor:
    """Confusion matrix, int64 ``[classes, classes]``; rows are the true classes.

    Args:
        predicted: classes, any shape.
        target: true classes, same shape; values that are not a class are skipped.
        classes: number of classes.
    """
    known = (target >= 0) & (target < classes)
    return torch.bincount(target[known] * classes + predicted[known], minlength=classes**2).view(classes, classes)


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
    return _check_classes(cut, classes, ignore, key)


def full_map(data: bytes, *, classes: int, ignore: Sequence[int], key: str) -> NDArray[np.int64]:
    """The classes of all pixels, ``[height, width]``, otherwise as :func:`class_map`."""
    return _check_classes(_numbers(data, key), classes, ignore, key)


def window_positions(manifest: Manifest) -> list[float]:
    """Positions of the windows along the longer side of the longest image, with an overlap of a third.

    A single centred one if all images are square.
    """
    rows = [(manifest.column(n, "height"), manifest.column(n, "width")) for n in range(len(manifest.shards))]
    longest = max((float((np.maximum(h, w) / np.minimum(h, w)).max()) for h, w in rows if len(h)), default=1.0)
    count = math.ceil((longest - 1) * 1.5 - 1e-9) + 1
    return [n / (count - 1) for n in range(count)] if count > 1 else [0.5]


def merge_windows(logits: Sequence[Tensor], positions: Sequence[float], height: int, width: int) -> Tensor:
    """Most likely class of each pixel by the mean logits of the windows that cover it.

    Args:
        logits: of each window, ``[classes, side, side]``, one per patch.
        positions: of the windows along the longer side, 0 to 1.
        height, width: of the class map, pixels.

    Returns:
        int64 ``[height, width]``.
    """
    side = min(height, width)
    total = logits[0].new_zeros(len(logits[0]), height, width)
    for window, position in zip(logits, positions, strict=True):
        top, left = round((height - side) * position), round((width - side) * position)
        large = F.interpolate(window[None], size=(side, side), mode="bilinear", align_corners=False)[0]
        total[:, top : top + side, left : left + side] += large
    # The argmax of the sum equals that of the mean: all classes of a pixel are covered by the same windows.
    return total.argmax(0)


def _numbers(data: bytes, key: str) -> NDArray[np.int64]:
    hint = "Store class numbers as a gray or palette PNG"
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode not in ("L", "P", "I", "I;16"):
                raise DataError(f"the class map must be gray or palette, not of mode {image.mode}", where=key, hint=hint)
            return np.asarray(image).astype(np.int64)
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"the class map cannot be read ({error})", where=key, hint=hint) from error


def _check_classes(cut: NDArray[np.int64], classes: int, ignore: Sequence[int], key: str) -> NDArray[np.int64]:
    cut = np.where(np.isin(cut, list(ignore)), IGNORED, cut)
    wrong = np.unique(cut[(cut >= classes) & (cut != IGNORED)])
    if len(wrong):
        raise DataError(
            f"the classes of the map must be 0 to {classes - 1}, and it holds {wrong[:4].tolist()}",
            where=key,
            hint="Set num_classes, or ignore_index for values that are not a class, in evaluation.segmentation",
        )
    return cut


class Segmentation(Evaluator[SegmentationSettings]):
    """Linear segmentation; see the module. The best learning rate is chosen on held-out images."""

    def __init__(self, settings: SegmentationSettings, data: EvalData) -> None:
        super().__init__(settings, data)
        train, test = data.class_maps
        size = settings.image_size or data.size
        if not isinstance(size, int):
            raise ConfigError(
                f"class maps are evaluated on squares, and images have {size_text(size)} pixels",
                where="evaluation.segmentation.image_size",
                hint="Set it to a side",
            )
        self._size, self._classes = size, settings.num_classes or 0
        self._positions = window_positions(test) if settings.sliding_window else [0.5]
        size, batch_size = self._size, settings.batch_size
        self._train = data.images(train, size=size, limit=settings.max_train, batch_size=batch_size)
        self._windows = [
            data.images(test, size=size, limit=settings.max_val, batch_size=batch_size, crop_position=position)
            for position in self._positions
        ]

    def __call__(self, model: EvalModel) -> dict[str, float]:
        """Train and evaluate.

        Returns:
            ``miou``, ``pixels`` (pixel accuracy), ``majority`` (mIoU of always predicting the most frequent class of the training
            split), ``rate``, the chosen learning rate, and ``iou/<class>`` of each class.

        Raises:
            DataError: on all ranks, if a split is empty, or a class map is unreadable or out of range.
        """
        settings, group = self.settings, self.data.group

        def features(images: Tensor) -> Tensor:
            patches: Tensor = model.tokens(images).patches
            return patches

        train = extract(self._train, features, labelled=False)
        tests = [extract(window, features, labelled=False) for window in self._windows]
        maps = self._maps(train, self._train.reader("segmentation"))
        stacked = torch.stack(maps) if maps else torch.zeros(0, self._size, self._size, dtype=torch.int64)
        targets = self._maps(tests[0], self._windows[0].reader("segmentation"), full=settings.sliding_window)
        counts = all_reduce_sum(torch.tensor([len(train), len(tests[0])]), group)
        if int(counts.min()) < 2:
            raise DataError(
                f"each split must have 2 images or more, not {int(counts[0])} to train on and {int(counts[1])} to evaluate",
                where="evaluation.segmentation",
                hint="Give shards with .seg.png members",
            )
        shares = _class_shares(stacked, model.tower.patch, self._classes, train.values.shape[1] if len(train.values) else 0)
        held_out = held_out_mask(self._train.total, settings.validation_fraction)[train.positions]
        heads = train_heads(
            train.values[~held_out],
            shares[~held_out],
            train.positions[~held_out],
            order=gather_positions(train.positions[~held_out], self._train.total, group),
            rates=settings.learning_rates,
            epochs=settings.epochs,
            batch=settings.batch_size,
            group=group,
            device=self._train.device,
        )
        rates = range(len(settings.learning_rates))
        validation = [self._confusion(heads, rate, [train.values[held_out]], list(stacked[held_out]), [0.5]) for rate in rates]
        best = max(rates, key=lambda rate: mean_iou(validation[rate]))
        matrix = self._confusion(heads, best, [table.values for table in tests], targets, self._positions)
        most_frequent = int(all_reduce_sum(shares.double().sum((0, 1)), group).argmax())
        majority = torch.zeros_like(matrix)
        majority[:, most_frequent] = matrix.sum(1)
        return {
            "miou": mean_iou(matrix),
            "pixels": int(matrix.diagonal().sum()) / max(int(matrix.sum()), 1),
            "majority": mean_iou(majority),
            "rate": settings.learning_rates[best],
        } | {f"iou/{settings.names[i]}": value for i, value in enumerate(ious(matrix).tolist()) if value == value}

    def _maps(self, table: FeatureTable, reader: Reader, *, full: bool = False) -> list[Tensor]:
        """Class maps of this rank's samples, ``[size, size]`` or whole; an error on one rank is raised on all."""
        maps, problem = [], None
        known: dict[str, Any] = {"classes": self._classes, "ignore": self.settings.ignore_index}
        try:
            for record in reader.fetch(np.array(table.ids, dtype=np.uint64)):
                if record.segmentation is None:
                    raise DataError("the sample has no class map", where=record.key, hint="Give each sample a .seg.png member")
                if full:
                    classes: NDArray[Any] = full_map(record.segmentation, key=record.key, **known).astype(np.uint8)
                else:
                    classes = class_map(record.segmentation, size=self._size, key=record.key, **known)
                maps.append(torch.from_numpy(classes))
        except DataError as error:
            problem = error
        problems: list[DataError | None] = [None] * dist.get_world_size(self.data.group)
        dist.all_gather_object(problems, problem, group=self.data.group)
        for one in problems:
            if one is not None:
                raise one
        return maps

    def _confusion(
        self, heads: LinearHeads, rate: int, windows: Sequence[Tensor], targets: Sequence[Tensor], positions: Sequence[float]
    ) -> Tensor:
        """Confusion matrix over all ranks, from the tokens ``[n, patches, width]`` of each window."""
        matrix = torch.zeros(self._classes, self._classes, dtype=torch.int64)
        head = LinearHeads(heads.weight[rate : rate + 1], heads.bias[rate : rate + 1], heads.mean, heads.scale)
        for row, target in enumerate(targets):
            side = math.isqrt(windows[0].shape[1])  # windows are squares
            logits = [head(tokens[row])[0].T.reshape(self._classes, side, side) for tokens in windows]
            predicted = merge_windows(logits, positions, *target.shape[-2:])
            matrix += confusion(predicted, target.long(), self._classes)
        return all_reduce_sum(matrix, self.data.group)


def _class_shares(maps: Tensor, patch: int, classes: int, patches: int) -> Tensor:
    """Shares of the classes among the pixels of each patch, ``[n, patches, classes]``; ignored pixels do not count.

    ``patches`` is the number that the network returns: a convolutional one also has those that reach beyond the image.
    """
    shares = []
    for one in maps:
        rows, columns = grid_of(one.shape, patch, patches)
        beyond = (0, max(columns * patch - one.shape[1], 0), 0, max(rows * patch - one.shape[0], 0))
        padded = F.pad(one, beyond, value=IGNORED)[: rows * patch, : columns * patch]
        cut = padded.reshape(rows, patch, columns, patch).transpose(1, 2).reshape(-1, patch * patch)
        counts = torch.zeros(len(cut), max(classes, IGNORED) + 1).scatter_add_(1, cut, torch.ones(cut.shape))
        shares.append(counts[:, :classes] / (patch * patch))
    return torch.stack(shares) if shares else torch.zeros(0, 1, classes)
