"""SIGReg: pushes features towards an isotropic normal distribution (LeJEPA, arXiv 2511.08544)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def sigreg(
    x: Tensor, directions: Tensor, *, knots: int = 17, limit: float = 5.0, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Epps and Pulley's test of normality of projections, averaged over views and directions, fp32 (fp64 if the features are).

    For the ``N`` samples of all ranks, projected on a direction, ``N * integral |phi(t) - exp(-t²/2)|² exp(-t²/2) dt`` with the
    empirical characteristic function ``phi``. The integral over ``[-limit, limit]`` is a trapezoidal sum at ``knots`` points; as
    its integrand is even and 0 at 0, only the positive points are computed. Memory does not grow with the number of knots.

    Args:
        x: ``[views, n, width]``, this rank's features, of any floating dtype; the same number on every rank. The test is for a
            standard deviation of 1 in the unit of the features.
        directions: unit vectors ``[width, slices]``, equal on all ranks; see :func:`random_directions`.
        knots: points of the integral, odd.
        limit: largest ``t`` of the integral, in radians per unit of the features.
        group: ranks; without a process group, this process alone.

    Returns:
        Scalar without a unit, fp32 or fp64, at least 0; equal on all ranks. It grows with the number of samples if the features
        are not normally distributed, and stays of the order of 1 if they are. Its gradient is scaled for an engine that averages
        gradients over ranks.
    """
    with torch.autocast(x.device.type, enabled=False):
        wide = x if x.dtype == torch.float64 else x.float()
        projected = wide @ directions.to(wide.dtype)
        step = 2 * limit / (knots - 1)
        points = [step * number for number in range(1, knots // 2 + 1)]
        parts = _Characteristic.apply(projected, points)
        ranks = 1
        if dist.is_available() and dist.is_initialized():
            ranks = dist.get_world_size(group)
            parts = _MeanOverRanks.apply(parts, group)
        total = torch.zeros((), dtype=wide.dtype, device=x.device)
        for point, (cosine, sine) in zip(points, parts, strict=True):
            normal = math.exp(-point * point / 2)
            weight = step * normal * (1 if point == points[-1] else 2)
            total = total + weight * ((cosine - normal).square() + sine.square()).mean()
        return total * (x.shape[1] * ranks)


def random_directions(width: int, slices: int, seed: int, device: torch.device) -> Tensor:
    """Unit vectors ``[width, slices]``, uniform on the sphere, fp32; the same for a seed and a kind of device.

    Args:
        width: number of values of a feature.
        slices: number of directions.
        seed: of the draw.
        device: where they are drawn.
    """
    draw = torch.Generator(device).manual_seed(seed)
    directions = torch.randn(width, slices, generator=draw, device=device)
    return directions / torch.linalg.vector_norm(directions, dim=0)


class _Characteristic(torch.autograd.Function):
    """Means over samples of ``cos(t x)`` and ``sin(t x)``, ``[points, 2, views, slices]``; keeps neither for later."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, points: list[float]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.points = points
        return torch.stack([torch.stack([(x * t).cos().mean(1), (x * t).sin().mean(1)]) for t in points])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        total = torch.zeros_like(x)
        for t, (cosine, sine) in zip(ctx.points, gradient[:, :, :, None], strict=True):
            angle = x * t
            total.addcmul_(angle.cos(), sine, value=t).addcmul_(angle.sin(), cosine, value=-t)
        return total / x.shape[1], None


class _MeanOverRanks(torch.autograd.Function):
    """Mean over ranks. All compute the same from it, and the engine averages their gradients: each one's passes through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total / dist.get_world_size(group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
