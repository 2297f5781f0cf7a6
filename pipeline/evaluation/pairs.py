"""Zero-shot classification and image-text retrieval on shards, with the images divided among the ranks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from pipeline.data.loader.reader import Reader
from pipeline.errors import ConfigError, DataError
from pipeline.evaluation.online import Pictures
from pipeline.evaluation.retrieval import retrieval
from pipeline.evaluation.table import all_gather_table, extract
from pipeline.evaluation.zeroshot import SIMPLE, class_vectors, classified
from pipeline.models.eval_model import EvalModel

_TEXTS = 256  # texts encoded at a time


class ZeroShot:
    """Zero-shot classification of images by class names.

    Args:
        pictures: images to classify.
        names: class names, in the order of the class numbers.
        templates: sentences with one ``{}``.
        group: a gloo group, or ``None`` for the default.
    """

    def __init__(
        self,
        pictures: Pictures,
        names: Sequence[str],
        *,
        templates: Sequence[str] = SIMPLE,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self._pictures, self._names, self._templates, self._group = pictures, list(names), list(templates), group

    def __call__(self, subject: EvalModel) -> dict[str, float]:
        """``zeroshot/top1``, ``zeroshot/top5``, ``zeroshot/mean_per_class``.

        Raises:
            ConfigError: the model has no text encoder, or there are no class names.
            DataError: on all ranks, if there is no label, or a label without a name.
        """
        if subject.texts is None or not self._names:
            raise ConfigError(
                "zero-shot classification wants a text tower and class names",
                where="evaluation.zeroshot",
                hint="name a file of classes, and judge a method that reads captions",
            )
        found = all_gather_table(extract(self._pictures, subject.embedded), self._group)
        if not len(found) or int(found.labels.max()) >= len(self._names):
            raise DataError(
                f"labels reach to {int(found.labels.max()) if len(found) else 'nothing'}, {len(self._names)} classes are named",
                where="evaluation.zeroshot",
                hint="name every class, in the order of the numbers, and judge shards with .cls members",
            )
        with torch.inference_mode():
            vectors = class_vectors(subject.texts, self._names, self._templates, batch=_TEXTS)
        scores = classified(found.values, vectors.float().cpu(), found.labels)
        return {f"zeroshot/{name}": value for name, value in scores.items()}


class Retrieval:
    """Image-to-text and text-to-image retrieval; an image may have several captions.

    Args:
        pictures: images with captions in their shards.
        reader: reads the captions.
        merge: whether images with the same caption are correct for each other, see :func:`numbered`.
        group: a gloo group, or ``None`` for the default.
    """

    def __init__(
        self, pictures: Pictures, reader: Reader, *, merge: bool = False, group: dist.ProcessGroup | None = None
    ) -> None:
        self._pictures, self._reader, self._merge, self._group = pictures, reader, merge, group

    def __call__(self, subject: EvalModel) -> dict[str, float]:
        """``retrieval/image_to_text/recall@1`` and so on, see :func:`pipeline.evaluation.retrieval.retrieval`.

        Raises:
            ConfigError: the model has no text encoder.
            DataError: on all ranks, if a sample has no caption.
        """
        if subject.texts is None:
            raise ConfigError(
                "retrieval wants a text tower", where="evaluation.retrieval", hint="judge a method that reads captions"
            )
        found = all_gather_table(extract(self._pictures, subject.embedded, labelled=False), self._group)
        captions = [record.captions for record in self._reader.fetch(np.array(found.ids, dtype=np.uint64))]
        if not captions or not all(captions):
            raise DataError("some samples have no caption", where="evaluation.retrieval", hint="judge shards that have them")
        images, owners, texts = numbered(captions, merge=self._merge)
        with torch.inference_mode():
            parts = [subject.texts(texts[low : low + _TEXTS]).float().cpu() for low in range(0, len(texts), _TEXTS)]
        scores = retrieval(F.normalize(found.values, dim=1), torch.cat(parts), images, owners)
        return {f"retrieval/{name}": value for name, value in scores.items()}


def numbered(captions: Sequence[Sequence[str]], *, merge: bool) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Assign numbers that match images and captions.

    Args:
        captions: of each image.
        merge: whether images with a common caption share a number, transitively. Otherwise each image matches only its own
            captions, as in the published protocol.

    Returns:
        int64 ``[images]``, the number of each image; int64 ``[captions]``, of each caption; and the captions, each once for each
        image that has it.
    """
    parent = list(range(len(captions)))

    def root(number: int) -> int:
        while parent[number] != number:
            parent[number] = number = parent[parent[number]]
        return number

    first: dict[str, int] = {}
    for number, own in enumerate(captions) if merge else ():
        for caption in own:
            parent[root(number)] = root(first.setdefault(caption, number))
    images = [root(number) for number in range(len(captions))]
    owners = [images[number] for number, own in enumerate(captions) for _ in own]
    return torch.tensor(images), torch.tensor(owners), [caption for own in captions for caption in own]
