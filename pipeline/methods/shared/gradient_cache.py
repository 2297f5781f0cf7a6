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
        numbers: gradient with respect to each of the numbers that the loss depends on besides features.
    """

    value: Tensor
    features: tuple[Tensor, ...]
    numbers: tuple[Tensor, ...] = ()

    def of(self, features: Sequence[Tensor], numbers: Sequence[Tensor] = ()) -> Tensor:
        """The loss of the whole batch, whose gradient is that of this micro-batch's part; scalar.

        Args:
            features: as computed again, with gradients.
            numbers: as given to :func:`replays`, with gradients.
        """
        parts = zip((*features, *numbers), (*self.features, *self.numbers), strict=True)
        linear = torch.stack([(one.float() * gradient).sum() for one, gradient in parts]).sum()
        return self.value + (linear - linear.detach())


def replays(
    network: nn.Module,
    batches: Sequence[Batch],
    features: Callable[[Batch], Sequence[Tensor]],
    loss: Callable[..., Tensor],
    numbers: Sequence[Tensor] = (),
) -> deque[Replay]:
    """Computes the loss of all micro-batches as one batch, and its gradient with respect to each feature.

    Args:
        network: what computes the features; running statistics of its batch norms are not moved.
        batches: the micro-batches of this rank.
        features: of a micro-batch, ``[b, width]`` each; drawn as in the pass with gradients.
        loss: of the list of the features of the whole batch and of each of ``numbers``, scalar.
        numbers: what else the loss depends on and is trained, such as a scale.

    Returns:
        A replay for each micro-batch, in order.
    """
    kept = []
    for batch in batches:
        seed(batch)  # the same draws as in the pass with gradients
        with batch_statistics(*((network,) if network.training else ())):
            kept.append(features(batch))
    full = [torch.cat(list(parts)).requires_grad_() for parts in zip(*kept, strict=True)]
    detached = [number.detach().requires_grad_() for number in numbers]
    with torch.enable_grad():
        value = loss(full, *detached)
        gradients = torch.autograd.grad(value, [*full, *detached])
    pieces = [(gradient * len(batches)).chunk(len(batches)) for gradient in gradients[: len(full)]]
    rest = gradients[len(full) :]
    return deque(Replay(value.detach(), own, rest) for own in zip(*pieces, strict=True))
