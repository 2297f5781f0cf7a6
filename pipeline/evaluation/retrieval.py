"""Image-text retrieval: recall@k and ranks in both directions (protocol of CLIP_benchmark).

An image may have several captions, and several images may share a caption: an image and a caption match if their numbers are
equal, and *any* match is a correct answer. Ranks are counted in chunks, so that no matrix of size images x captions is stored.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def retrieval(
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
    found: dict[str, float] = {}
    for direction, ranks in (
        ("image_to_text", _ranks(images, texts, image_ids, text_ids, chunk)),
        ("text_to_image", _ranks(texts, images, text_ids, image_ids, chunk)),
    ):
        found |= {f"{direction}/recall@{k}": float((ranks <= k).double().mean()) for k in ks}
        found[f"{direction}/mean_rank"] = float(ranks.double().mean())
        found[f"{direction}/median_rank"] = float(ranks.double().quantile(0.5))
    return found


def _ranks(queries: Tensor, answers: Tensor, query_ids: Tensor, answer_ids: Tensor, chunk: int) -> Tensor:
    """One plus the number of wrong answers that are at least as near as the nearest correct one."""
    ranks = []
    for low in range(0, len(queries), chunk):
        similarity = queries[low : low + chunk] @ answers.T
        right = query_ids[low : low + chunk, None] == answer_ids[None, :]
        best = similarity.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        ranks.append(((similarity >= best) & ~right).sum(1) + 1)
    return torch.cat(ranks)
