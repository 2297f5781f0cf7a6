"""Linear probe on frozen features: a grid of learning rates and layers, trained by SGD.

The best of the grid is chosen on samples held out of the training split; only the chosen one is scored on the test split.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from pipeline.errors import DataError
from pipeline.evaluation.base import Evaluator
from pipeline.evaluation.features import FeatureTable, all_reduce_sum, extract
from pipeline.evaluation.linear_heads import gather_positions, held_out_mask, train_heads
from pipeline.evaluation.settings import LinearSettings
from pipeline.models.eval_model import EvalModel


class LinearProbe(Evaluator[LinearSettings]):
    """Linear classifier on the class tokens of the last blocks, with and without the mean of patches (DINOv2's protocol)."""

    def __call__(self, model: EvalModel) -> dict[str, float]:
        """Train and evaluate.

        Returns:
            ``top1`` of the chosen classifier on the test split, ``chosen_on``, its accuracy on the held-out samples, and the
            choice: ``rate``, ``layers``, ``patches`` (1 with the mean of patches).

        Raises:
            DataError: on all ranks, if a split has no labelled sample.
        """
        settings, bank, group = self.settings, self.data.bank, self.data.group
        counts = sorted({min(n, model.depth) for n in settings.layers})

        def features(images: Tensor) -> Tensor:
            return model.layers(images, counts[-1])

        train, test = extract(bank, features), extract(self.data.queries, features)
        classes = _largest_label([train, test], group) + 1
        held_out = held_out_mask(bank.total, settings.validation_fraction)[train.positions]
        order = gather_positions(train.positions[~held_out], bank.total, group)
        best: tuple[float, float, dict[str, float]] | None = None
        for count in counts:
            for with_patches in (False, True):
                x, y = _select_layers(train.values, count, with_patches), F.one_hot(train.labels, classes)
                heads = train_heads(
                    x[~held_out].unsqueeze(1),
                    y[~held_out].unsqueeze(1),
                    train.positions[~held_out],
                    order=order,
                    rates=settings.learning_rates,
                    epochs=settings.epochs,
                    batch=settings.batch_size,
                    group=group,
                    device=bank.device,
                )
                validation = _accuracy(heads(x[held_out]), train.labels[held_out], group)
                tested = _accuracy(heads(_select_layers(test.values, count, with_patches)), test.labels, group)
                index = int(validation.argmax())  # the smallest rate among equals
                if best is None or float(validation[index]) > best[0]:
                    choice = {"rate": settings.learning_rates[index], "layers": float(count), "patches": float(with_patches)}
                    best = (float(validation[index]), float(tested[index]), choice)
        if best is None:
            raise no_labels()
        return {"top1": best[1], "chosen_on": best[0]} | best[2]


def no_labels() -> DataError:
    """Error of a split without the labels that a classifier needs."""
    return DataError(
        "a split of the evaluation has no labelled samples, or of one class only",
        where="evaluation",
        hint="Give shards with .cls members of several classes",
    )


def _select_layers(values: Tensor, count: int, with_patches: bool) -> Tensor:
    """``[n, layers, 2, width]`` to ``[n, features]``: the last ``count`` class tokens, and the last mean of patches."""
    cls = values[:, -count:, 0].flatten(1)
    return torch.cat([cls, values[:, -1, 1]], dim=1) if with_patches else cls


def _accuracy(logits: Tensor, labels: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Accuracy ``[rates]`` over all ranks."""
    correct = (logits.argmax(2) == labels[None]).sum(1).double()
    counts = all_reduce_sum(torch.cat([correct, correct.new_tensor([float(len(labels))])]), group)
    return counts[:-1] / counts[-1].clamp_min(1.0)


def _largest_label(tables: Sequence[FeatureTable], group: dist.ProcessGroup | None) -> int:
    """The largest class number over all ranks; raises on all ranks if a split has no label."""
    largest = torch.tensor([int(table.labels.max()) if len(table) else -1 for table in tables])
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    if int(largest.min()) < 0:
        raise no_labels()
    return int(largest.max())
