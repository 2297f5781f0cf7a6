"""Guidance by metadata: loss terms that discourage, or encourage, that class tokens carry a column of the samples' JSON.

After the idea of FINO (arXiv 2606.05107), which adapts DINO with metadata that images already have, in a formulation of our own.
Let :math:`f` be the student's class token of a global crop, divided by its norm, ``[width]``.

- *Discouraged* columns add ``weight`` times :math:`\\eta^2`, the variance of :math:`f` between the values' means over its total
  variance, from 0 to 1 (:func:`pipeline.losses.dependence`). FINO and DANN (Ganin and Lempitsky, arXiv 1505.07818) train an
  adversary and reverse its gradient. :math:`\\eta^2` needs none: its minimum is known, 0 where all values have the same mean, and
  there is no game whose balance depends on learning rates (compared by :mod:`pipeline.bench.guidance`). It does not see what
  does not move a mean, nor whether the column follows a label: what classes and sites share is discouraged in both.
- *Encouraged* columns add ``weight`` times the cross entropy of a linear probe on ``sqrt(width)`` times :math:`f`, in units of a
  guess (:func:`pipeline.losses.value_cross_entropy`). The probe is trained along and begins at zero.

A term is a mean over all samples of the global batch, to which a sample without the value adds 0. Given the running sums, which
change only with the optimizer, it is a mean over samples: exact over ranks and micro-batches, up to rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from typing_extensions import override

from pipeline import losses
from pipeline.methods.shared.guidance_settings import ColumnSettings, GuidanceSettings


class Probe(nn.Module):
    """Linear classifier of a column, fp32, which begins at zero.

    Args:
        width: of the features.
        values: of the column.
    """

    def __init__(self, width: int, values: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(values, width))
        self.bias = nn.Parameter(torch.zeros(values))

    def forward(self, features: Tensor) -> Tensor:
        """Logits ``[n, values]`` of features ``[n, width]`` of norm 1."""
        return F.linear(features * features.shape[1] ** 0.5, self.weight.float(), self.bias.float())


class Guidance(nn.Module):
    """The terms of all columns; see the module.

    Its running sums are extra state of the method that it belongs to, which passes them in.

    Args:
        settings: the columns.
        width: of the class token.
    """

    def __init__(self, settings: GuidanceSettings, width: int) -> None:
        super().__init__()
        self.settings, self.width = settings, width
        self._summed = settings.of("discourage")
        probed = settings.of("encourage") + (self._summed if settings.discourage_by == "reversal" else ())
        self.probes = nn.ModuleDict({column.label: Probe(width, len(column.values)) for column in probed})
        self._pending: dict[str, Tensor] = {}

    def initial_state(self) -> dict[str, Tensor]:
        """Running sums of each discouraged column, fp32 ``[values, 1 + width]``: samples and features."""
        return {_state_name(column): torch.zeros(len(column.values), 1 + self.width) for column in self._summed}

    @override
    def forward(
        self, cls: Tensor, columns: Mapping[str, Tensor], state: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Loss terms and metrics of a micro-batch.

        Args:
            cls: class tokens of its global crops, crop-major ``[crops * batch, width]``.
            columns: the number of each sample's value by column, int64 ``[batch]``; see :class:`Batch`.
            state: the method's extra state.
        """
        terms, metrics = {}, {}
        with torch.autocast(cls.device.type, enabled=False):
            features = F.normalize(cls.float(), dim=1)
            for column in self.settings.columns:
                own = columns.get(column.name)
                batch = own if own is not None else cls.new_full((len(cls),), -1, dtype=torch.int64)
                numbers = batch.repeat(len(cls) // len(batch))
                terms[f"{column.direction}_{column.label}"] = column.weight * self._term(column, features, numbers, state)
                metrics[f"{column.label}_missing"] = (batch < 0).float().mean()
                if column in self._summed:
                    self._accumulate(column, features.detach(), numbers)
                    metrics[f"{column.label}_variance_share"] = losses.correlation_ratio(state[_state_name(column)])
        return terms, metrics

    def _term(self, column: ColumnSettings, features: Tensor, numbers: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        if column.label not in self.probes:
            return losses.dependence(features, numbers, state[_state_name(column)])
        seen: Tensor = _Reversed.apply(features) if column.direction == "discourage" else features
        return losses.value_cross_entropy(self.probes[column.label](seen), numbers)

    @torch.no_grad()
    def _accumulate(self, column: ColumnSettings, features: Tensor, numbers: Tensor) -> None:
        sums, name = losses.value_sums(features, numbers, len(column.values)), _state_name(column)
        self._pending[name] = self._pending[name] + sums if name in self._pending else sums

    @torch.no_grad()
    def moved(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Running sums after a step: ``momentum`` times those before it, plus the sums of all ranks' samples. Collective.

        Args:
            state: the method's extra state.
        """
        if not self._pending:
            return {}
        names = sorted(self._pending)
        everything = torch.cat([self._pending[name].flatten() for name in names])
        self._pending.clear()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(everything)
        parts = everything.split([state[name].numel() for name in names])
        return {
            name: self.settings.momentum * state[name] + part.view_as(state[name])
            for name, part in zip(names, parts, strict=True)
        }

    def forget(self) -> None:
        """Discards the sums of a step that was skipped."""
        self._pending.clear()


def _state_name(column: ColumnSettings) -> str:
    return f"guidance_{column.label}"


class _Reversed(torch.autograd.Function):
    """Identity whose gradient is negated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        return -upstream
