"""Synchronized batch norm, over the batch of all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm whose mean and variance in training are computed over all ranks' micro-batches.

    It equals torch's SyncBatchNorm, also with micro-batches of different sizes, but the host never waits for the device: one
    all-reduce of fixed size forward and one backward. It runs on a CPU as well. Ranks that share a batch get the result of one
    process with the whole batch. Successive micro-batches of a rank are normalized separately, so with batch norm gradient
    accumulation never equals a larger batch.

    Statistics are fp32 whatever the input's dtype, and fp64 where they are combined: a mean much larger than the standard
    deviation cancels there without harm.
    """

    def forward(self, input: Tensor) -> Tensor:
        """``[batch, channels, ...]`` to the same shape and dtype."""
        together = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if not together or not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        # A CPU's kernels take fp32, fp64, and bf16 with fp32 statistics.
        x = input if input.is_cuda or input.dtype in (torch.float64, torch.bfloat16) else input.float()
        out, centre, variance, count = _Normalize.apply(x, self.weight, self.bias, self.eps)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked += 1
        if self.running_mean is not None and self.running_var is not None and self.momentum:
            unbiased = (variance * (count / (count - 1))).to(self.running_var)
            with torch.no_grad():
                torch._foreach_lerp_(
                    [self.running_mean, self.running_var], [centre.to(self.running_mean), unbiased], self.momentum
                )
        return out.to(input.dtype)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"batch norm expects an input of two or more dimensions, not {input.ndim}")


class _Normalize(torch.autograd.Function):
    """Output, and of the joint batch mean, biased variance (fp64) and number of values per channel."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = x.contiguous(memory_format=_layout(x))
        channels, size = x.shape[1], x.numel() // x.shape[1]
        mean, variance = _statistics(x)
        # Sums of values and of squares by channel, and the number of values. In few launches: there is one such pass per norm.
        sums = torch.full((2 * channels + 1,), size, dtype=torch.float64, device=x.device)
        total, squares = sums[:-1].mul_(torch.cat([mean, variance])).split(channels)
        squares.addcmul_(total, mean.double())
        dist.all_reduce(sums)
        count = sums[-1]
        mean, square = (sums[:-1] / count).split(channels)
        variance = torch.addcmul(square, mean, mean, value=-1.0)
        kind = torch.float64 if x.dtype == torch.float64 else torch.float32
        centre, scale = mean.to(kind), (variance + eps).rsqrt_().to(kind)
        if x.is_cuda:
            out = torch.batch_norm_elemt(x, weight, bias, centre, scale, eps)
        else:
            out = nn.functional.batch_norm(x, centre, variance.to(kind), weight, bias, training=False, eps=eps)
        ctx.save_for_backward(x, weight, centre, scale, count)
        ctx.eps = eps
        ctx.mark_non_differentiable(centre, variance, count)
        return out, centre, variance, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        x, weight, centre, scale, count = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=_layout(x))
        if x.is_cuda:
            total, product, to_weight, to_bias = torch.batch_norm_backward_reduce(
                gradient, x, centre, scale, weight, True, weight is not None, weight is not None
            )
            sums = torch.cat([total, product])
            dist.all_reduce(sums)
            total, product = sums.split(len(total))
            to_input = torch.batch_norm_backward_elemt(
                gradient, x, centre, scale, weight, total, product, count.to(torch.int32).reshape(1)
            )
            return to_input, to_weight if ctx.needs_input_grad[1] else None, to_bias if ctx.needs_input_grad[2] else None, None
        # The products of gradient and normalized input, and the gradients, summed by channel.
        _, product, total = torch.ops.aten.native_batch_norm_backward(
            gradient, x, weight, None, None, centre, scale, True, ctx.eps, [False, True, True]
        )
        sums = torch.stack([product, total])
        dist.all_reduce(sums)
        by_gradient = scale if weight is None else scale * weight
        by_input = -by_gradient * scale * sums[0] / count.to(scale)
        if x.dtype == torch.bfloat16:
            by_both = _scaled(gradient, by_gradient, -by_gradient * sums[1] / count.to(scale))
            to_input = by_both.add_(_scaled(x, by_input, -by_input * centre))
        else:
            shape = [1, -1] + [1] * (x.ndim - 2)
            rest = -by_gradient * sums[1] / count.to(scale) - by_input * centre
            to_input = torch.addcmul(rest.view(shape), x, by_input.view(shape)).addcmul_(gradient, by_gradient.view(shape))
        return to_input, product if weight is not None else None, total if weight is not None else None, None


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance by channel; fp32 for a bf16 input, which on a CPU takes running statistics in fp32."""
    running: tuple[Tensor | None, Tensor | None] = (None, None)
    if not x.is_cuda and x.dtype == torch.bfloat16:
        running = torch.zeros(x.shape[1]), torch.ones(x.shape[1])  # not updated: the momentum is 0
    mean, variance = torch.batch_norm_update_stats(x, *running, 0.0)
    return mean, variance


def _scaled(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``x * scale + shift`` by channel, of a bf16 tensor with fp32 factors. Batch norm with fixed statistics is the CPU's only
    kernel that computes this without fp32 copies of the tensor.
    """
    zero, one = torch.zeros_like(scale), torch.ones_like(scale)
    return nn.functional.batch_norm(x, zero, one, scale, shift, training=False, eps=0.0)


def _layout(x: Tensor) -> torch.memory_format:
    """The layout in which the kernels read a tensor: channels last if it is laid out so, else contiguous."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    return last if last is not None and x.is_contiguous(memory_format=last) else torch.contiguous_format


def normalises_batches(*modules: nn.Module) -> bool:
    """Whether any of the modules holds a batch norm, which couples the samples of a micro-batch."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for module in modules for m in module.modules())


@contextmanager
def batch_statistics(*modules: nn.Module, update: bool = False) -> Iterator[None]:
    """Context in which batch norms use the batch's statistics: for the teacher's forward pass, or a pass that is computed twice.

    Args:
        modules: the networks.
        update: whether the running statistics are updated, as in training.
    """
    norms = [m for module in modules for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [(norm.training, norm.momentum) for norm in norms]
    for norm in norms:
        norm.training, norm.momentum = True, norm.momentum if update else 0.0
    try:
        yield
    finally:
        for norm, (training, momentum) in zip(norms, before, strict=True):
            norm.training, norm.momentum = training, momentum
