"""AdamW, LARS, LAMB and SGD over sharded weights.

DeepSpeed hands an optimizer flat tensors, each holding pieces of many parameters, and calls it once for each of its groups.
Groups that differ only in their multipliers can therefore share a flat tensor: the engine says which *runs* of its elements have
which learning rate and weight decay. LARS and LAMB also need the norms of whole parameters: the engine provides the location of
each piece, and one small all-reduce per step completes the norms.

Whether a step is applied can be decided on the device: with ``found_inf`` set, a step whose value there is 1 changes nothing.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
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


@dataclass(frozen=True)
class Run:
    """Consecutive elements of a flat tensor with the same multipliers.

    Attributes:
        member: index in the group's ``members``.
        offset: first element in the flat tensor.
        length: number of elements.
    """

    member: int
    offset: int
    length: int


def runs_of(segments: list[Segment], member_of: list[int]) -> list[Run]:
    """Runs of a flat tensor: its segments, neighbours of the same member joined; ``member_of`` is by number of the parameter."""
    runs: list[Run] = []
    for s in sorted(segments, key=lambda s: s.offset):
        last = runs[-1] if runs else None
        if last is not None and last.member == member_of[s.number] and last.offset + last.length == s.offset:
            runs[-1] = Run(last.member, last.offset, last.length + s.length)
        else:
            runs.append(Run(member_of[s.number], s.offset, s.length))
    return runs


class FlatOptimizer(torch.optim.Optimizer):
    """Base class of optimizers whose groups may hold flat tensors of several learning rates.

    Param groups take ``lr`` and ``weight_decay``, or a list ``members`` of dictionaries with these keys.

    Attributes:
        runs: for the ``id`` of each flat tensor of a group with members, which elements belong to which; set by the engine.
            Elements in no run are padding.
        found_inf: fp32 scalar on the device, 1 where the step must not be applied; ``None`` to apply it.
    """

    moments: tuple[str, ...] = ()

    def __init__(self, groups: Any, defaults: dict[str, Any]) -> None:
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0, **defaults})
        self.runs: dict[int, list[Run]] = {}
        self.found_inf: Tensor | None = None

    def pieces(self, flat: Tensor, group: dict[str, Any]) -> Iterator[tuple[dict[str, Any], int, int]]:
        """Rates, first element and number of elements of each run of a flat tensor."""
        if "members" not in group:
            yield group, 0, flat.numel()
            return
        for run in self.runs.get(id(flat), ()):
            yield group["members"][run.member], run.offset, run.length

    def moments_of(self, flat: Tensor) -> dict[str, Tensor]:
        """The state of a flat tensor, initialized if there is none: ``step``, and the moments in the tensor's shape."""
        state: dict[str, Tensor] = self.state[flat]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
            state.update({moment: torch.zeros_like(flat) for moment in self.moments})
        return state


