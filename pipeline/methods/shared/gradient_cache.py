"""Gradient cache: the loss of a batch that is split into micro-batches, as if it were whole (GradCache, arXiv 2101.06983)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.data.augment.views import Batch
from pipeline.methods.base import seed
from pipeline.models.norms import batch_statistics


@dataclass(frozen=True)
class Replay:
    """What one micro-batch needs from the whole batch.

    Attributes:
        value: this rank's loss of the whole batch, scalar.
        features: gradient of the loss with respect to each of the micro-batch's features, times the number of micro-batches.
        numbers: gradient with respect to scale and bias, where the loss has them.
    """

    value: Tensor
    features: tuple[Tensor, ...]
    numbers: tuple[Tensor, ...] = ()

    def of(self, features: Sequence[Tensor]) -> Tensor:
        """The loss of the whole batch, whose gradient is that of this micro-batch's part; scalar.

        Args:
            features: as computed again, with gradients.
        """
        linear = torch.stack([(one * gradient).sum() for one, gradient in zip(features, self.features, strict=True)]).sum()
        return self.value + (linear - linear.detach())


def replays(
    network: nn.Module,
    batches: Sequence[Batch],
    features: Callable[[Batch], Sequence[Tensor]],
    loss: Callable[[Sequence[Tensor]], Tensor],
) -> deque[Replay]:
    """Computes the loss of all micro-batches as one batch, and its gradient with respect to each feature.

    Args:
        network: what computes the features; running statistics of its batch norms are not moved.
        batches: the micro-batches of this rank.
        features: of a micro-batch, ``[b, width]`` each; drawn as in the pass with gradients.
        loss: of the features of the whole batch, scalar.

    Returns:
        A replay for each micro-batch, in order.
    """
    kept = []
    for batch in batches:
        seed(batch)  # the same draws as in the pass with gradients
        with batch_statistics(*((network,) if network.training else ())):
            kept.append(features(batch))
    full = [torch.cat(list(parts)).requires_grad_() for parts in zip(*kept, strict=True)]
    with torch.enable_grad():
        value = loss(full)
        gradients = torch.autograd.grad(value, full)
    pieces = [(gradient * len(batches)).chunk(len(batches)) for gradient in gradients]
    return deque(Replay(value.detach(), own) for own in zip(*pieces, strict=True))
