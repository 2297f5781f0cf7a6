"""Evaluation views of selected samples, and the networks to visualize."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config.schema import Config
from pipeline.config.sizes import Size
from pipeline.data.indexing import open_storage
from pipeline.data.inputs import Inputs

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from pipeline.data.augment.views import Batch, Normalize
    from pipeline.data.index.manifest import Manifest


def varied(manifest: Manifest, count: int, among: int = 20_000) -> NDArray[np.uint64]:
    """The first samples of a data set with distinct classes, then again from the first; not selected by eye or by score.

    Args:
        manifest: the data set.
        count: number of samples.
        among: number of leading samples to choose from.

    Returns:
        uint64 ``[count]`` sample numbers, fewer if the set is smaller.
    """
    ids = manifest.ids(np.arange(min(among, manifest.total)))
    labels = [int(manifest.column(int(number) >> 32, "label")[int(number) & 0xFFFFFFFF]) for number in ids]
    rounds: dict[int, int] = {}
    keys = []
    for index, label in enumerate(labels):
        rounds[label] = rounds.get(label, -1) + 1
        keys.append((rounds[label], index))
    return ids[[index for _, index in sorted(keys)[:count]]]


def evaluation_views(
    config: Config,
    manifest: Manifest,
    ids: NDArray[np.uint64],
    size: Size,
    device: torch.device,
    normalize: Normalize | None = None,
) -> Iterator[Batch]:
    """Evaluation views (the centre) of some samples, decoded and cropped as in every evaluation.

    Args:
        config: the settings.
        manifest: the data set.
        ids: sample numbers.
        size: side of a square, or height and width, pixels.
        device: where the views go.
        normalize: mean and standard deviation; ImageNet's by default.
    """
    from pipeline.data.augment.views import Normalize, ViewSpec, channel_spec
    from pipeline.data.loader.bad_samples import BadSamples
    from pipeline.data.loader.batch_stream import BatchStream, StreamOptions
    from pipeline.data.loader.encoded_batches import StepDataset
    from pipeline.data.loader.reader import Reader
    from pipeline.evaluation.images import FixedList

    order = FixedList(ids, config.evaluation.knn.batch_size)
    reader = Reader(
        manifest, wants=("image", "label", "caption"), checksum=config.data.verify_checksums, store=open_storage(config)
    )
    spec = ViewSpec("image", 1, size, None, normalize=normalize or Normalize(), channels=channel_spec(config.data.channels))
    dataset = StepDataset(reader, order, (spec,), seed=0, world=1, rank=0)
    options = StreamOptions(micro_batch=order.global_batch, workers=0, threads=config.data.decode_threads, hue="off")
    for _, batches in BatchStream(
        dataset, device=device, options=options, bad_samples=BadSamples(None, budget=1.0), last=len(order)
    ):
        yield from batches


class Gallery:
    """Evaluation views of selected samples, and the towers to visualize.

    Args:
        config: the run's settings.
        inputs: its indexed data sets; without evaluation data, the training data are used.
        towers: the networks, ``trained`` among them.
        size: side of the views, or height and width, pixels.
        device: device of the towers.

    Attributes:
        bank, queries: data sets of images that are searched, and of images whose neighbours are searched for.
        split: description of the queries, ``validation`` or ``training``.
    """

    def __init__(self, config: Config, inputs: Inputs, towers: dict[str, Any], size: Size, device: torch.device) -> None:
        self._config, self._device = config, device
        self.towers, self.size = towers, size
        self.bank, self.queries = inputs.bank or inputs.train, inputs.queries or inputs.train
        self.split = "validation" if self.queries is not self.bank else "training"

    def images(self, manifest: Manifest, ids: NDArray[np.uint64], size: Size) -> tuple[Tensor, list[str]]:
        """Views ``[n, channels, height, width]`` of some samples, and their captions."""
        import torch

        batches = list(evaluation_views(self._config, manifest, ids, size, self._device))
        captions = [caption for batch in batches for caption in batch.captions or [""] * len(batch.keys)]
        return torch.cat([batch.views["image"][0] for batch in batches]), captions

    def classes(self, manifest: Manifest, ids: NDArray[np.uint64]) -> tuple[Tensor, list[int]]:
        """Normalised class tokens ``[n, width]`` of the trained tower, float64, and class numbers."""
        import torch
        from torch.nn import functional as F

        features, labels = [], []
        with torch.inference_mode():
            for batch in evaluation_views(self._config, manifest, ids, self.size, self._device):
                # In double precision: early in training all class tokens agree to seven digits.
                features.append(F.normalize(self.towers["trained"](batch.views["image"][0]).cls.double().cpu(), dim=1))
                labels += batch.labels.tolist()
        return torch.cat(features), labels
