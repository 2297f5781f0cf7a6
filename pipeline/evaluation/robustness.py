"""Universal adversarial perturbation: one small image which, added to every other image, changes an encoder's features.

Fitted without labels: the mean cosine similarity between features of perturbed and clean images is minimised by sign gradient
steps (after Shafahi et al., arXiv 1811.11304), within ``epsilon`` of full intensity for each pixel, before normalisation, and the
sum is clipped to the valid range of pixels. At zero perturbation the gradient vanishes, since the cosine is at its maximum; the
fit therefore starts in a corner. Random signs of the same size are the control: an encoder that they fool just as often is
sensitive to any noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.errors import DataError
from pipeline.evaluation.base import Evaluator
from pipeline.evaluation.features import FeatureTable, all_gather_table, all_reduce_sum, extract
from pipeline.evaluation.images import EvalData, ImageSet
from pipeline.evaluation.knn import knn_votes
from pipeline.evaluation.settings import RobustnessSettings
from pipeline.models.eval_model import EvalModel


@dataclass(frozen=True)
class Fooling:
    """Effect of a perturbation on the predictions.

    Attributes:
        rate: share of predictions that changed, correct or wrong before.
        accuracy: accuracy without it.
        disturbed: accuracy with it.
        of_right: share of the correct predictions that became wrong.
    """

    rate: float
    accuracy: float
    disturbed: float
    of_right: float


def fooling(clean: Tensor, disturbed: Tensor, labels: Tensor) -> Fooling:
    """Compare predictions, all int64 ``[n]``; the fooling rate compares with the clean prediction and not with the label."""
    correct = clean == labels
    lost = correct & (disturbed != labels)
    return Fooling(
        rate=float((clean != disturbed).double().mean()),
        accuracy=float(correct.double().mean()),
        disturbed=float((disturbed == labels).double().mean()),
        of_right=float(lost.sum() / correct.sum().clamp_min(1)),
    )


class Robustness(Evaluator[RobustnessSettings]):
    """Fits a perturbation on the feature bank and evaluates it on the queries.

    Args:
        settings: the section.
        data: the images.
        batch: images per step, over all ranks.

    Attributes:
        perturbation: the last one fitted, ``[3, h, w]``.
    """

    def __init__(self, settings: RobustnessSettings, data: EvalData, *, batch: int = 64) -> None:
        super().__init__(settings, data)
        self._batch = batch
        self.perturbation: Tensor | None = None

    def __call__(self, model: EvalModel) -> dict[str, float]:
        """Fit and evaluate a perturbation.

        Returns:
            The k-NN's ``accuracy`` and fooling rate, the share of images whose nearest neighbour is no longer their clean version
            (``identity``), cosines, and the same with random signs under ``noise_…``.

        Raises:
            DataError: on all ranks, if no image has a label.
        """
        group = self.data.group
        random = self._random_corner()
        self.perturbation = self._fit(model, random.clone())
        bank = all_gather_table(extract(self.data.bank, model.cls), group)
        clean = all_gather_table(extract(self.data.queries, model.cls), group)
        if not len(bank) or not len(clean):
            raise DataError("no sample has a label", where="evaluation.robustness", hint="Give shards with .cls members")
        scores: dict[str, float] = {}
        for prefix, r in (("", self.perturbation), ("noise_", -random)):
            disturbed = all_gather_table(extract(self.data.queries, _add(model, r, model.cls)), group)
            effects = self._compare(clean, disturbed, bank)
            scores |= {f"{prefix}{name}": value for name, value in effects.items() if not (prefix and name == "accuracy")}
        return scores

    def _compare(self, clean: FeatureTable, disturbed: FeatureTable, bank: FeatureTable) -> dict[str, float]:
        before, after, features = (F.normalize(table.values.double(), dim=1) for table in (clean, disturbed, bank))
        cosine = (before * after).sum(1)
        clean_classes, disturbed_classes = (_predict(x, features, bank.labels, self.settings.k) for x in (before, after))
        knn = fooling(clean_classes, disturbed_classes, clean.labels)
        lost = (after @ before.T).argmax(1) != torch.arange(len(after))
        return {
            "fooling": knn.rate,
            "accuracy": knn.accuracy,
            "disturbed": knn.disturbed,
            "of_right": knn.of_right,
            "identity": float(lost.double().mean()),
            "cosine": float(cosine.mean()),
            "cosine_p10": float(cosine.quantile(0.1)),
        }

    def _random_corner(self) -> Tensor:
        blank = self.data.bank.blank()
        generator = torch.Generator().manual_seed(0x0A9)
        signs = torch.randint(0, 2, tuple(blank.shape[1:]), generator=generator)
        return (2.0 * signs - 1.0).to(blank.device) * self.settings.epsilon

    def _fit(self, model: EvalModel, r: Tensor) -> Tensor:
        steps = -(-self.data.bank.total // self._batch)
        with torch.enable_grad():
            for _ in range(self.settings.epochs):
                done = 0
                for images in _chunks(self.data.bank, self._batch):
                    r = self._step(model, r, images)
                    done += 1
                if done != steps:
                    raise DataError(
                        f"only {done} of {steps} steps had images",
                        where="evaluation.robustness",
                        hint="Check the shards with `fovea shards verify`",
                    )
        return r

    def _step(self, model: EvalModel, r: Tensor, images: Tensor) -> Tensor:
        """One step against the gradient's sign, the same on all ranks; a rank without images contributes a zero gradient."""
        gradient = torch.zeros_like(r)
        if len(images):
            images = images.clone()  # they may be inference-mode tensors
            with torch.no_grad():
                target = F.normalize(model.cls(images).float(), dim=1)
            moved = r.clone().requires_grad_()
            features = F.normalize(_add(model, moved, model.cls)(images).float(), dim=1)
            (gradient,) = torch.autograd.grad((features * target).sum(), moved)
        total = all_reduce_sum(gradient.double().cpu(), self.data.group).to(r)
        return (r - 0.1 * self.settings.epsilon * total.sign()).clamp(-self.settings.epsilon, self.settings.epsilon)


def _chunks(image_set: ImageSet, size: int) -> Iterator[Tensor]:
    """This rank's part of each ``size`` consecutive samples of the whole list; empty where it has none.

    A step is thus the same on any number of ranks.
    """
    waiting: list[tuple[int, Tensor]] = []
    chunk = 0
    for batch in image_set:
        for number, image in zip(batch.positions.tolist(), batch.images, strict=True):
            while number // size > chunk:
                yield _stack(waiting, image_set)
                waiting, chunk = [], chunk + 1
            waiting.append((number, image))
    for _ in range(chunk, -(-image_set.total // size)):
        yield _stack(waiting, image_set)
        waiting = []


def _stack(waiting: list[tuple[int, Tensor]], image_set: ImageSet) -> Tensor:
    return torch.stack([image for _, image in waiting]) if waiting else image_set.blank()[:0]


def _add(model: EvalModel, r: Tensor, features: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Wrap a feature function to add a perturbation in pixel space."""

    def call(images: Tensor) -> Tensor:
        mean, std = (torch.tensor(v, device=images.device).view(-1, 1, 1) for v in (model.mean, model.std))
        pixels = (images * std + mean + r).clamp(0, 1)
        return features((pixels - mean) / std)

    return call


def _predict(queries: Tensor, bank: Tensor, labels: Tensor, k: int) -> Tensor:
    """Class predicted by the nearest neighbours."""
    k = min(k, len(bank))
    nearest, index = (queries @ bank.T).topk(k, dim=1)
    return knn_votes(nearest, labels[index], classes=int(labels.max()) + 1, ks=[k])[k].argmax(1)
