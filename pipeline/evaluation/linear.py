"""Linear probes on frozen features: a grid of learning rates and layers with SGD, or scikit-learn's logistic regression.

The best of a grid is chosen on samples held out of the training split; only the chosen one is scored on the test split.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from pipeline.errors import DataError
from pipeline.evaluation.heads import RATES, held_out, train_heads
from pipeline.evaluation.online import Pictures
from pipeline.evaluation.table import Table, all_gather_table, all_reduce_sum, extract
from pipeline.models.eval_model import EvalModel

COSTS = (1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3)


class LinearProbe:
    """Linear classifier on the class tokens of the last blocks, with and without the mean of their patches (DINOv2's protocol).

    Args:
        train, test: labelled images.
        rates: learning rates of the grid.
        layers: numbers of last blocks, the grid's second axis.
        epochs, batch: of the training.
        hold_out: share of the training samples held out to choose the best.
        group: a gloo group, or ``None`` for the default.
    """

    def __init__(
        self,
        train: Pictures,
        test: Pictures,
        *,
        rates: Sequence[float] = RATES,
        layers: Sequence[int] = (1, 4),
        epochs: int = 10,
        batch: int = 256,
        hold_out: float = 0.1,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self._train, self._test, self._rates, self._layers = train, test, tuple(rates), tuple(layers)
        self._epochs, self._batch, self._hold_out, self._group = epochs, batch, hold_out, group

    def __call__(self, subject: EvalModel) -> dict[str, float]:
        """Train and evaluate.

        Returns:
            ``linear/top1`` of the chosen classifier on the test split, ``linear/chosen_on``, its accuracy on the held-out
            samples, and the choice: ``linear/rate``, ``linear/layers``, ``linear/patches`` (1 with the mean of patches).

        Raises:
            DataError: on all ranks, if a split has no labelled sample.
        """
        depth = len(list(subject.tower.vit.blocks))
        counts = sorted({min(n, depth) for n in self._layers})
        most = counts[-1]

        def features(images: Tensor) -> Tensor:
            return subject.layers(images, most)

        train, test = extract(self._train, features), extract(self._test, features)
        classes = int(_agreed([train, test], self._group)) + 1
        choosing = held_out(self._train.total, self._hold_out)
        mine = choosing[train.numbers]
        order = _places(train.of((~mine).nonzero().squeeze(1)), self._train.total, self._group)
        best: tuple[float, float, dict[str, float]] | None = None
        for count in counts:
            for pooled in (False, True):
                x, y = _read(train.values, count, pooled), F.one_hot(train.labels, classes)
                heads = train_heads(
                    x[~mine].unsqueeze(1),
                    y[~mine].unsqueeze(1),
                    train.numbers[~mine],
                    order=order,
                    rates=self._rates,
                    epochs=self._epochs,
                    batch=self._batch,
                    group=self._group,
                    device=self._train.device,
                )
                chosen = _right(heads(x[mine]), train.labels[mine], self._group)
                tested = _right(heads(_read(test.values, count, pooled)), test.labels, self._group)
                place = int(chosen.argmax())  # the smallest rate among equals
                if best is None or float(chosen[place]) > best[0]:
                    told = {"rate": self._rates[place], "layers": float(count), "patches": float(pooled)}
                    best = (float(chosen[place]), float(tested[place]), told)
        if best is None:
            raise _empty()
        return {"linear/top1": best[1], "linear/chosen_on": best[0]} | {
            f"linear/{name}": value for name, value in best[2].items()
        }


class LogisticRegression:
    """scikit-learn's logistic regression (L-BFGS, L2) on L2-normalised class tokens; C is chosen on held-out samples.

    The values of C are divided among the ranks; then all ranks train with the chosen one on all samples, and get the same result.

    Args:
        train, test: labelled images.
        costs: scikit-learn's C.
        iterations: maximum number of L-BFGS iterations.
        hold_out: share of the training samples held out to choose C.
        group: a gloo group, or ``None`` for the default.
    """

    def __init__(
        self,
        train: Pictures,
        test: Pictures,
        *,
        costs: Sequence[float] = COSTS,
        iterations: int = 1000,
        hold_out: float = 0.1,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self._train, self._test, self._costs = train, test, tuple(costs)
        self._iterations, self._hold_out, self._group = iterations, hold_out, group

    def __call__(self, subject: EvalModel) -> dict[str, float]:
        """``logistic/top1`` on the test split, and ``logistic/cost``.

        Raises:
            DataError: on all ranks, if a split has no labelled sample, or the training split a single class.
        """
        train = all_gather_table(extract(self._train, subject.cls), self._group)
        test = all_gather_table(extract(self._test, subject.cls), self._group)
        if not len(test) or len(train.labels.unique()) < 2:
            raise _empty()
        x, y = F.normalize(train.values, dim=1).numpy(), train.labels.numpy()
        kept = held_out(self._train.total, self._hold_out)[train.numbers].numpy()
        rank, world = dist.get_rank(self._group), dist.get_world_size(self._group)
        scores = torch.zeros(len(self._costs), dtype=torch.float64)
        if kept.any() and len(np.unique(y[~kept])) > 1:
            for place in range(rank, len(self._costs), world):
                model = fitted(x[~kept], y[~kept], self._costs[place], self._iterations)
                scores[place] = float((model.predict(x[kept]) == y[kept]).mean())
        place = int(all_reduce_sum(scores, self._group).argmax())  # the smallest cost among equals
        right = torch.zeros(1, dtype=torch.float64)
        if rank == 0:
            model = fitted(x, y, self._costs[place], self._iterations)
            right[0] = float((model.predict(F.normalize(test.values, dim=1).numpy()) == test.labels.numpy()).mean())
        return {"logistic/top1": float(all_reduce_sum(right, self._group)), "logistic/cost": self._costs[place]}


def fitted(x: np.ndarray, y: np.ndarray, cost: float, iterations: int):  # type: ignore[no-untyped-def]
    """Fit scikit-learn's logistic regression."""
    from sklearn.linear_model import LogisticRegression as Model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # convergence warnings
        return Model(C=cost, max_iter=iterations).fit(x, y)


def _read(values: Tensor, count: int, pooled: bool) -> Tensor:
    """``[n, layers, 2, width]`` to ``[n, features]``: the last ``count`` class tokens, and the last mean of patches."""
    cls = values[:, -count:, 0].flatten(1)
    return torch.cat([cls, values[:, -1, 1]], dim=1) if pooled else cls


def _right(logits: Tensor, labels: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Accuracy ``[rates]`` over all ranks."""
    right = (logits.argmax(2) == labels[None]).sum(1).double()
    counts = all_reduce_sum(torch.cat([right, right.new_tensor([float(len(labels))])]), group)
    return counts[:-1] / counts[-1].clamp_min(1.0)


def _agreed(tables: Sequence[Table], group: dist.ProcessGroup | None) -> Tensor:
    """The largest class number over all ranks; raises on all ranks if a split has no label."""
    most = torch.tensor([int(table.labels.max()) if len(table) else -1 for table in tables])
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
    if int(most.min()) < 0:
        raise _empty()
    return most.max()


def _places(table: Table, total: int, group: dist.ProcessGroup | None) -> Tensor:
    there = torch.zeros(total, dtype=torch.int64)
    there[table.numbers] = 1
    return all_reduce_sum(there, group).nonzero().squeeze(1)


def _empty() -> DataError:
    return DataError(
        "a split of the evaluation has no labelled samples, or of one class only",
        where="evaluation",
        hint="give shards with .cls members of several classes",
    )