class AdamW(FlatOptimizer):
    """torch's fused AdamW, called once for all tensors of the same rates.

    Args:
        groups: parameters or groups.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
    """

    moments = ("exp_avg", "exp_avg_sq")

    def __init__(self, groups: Any, *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        super().__init__(groups, {"betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Perform one step on the current groups."""
        for group in self.param_groups:
            if flats := [flat for flat in group["params"] if flat.grad is not None]:
                self._step(flats, group)

    def _step(self, flats: list[Tensor], group: dict[str, Any]) -> None:
        steps = [self.moments_of(flat)["step"] for flat in flats]
        torch._foreach_add_(steps, 1)
        calls: dict[int, tuple[dict[str, Any], tuple[list[Tensor], ...]]] = {}
        for flat, step in zip(flats, steps, strict=True):
            state = self.state[flat]
            tensors = (flat, flat.grad, state["exp_avg"], state["exp_avg_sq"])
            for rates, offset, length in self.pieces(flat, group):
                _, lists = calls.setdefault(id(rates), (rates, ([], [], [], [], [])))
                for chosen, tensor in zip(lists, tensors, strict=False):
                    assert tensor is not None
                    chosen.append(tensor if length == tensor.numel() else tensor.view(-1).narrow(0, offset, length))
                lists[4].append(step)
        first, second = group["betas"]
        for rates, (weights, gradients, means, squares, counts) in calls.values():
            torch._fused_adamw_(
                weights,
                gradients,
                means,
                squares,
                [],
                counts,
                lr=rates["lr"],
                beta1=first,
                beta2=second,
                weight_decay=rates["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
                found_inf=self.found_inf,
            )
        if self.found_inf is not None:
            torch._foreach_sub_(steps, [self.found_inf] * len(steps))


@dataclass(frozen=True)
class Piece:
    """A run of a flat tensor while it is updated: views of its elements, and the pieces of parameters in it."""

    rates: dict[str, Any]
    group: dict[str, Any]
    weight: Tensor
    gradient: Tensor
    moments: dict[str, Tensor]
    step: Tensor
    segments: list[Segment]

    def parts(self, tensor: Tensor) -> list[Tensor]:
        """The pieces of parameters in a tensor of the run's shape."""
        return [tensor.narrow(0, s.offset, s.length) for s in self.segments]


class Layerwise(FlatOptimizer):
    """Base class: computes an update for each flat tensor, scales each parameter's part by its trust ratio, and applies it.

    Param groups (or their members) also take ``adapt``: vectors (biases, norms) are neither decayed nor adapted.

    Attributes:
        segments: pieces of each flat tensor, by its ``id``; set by the engine.
        parameters: number of parameters.
        sharded: whether the pieces of a parameter are on several ranks.
    """

    def __init__(self, groups: Any, defaults: dict[str, Any]) -> None:
        super().__init__(groups, {"adapt": True, **defaults})
        self.segments: dict[int, list[Segment]] = {}
        self.parameters = 0
        self.sharded = False
        self._numbers: dict[tuple[int, ...], Tensor] = {}

    @abstractmethod
    def update(self, piece: Piece) -> Tensor:
        """Direction of a run before its trust ratio, weight decay included."""

    @abstractmethod
    def apply(self, piece: Piece, scaled: Tensor) -> None:
        """Update a run by a scaled direction."""

    @abstractmethod
    def ratio(self, weight: Tensor, direction: Tensor) -> Tensor:
        """Trust ratios ``[parameters]`` from the norms of weights and directions, both positive."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Perform one step on the current groups."""
        flats = [(flat, group) for group in self.param_groups for flat in group["params"] if flat.grad is not None]
        pieces = [piece for flat, group in flats for piece in self._pieces(flat, group)]
        if not pieces:
            return
        touched = [tensor for piece in pieces for tensor in (piece.weight, *piece.moments.values())]
        before = [tensor.clone() for tensor in touched] if self.found_inf is not None else []
        for flat, _ in flats:
            self.state[flat]["step"] += 1
        directions = [self.update(piece) for piece in pieces]
        ratios = self._ratios(pieces, directions)
        for piece, direction in zip(pieces, directions, strict=True):
            if piece.rates["adapt"]:
                for s, part in zip(piece.segments, piece.parts(direction), strict=True):
                    part.mul_(ratios[s.number])
            self.apply(piece, direction)
        if self.found_inf is not None:
            for tensor, earlier in zip(touched, before, strict=True):
                tensor.copy_(torch.where(self.found_inf == 0, tensor, earlier))
            for flat, _ in flats:
                self.state[flat]["step"] -= self.found_inf

    def _pieces(self, flat: Tensor, group: dict[str, Any]) -> Iterator[Piece]:
        state = self.moments_of(flat)
        assert flat.grad is not None
        for rates, offset, length in self.pieces(flat, group):
            tensors = (flat, flat.grad, *(state[name] for name in self.moments))
            weight, gradient, *moments = (tensor.view(-1).narrow(0, offset, length) for tensor in tensors)
            segments = [
                Segment(s.number, s.offset - offset, s.length)
                for s in self.segments[id(flat)]
                if offset <= s.offset < offset + length
            ]
            yield Piece(rates, group, weight, gradient, dict(zip(self.moments, moments, strict=True)), state["step"], segments)

    def _ratios(self, pieces: list[Piece], directions: list[Tensor]) -> Tensor:
        numbers = tuple(s.number for piece in pieces for s in piece.segments)
        device = pieces[0].weight.device
        if numbers not in self._numbers:
            self._numbers[numbers] = torch.tensor(numbers, device=device)
        squares = torch.zeros(2, self.parameters, dtype=torch.float64, device=device)
        parts = (
            [part for piece in pieces for part in piece.parts(piece.weight)],
            [part for piece, direction in zip(pieces, directions, strict=True) for part in piece.parts(direction)],
        )
        for row, tensors in zip(squares, parts, strict=True):
            if tensors:
                norms = torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float64))
                row.index_copy_(0, self._numbers[numbers], norms.square())
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

    def update(self, piece: Piece) -> Tensor:
        """Gradient with weight decay."""
        return piece.gradient.add(piece.weight, alpha=piece.rates["weight_decay"])

    def apply(self, piece: Piece, scaled: Tensor) -> None:
        """Momentum, then the learning rate."""
        velocity = piece.moments["momentum_buffer"].mul_(piece.group["momentum"]).add_(scaled)
        piece.weight.add_(velocity, alpha=-piece.rates["lr"])

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

    def update(self, piece: Piece) -> Tensor:
        """Adam's bias-corrected direction with weight decay."""
        first, second = piece.group["betas"]
        # Read on the CPU, where it is free; kept on a GPU, where reading would wait.
        steps = piece.step.double() if piece.step.is_cuda else float(piece.step)
        mean = piece.moments["exp_avg"].lerp_(piece.gradient, 1 - first)
        square = piece.moments["exp_avg_sq"].mul_(second).addcmul_(piece.gradient, piece.gradient, value=1 - second)
        root = square.div(1 - second**steps).sqrt_().add_(piece.group["eps"])
        return mean.div(1 - first**steps).div_(root).add_(piece.weight, alpha=piece.rates["weight_decay"])

    def apply(self, piece: Piece, scaled: Tensor) -> None:
        """The learning rate."""
        piece.weight.add_(scaled, alpha=-piece.rates["lr"])

    def ratio(self, weight: Tensor, direction: Tensor) -> Tensor:
        """``|w| / |r|``."""
        return weight / direction
