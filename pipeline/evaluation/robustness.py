"""Universal adversarial perturbation: one small image which, added to every other image, changes an encoder's features.

Fitted without labels: the mean cosine similarity between features of perturbed and clean images is minimised by sign gradient
steps (after Shafahi et al., arXiv 1811.11304), within ``budget`` of full intensity for each pixel, before normalisation, and the
sum is clipped to the valid range of pixels. At zero perturbation the gradient vanishes, since the cosine is at its maximum; the
fit therefore starts in a corner. Random signs of the same size are the control: an encoder that they fool just as often is
sensitive to any noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from pipeline.errors import DataError
from pipeline.evaluation.knn import knn_votes
from pipeline.evaluation.online import Pictures
from pipeline.evaluation.table import Table, all_gather_table, all_reduce_sum, extract
from pipeline.models.eval_model import EvalModel

BUDGET = 10 / 255


@dataclass(frozen=True)
class Fooled:
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


def fooled(clean: Tensor, disturbed: Tensor, labels: Tensor) -> Fooled:
    """Compare predictions, all int64 ``[n]``; the fooling rate compares with the clean prediction and not with the label."""
    right = clean == labels
    lost = right & (disturbed != labels)
    return Fooled(
        rate=float((clean != disturbed).double().mean()),
        accuracy=float(right.double().mean()),
        disturbed=float((disturbed == labels).double().mean()),
        of_right=float(lost.sum() / right.sum().clamp_min(1)),
    )


class Robustness:
    """Fits a perturbation on the training images and evaluates it on others.

    Args:
        train: images on which it is fitted, and the feature bank of the k-NN.
        test: images to which it is added.
        budget: largest change of a pixel, as a share of full intensity.
        epochs: passes over ``train``.
        k: number of neighbours.
        batch: images per step, over all ranks.
        group: a gloo group, or ``None`` for the default.

    Attributes:
        perturbation: the last one fitted, ``[3, h, w]``.
    """

    def __init__(
        self,
        train: Pictures,
        test: Pictures,
        *,
        budget: float = BUDGET,
        epochs: int = 2,
        k: int = 20,
        batch: int = 64,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self._train, self._test, self._budget, self._epochs, self._k, self._group = train, test, budget, epochs, k, group
        self._batch = batch
        self.perturbation: Tensor | None = None

    def __call__(self, subject: EvalModel) -> dict[str, float]:
        """Fit and evaluate a perturbation.

        Returns:
            ``robustness/…``: the k-NN's fooling rate, the share of images whose nearest neighbour is no longer their clean
            version (``identity``), cosines, and the same with random signs under ``noise_…``.

        Raises:
            DataError: on all ranks, if no image has a label.
        """
        random = self._corner(subject)
        self.perturbation = self._fitted(subject, random.clone())
        bank = all_gather_table(extract(self._train, subject.cls), self._group)
        clean = all_gather_table(extract(self._test, subject.cls), self._group)
        if not len(bank) or not len(clean):
            raise DataError("no labelled samples", where="evaluation.robustness", hint="give shards with .cls members")
        found: dict[str, float] = {}
        for name, r in (("", self.perturbation), ("noise_", -random)):
            disturbed = all_gather_table(extract(self._test, _added(subject, r, subject.cls)), self._group)
            scores = self._judged(clean, disturbed, bank)
            found |= {f"robustness/{name}{key}": value for key, value in scores.items() if not (name and key == "accuracy")}
        return found

    def _judged(self, clean: Table, disturbed: Table, bank: Table) -> dict[str, float]:
        before, after, voters = (F.normalize(t.values.double(), dim=1) for t in (clean, disturbed, bank))
        cosine = (before * after).sum(1)
        clean_votes, votes_after = (_neighbours(x, voters, bank.labels, self._k) for x in (before, after))
        knn = fooled(clean_votes, votes_after, clean.labels)
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

    def _corner(self, subject: EvalModel) -> Tensor:
        blank = self._train.blank()
        generator = torch.Generator().manual_seed(0x0A9)
        signs = torch.randint(0, 2, tuple(blank.shape[1:]), generator=generator)
        return (2.0 * signs - 1.0).to(blank.device) * self._budget

    def _fitted(self, subject: EvalModel, r: Tensor) -> Tensor:
        steps = -(-self._train.total // self._batch)
        with torch.enable_grad():
            for _ in range(self._epochs):
                done = 0
                for images in _chunks(self._train, self._batch):
                    r = self._stepped(subject, r, images)
                    done += 1
                if done != steps:
                    raise DataError(f"{done} of {steps} steps", where="evaluation.robustness", hint="look at the shards")
        return r

    def _stepped(self, subject: EvalModel, r: Tensor, images: Tensor) -> Tensor:
        """One step against the gradient's sign, the same on all ranks; a rank without images contributes a zero gradient."""
        slope = torch.zeros_like(r)
        if len(images):
            images = images.clone()  # they may be inference-mode tensors
            with torch.no_grad():
                target = F.normalize(subject.cls(images).float(), dim=1)
            moved = r.clone().requires_grad_()
            features = F.normalize(_added(subject, moved, subject.cls)(images).float(), dim=1)
            (slope,) = torch.autograd.grad((features * target).sum(), moved)
        total = all_reduce_sum(slope.double().cpu(), self._group).to(r)
        return (r - 0.1 * self._budget * total.sign()).clamp(-self._budget, self._budget)


def _chunks(pictures: Pictures, size: int) -> Iterator[Tensor]:
    """This rank's part of each ``size`` consecutive samples of the whole list; empty where it has none.

    A step is thus the same on any number of ranks.
    """
    waiting: list[tuple[int, Tensor]] = []
    chunk = 0
    for shown in pictures.shown():
        for number, image in zip(shown.numbers.tolist(), shown.images, strict=True):
            while number // size > chunk:
                yield _stacked(waiting, pictures)
                waiting, chunk = [], chunk + 1
            waiting.append((number, image))
    for _ in range(chunk, -(-pictures.total // size)):
        yield _stacked(waiting, pictures)
        waiting = []


def _stacked(waiting: list[tuple[int, Tensor]], pictures: Pictures) -> Tensor:
    return torch.stack([image for _, image in waiting]) if waiting else pictures.blank()[:0]


def _added(subject: EvalModel, r: Tensor, features: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Wrap a feature function to add a perturbation in pixel space."""

    def call(images: Tensor) -> Tensor:
        mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (subject.mean, subject.std))
        pixels = (images * std + mean + r).clamp(0, 1)
        return features((pixels - mean) / std)

    return call


def _neighbours(queries: Tensor, bank: Tensor, labels: Tensor, k: int) -> Tensor:
    """Class predicted by the nearest neighbours."""
    k = min(k, len(bank))
    nearest, index = (queries @ bank.T).topk(k, dim=1)
    return knn_votes(nearest, labels[index], classes=int(labels.max()) + 1, ks=[k])[k].argmax(1)
