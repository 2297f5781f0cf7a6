"""scikit-learn's logistic regression (L-BFGS, L2) on L2-normalised class tokens; C is chosen on held-out samples.

The values of C are divided among the ranks; then rank 0 trains with the chosen one on all samples, and shares the result.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from pipeline.evaluation.base import Evaluator
from pipeline.evaluation.features import all_gather_table, all_reduce_sum, extract
from pipeline.evaluation.linear import no_labels
from pipeline.evaluation.linear_heads import held_out_mask
from pipeline.evaluation.settings import LogisticSettings
from pipeline.models.eval_model import EvalModel


class LogisticProbe(Evaluator[LogisticSettings]):
    """Logistic regression on class tokens; see the module."""

    def __call__(self, model: EvalModel) -> dict[str, float]:
        """``top1`` on the test split, and ``cost``, the chosen C.

        Raises:
            DataError: on all ranks, if a split has no labelled sample, or the training split a single class.
        """
        settings, bank, group = self.settings, self.data.bank, self.data.group
        train = all_gather_table(extract(bank, model.cls), group)
        test = all_gather_table(extract(self.data.queries, model.cls), group)
        if not len(test) or len(train.labels.unique()) < 2:
            raise no_labels()
        x, y = F.normalize(train.values, dim=1).numpy(), train.labels.numpy()
        held_out = held_out_mask(bank.total, settings.validation_fraction)[train.positions].numpy()
        rank, world_size = dist.get_rank(group), dist.get_world_size(group)
        validation = torch.zeros(len(settings.C), dtype=torch.float64)
        if held_out.any() and len(np.unique(y[~held_out])) > 1:
            for index in range(rank, len(settings.C), world_size):
                classifier = fit(x[~held_out], y[~held_out], settings.C[index], settings.max_iter)
                validation[index] = float((classifier.predict(x[held_out]) == y[held_out]).mean())
        index = int(all_reduce_sum(validation, group).argmax())  # the smallest C among equals
        accuracy = torch.zeros(1, dtype=torch.float64)
        if rank == 0:
            classifier = fit(x, y, settings.C[index], settings.max_iter)
            predicted = classifier.predict(F.normalize(test.values, dim=1).numpy())
            accuracy[0] = float((predicted == test.labels.numpy()).mean())
        return {"top1": float(all_reduce_sum(accuracy, group)), "cost": settings.C[index]}


def fit(x: np.ndarray, y: np.ndarray, C: float, max_iter: int):  # type: ignore[no-untyped-def]
    """Fit scikit-learn's logistic regression."""
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # convergence warnings
        return LogisticRegression(C=C, max_iter=max_iter).fit(x, y)
