"""LARS, LAMB and SGD over sharded weights.

DeepSpeed hands an optimizer flat tensors, each holding pieces of many parameters. LARS and LAMB need the norms of whole
parameters: the engine provides the location of each piece, and one small all-reduce per step completes the norms. AdamW needs no
such norms and is torch's own.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """A piece of a parameter in a flat tensor.

    Attributes:
        number: index of the parameter, the same on all ranks.
        offset: first element in the flat tensor.
        length: number of elements.
    """

    number: int
    offset: int
    length: int


class Layerwise(torch.optim.Optimizer):
    """Base class: computes an update for each flat tensor, scales each parameter's part by its trust ratio, and applies it.

    Param groups take ``lr``, ``weight_decay`` and ``adapt``: vectors (biases, norms) are neither decayed nor adapted.

    Attributes:
        segments: pieces of each flat tensor, by its ``id``; set by the engine.
        parameters: number of parameters.
        sharded: whether the pieces of a parameter are on several ranks.
    """

    moments: tuple[str, ...] = ()

    def __init__(self, groups: Any, defaults: dict[str, Any]) -> None:
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0, "adapt": True, **defaults})
        self.segments: dict[int, list[Segment]] = {}
        self.parameters = 0
        self.sharded = False

    @abstractmethod
    def update(self, flat: Tensor, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        """Direction of a flat tensor before its trust ratio, weight decay included."""

    @abstractmethod
    def apply(self, flat: Tensor, scaled: Tensor, group: dict[str, Any]) -> None:
        """Update a flat tensor by a scaled direction."""

    @abstractmethod
    def ratio(self, weight: Tensor, direction: Tensor) -> Tensor:
        """Trust ratios ``[parameters]`` from the norms of weights and directions, both positive."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Perform one step on the current groups; DeepSpeed calls it once for each of its groups."""
        work = [
            (flat, self.update(flat, flat.grad, group), group)
            for group in self.param_groups
            for flat in group["params"]
            if flat.grad is not None
        ]
        if not work:
            return
        ratios = self._ratios(work)
        for flat, direction, group in work:
            if group["adapt"]:
                for s in self.segments[id(flat)]:
                    direction.view(-1).narrow(0, s.offset, s.length).mul_(ratios[s.number])
            self.apply(flat, direction, group)

    def _ratios(self, work: list[tuple[Tensor, Tensor, dict[str, Any]]]) -> Tensor:
        squares = torch.zeros(2, self.parameters, dtype=torch.float64, device=work[0][0].device)
        for flat, direction, _ in work:
            for s in self.segments[id(flat)]:
                squares[0, s.number] += flat.view(-1).narrow(0, s.offset, s.length).double().square().sum()
                squares[1, s.number] += direction.view(-1).narrow(0, s.offset, s.length).double().square().sum()
        if self.sharded:
            dist.all_reduce(squares)
        weight, direction = squares.sqrt()
        known = (weight > 0) & (direction > 0)
        ones = torch.ones_like(weight)
        return torch.where(known, self.ratio(weight, torch.where(known, direction, ones)), ones).float()


class Lars(Layerwise):
    """Layer-wise adaptive rate scaling with momentum (You, Gitman & Ginsburg 2017, arXiv 1708.03888).

    The order of MoCo v3 and Barlow Twins: ``u = g + wd * w``, ``v = m * v + trust * |w| / |u| * u``, ``w -= lr * v``.

    Args:
        groups: parameters or groups.
        momentum: momentum coefficient.
        trust: the trust coefficient eta.
    """

    moments = ("momentum_buffer",)

    def __init__(self, groups: Any, *, momentum: float = 0.9, trust: float = 1e-3) -> None:
        super().__init__(groups, {"momentum": momentum})
        self.trust = trust

    def update(self, flat: Tensor, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        """Gradient with weight decay."""
        return gradient.add(flat, alpha=group["weight_decay"])

    def apply(self, flat: Tensor, scaled: Tensor, group: dict[str, Any]) -> None:
        """Momentum, then the learning rate."""
        state = self.state[flat]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(flat)
        velocity = state["momentum_buffer"].mul_(group["momentum"]).add_(scaled)
        flat.add_(velocity, alpha=-group["lr"])

    def ratio(self, weight: Tensor, direction: Tensor) -> Tensor:
        """``trust * |w| / |u|``."""
        return self.trust * weight / direction


class Sgd(Lars):
    """SGD with momentum, as in MoCo: LARS with all trust ratios equal to 1."""

    def ratio(self, weight: Tensor, direction: Tensor) -> Tensor:
        """Ones."""
        return torch.ones_like(weight)


class Lamb(Layerwise):
    """Layer-wise adaptive moments (You et al. 2020, arXiv 1904.00962): Adam's direction and decay, scaled to the weight's norm.

    Args:
        groups: parameters or groups.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
    """

    moments = ("exp_avg", "exp_avg_sq")

    def __init__(self, groups: Any, *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6) -> None:
        super().__init__(groups, {"betas": betas, "eps": eps})

    def update(self, flat: Tensor, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        """Adam's bias-corrected direction with weight decay."""
        state, (first, second) = self.state[flat], group["betas"]
        if "exp_avg" not in state:
            state.update({"step": torch.zeros(()), "exp_avg": torch.zeros_like(flat), "exp_avg_sq": torch.zeros_like(flat)})
        state["step"] += 1
        steps = float(state["step"])
        mean = state["exp_avg"].lerp_(gradient, 1 - first)
        square = state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
        root = square.div(1 - second**steps).sqrt_().add_(group["eps"])
        return mean.div(1 - first**steps).div_(root).add_(flat, alpha=group["weight_decay"])

    def apply(self, flat: Tensor, scaled: Tensor, group: dict[str, Any]) -> None:
        """The learning rate."""
        flat.add_(scaled, alpha=-group["lr"])

    def ratio(self, weight: Tensor, direction: Tensor) -> Tensor:
        """``|w| / |r|``."""
        return weight / direction
