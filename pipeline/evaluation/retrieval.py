"""Image-text retrieval: recall@k and ranks in both directions (protocol of CLIP_benchmark).

An image may have several captions, and several images may share a caption: an image and a caption match if their numbers are
equal, and *any* match is a correct answer. Ranks are counted in chunks, so that no matrix of size images x captions is stored.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.errors import ConfigError, DataError
from pipeline.evaluation.base import Evaluator
from pipeline.evaluation.features import all_gather_table, extract
from pipeline.evaluation.settings import RetrievalSettings
from pipeline.models.eval_model import EvalModel

_TEXT_BATCH = 256  # texts encoded at a time


class Retrieval(Evaluator[RetrievalSettings]):
    """Image-to-text and text-to-image retrieval; an image may have several captions."""

    def __call__(self, model: EvalModel) -> dict[str, float]:
        """``image_to_text/recall@1`` and so on, see :func:`retrieval_scores`.

        Raises:
            ConfigError: the model has no text encoder.
            DataError: on all ranks, if a sample has no caption.
        """
        if model.texts is None:
            raise ConfigError(
                "retrieval needs a text encoder", where="evaluation.retrieval", hint="Evaluate a method that reads captions"
            )
        table = all_gather_table(extract(self.data.queries, model.embedded, labelled=False), self.data.group)
        reader = self.data.queries.reader("caption")
        captions = [record.captions for record in reader.fetch(np.array(table.ids, dtype=np.uint64))]
        if not captions or not all(captions):
            raise DataError(
                "some samples have no caption", where="evaluation.retrieval", hint="Evaluate shards with a caption per sample"
            )
        image_ids, text_ids, texts = match_captions(captions, merge=self.settings.merge_equal_captions)
        with torch.inference_mode():
            batches = [texts[low : low + _TEXT_BATCH] for low in range(0, len(texts), _TEXT_BATCH)]
            encoded = torch.cat([model.texts(batch).float().cpu() for batch in batches])
        return retrieval_scores(F.normalize(table.values, dim=1), encoded, image_ids, text_ids)


def match_captions(captions: Sequence[Sequence[str]], *, merge: bool) -> tuple[Tensor, Tensor, list[str]]:
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


def retrieval_scores(
    images: Tensor,
    texts: Tensor,
    image_ids: Tensor,
    text_ids: Tensor,
    *,
    ks: Sequence[int] = (1, 5, 10),
    chunk: int = 1024,
) -> dict[str, float]:
    """Recalls and ranks in both directions.

    Args:
        images: ``[n, width]`` features.
        texts: ``[m, width]`` features.
        image_ids: int64 ``[n]``; each number occurs among ``text_ids``.
        text_ids: int64 ``[m]``; each number occurs among ``image_ids``.
        ks: values of k for recall@k.
        chunk: rows compared at a time.

    Returns:
        ``image_to_text/recall@k`` and ``text_to_image/recall@k`` for each k, and for both directions ``mean_rank`` and
        ``median_rank`` of the best correct answer, 1 being the best. Wrong answers with equal similarity count against the model,
        so that constant features get no credit.
    """
    images, texts = F.normalize(images.double(), dim=1), F.normalize(texts.double(), dim=1)
    scores: dict[str, float] = {}
    for direction, ranks in (
        ("image_to_text", _ranks(images, texts, image_ids, text_ids, chunk)),
        ("text_to_image", _ranks(texts, images, text_ids, image_ids, chunk)),
    ):
        scores |= {f"{direction}/recall@{k}": float((ranks <= k).double().mean()) for k in ks}
        scores[f"{direction}/mean_rank"] = float(ranks.double().mean())
        scores[f"{direction}/median_rank"] = float(ranks.double().quantile(0.5))
    return scores


def _ranks(queries: Tensor, answers: Tensor, query_ids: Tensor, answer_ids: Tensor, chunk: int) -> Tensor:
    """One plus the number of wrong answers that are at least as near as the nearest correct one."""
    ranks = []
    for low in range(0, len(queries), chunk):
        similarity = queries[low : low + chunk] @ answers.T
        correct = query_ids[low : low + chunk, None] == answer_ids[None, :]
        best = similarity.masked_fill(~correct, -torch.inf).amax(1, keepdim=True)
        ranks.append(((similarity >= best) & ~correct).sum(1) + 1)
    return torch.cat(ranks)
