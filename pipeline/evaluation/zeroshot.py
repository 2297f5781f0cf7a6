"""Zero-shot classification with class names in prompt templates (protocol of CLIP, arXiv 2103.00020).

For each class every template is filled in and encoded, the features are L2-normalised and averaged, and the mean is normalised
again; an image is assigned to the class with the nearest vector. Scores with different templates are not comparable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

SIMPLE = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
"""The seven templates of SLIP, A-CLIP and DetailCLIP; OpenAI's eighty give different scores."""


def class_vectors(
    encode: Callable[[list[str]], Tensor], names: Sequence[str], templates: Sequence[str], *, batch: int = 256
) -> Tensor:
    """One unit vector per class, ``[classes, width]`` fp32.

    Args:
        encode: maps texts to features ``[n, width]``.
        names: class names, in the order of the class numbers.
        templates: sentences with one ``{}``.
        batch: texts encoded at a time.
    """
    texts = [template.replace("{}", name) for name in names for template in templates]
    parts = [encode(texts[low : low + batch]).float() for low in range(0, len(texts), batch)]
    each = F.normalize(torch.cat(parts), dim=1).unflatten(0, (len(names), len(templates)))
    return F.normalize(each.mean(1), dim=1)


def classified(features: Tensor, vectors: Tensor, labels: Tensor, *, ks: Sequence[int] = (1, 5)) -> dict[str, float]:
    """Top-k accuracy, and the mean per-class accuracy.

    Args:
        features: ``[n, width]`` of the images.
        vectors: ``[classes, width]``, see :func:`class_vectors`.
        labels: int64 ``[n]``.
        ks: values of k; clipped to the number of classes.

    Returns:
        ``top<k>`` for each k, and ``mean_per_class``, the mean over the classes that occur of their own top-1.
    """
    similarity = F.normalize(features.float(), dim=1) @ vectors.T
    ranked = similarity.topk(min(max(ks), len(vectors)), dim=1).indices == labels[:, None]
    scores = {f"top{k}": float(ranked[:, :k].any(1).float().mean()) for k in ks}
    right = ranked[:, 0].float()
    total = torch.zeros(len(vectors)).index_add_(0, labels.cpu(), torch.ones(len(labels)))
    hits = torch.zeros(len(vectors)).index_add_(0, labels.cpu(), right.cpu())
    present = total > 0
    scores["mean_per_class"] = float((hits[present] / total[present]).mean())
    return scores
