"""Zero-shot classification with class names in prompt templates (protocol of CLIP, arXiv 2103.00020).

For each class every template is filled in and encoded, the features are L2-normalised and averaged, and the mean is normalised
again; an image is assigned to the class with the nearest vector. Scores with different templates are not comparable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.errors import ConfigError, DataError
from pipeline.evaluation.base import Evaluator
from pipeline.evaluation.features import all_gather_table, extract
from pipeline.evaluation.images import EvalData
from pipeline.evaluation.settings import ZeroShotSettings
from pipeline.models.eval_model import EvalModel

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


class ZeroShot(Evaluator[ZeroShotSettings]):
    """Zero-shot classification of images by class names.

    Raises:
        ConfigError: a file of names or of templates cannot be used.
    """

    def __init__(self, settings: ZeroShotSettings, data: EvalData) -> None:
        super().__init__(settings, data)
        self._names = read_lines(settings.class_names, what="class names") if settings.class_names else []
        templates = settings.templates
        self._templates = read_lines(templates, what="prompt templates", placeholder="{}") if templates else list(SIMPLE)

    def __call__(self, model: EvalModel) -> dict[str, float]:
        """``top1``, ``top5``, ``mean_per_class``.

        Raises:
            ConfigError: the model has no text encoder, or there are no class names.
            DataError: on all ranks, if there is no label, or a label without a name.
        """
        if model.texts is None or not self._names:
            raise ConfigError(
                "zero-shot classification needs a text encoder and class names",
                where="evaluation.zeroshot",
                hint="Set evaluation.zeroshot.class_names, and evaluate a method that reads captions",
            )
        table = all_gather_table(extract(self.data.queries, model.embedded), self.data.group)
        if not len(table) or int(table.labels.max()) >= len(self._names):
            labels = f"the largest label is {int(table.labels.max())}" if len(table) else "no sample has a label"
            raise DataError(
                f"{labels}, and class_names has {len(self._names)} lines",
                where="evaluation.zeroshot.class_names",
                hint="Name every class, in the order of the class numbers, and evaluate shards with .cls members",
            )
        with torch.inference_mode():
            vectors = class_vectors(model.texts, self._names, self._templates)
        return classification_scores(table.values, vectors.float().cpu(), table.labels)


def read_lines(file: Path, *, what: str, placeholder: str = "") -> list[str]:
    """The non-empty lines of a text file.

    Args:
        file: the file.
        what: its meaning, for messages.
        placeholder: text that every line has to contain.

    Raises:
        ConfigError: the file cannot be read or is empty, or a line lacks ``placeholder``.
    """
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the file of {what} cannot be read ({error})", where=str(file), hint="Name a text file") from error
    if not lines:
        raise ConfigError(f"the file of {what} must not be empty", where=str(file), hint="Write one per line")
    if wrong := [line for line in lines if placeholder not in line]:
        raise ConfigError(
            f"each of the {what} must contain {placeholder}, and {wrong[0][:80]!r} does not",
            where=str(file),
            hint="Write one per line",
        )
    return lines


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


def classification_scores(features: Tensor, vectors: Tensor, labels: Tensor, *, ks: Sequence[int] = (1, 5)) -> dict[str, float]:
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
    correct = ranked[:, 0].float()
    total = torch.zeros(len(vectors)).index_add_(0, labels.cpu(), torch.ones(len(labels)))
    hits = torch.zeros(len(vectors)).index_add_(0, labels.cpu(), correct.cpu())
    present = total > 0
    scores["mean_per_class"] = float((hits[present] / total[present]).mean())
    return scores
