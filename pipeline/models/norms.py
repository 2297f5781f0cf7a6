"""Synchronized batch norm, over the batch of all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class GlobalBatchNorm(nn.SyncBatchNorm):
    """Batch norm whose mean and variance in training are computed over all ranks' micro-batches.

    On CUDA it is torch's SyncBatchNorm; on CPU an equivalent that works with any backend. Ranks that share a batch get the
    result of one process with the whole batch. Successive micro-batches of a rank are normalized separately, so with batch
    norm gradient accumulation never equals a larger batch.
    """

    def forward(self, input: Tensor) -> Tensor:
        """``[batch, channels, ...]`` to the same shape and dtype."""
        together = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if not together or not self.training:
            return nn.modules.batchnorm._BatchNorm.forward(self, input)
        if input.is_cuda:
            return super().forward(input)
        dims = [0, *range(2, input.ndim)]
        shape = [1, -1] + [1] * (input.ndim - 2)
        x = input if input.dtype == torch.float64 else input.float()
        count = input.numel() // input.shape[1] * dist.get_world_size()
        mean = _Sum.apply(x.sum(dims)) / count
        away = x - mean.view(shape)
        variance = _Sum.apply(away.square().sum(dims)) / count
        if self.num_batches_tracked is not None:
            self.num_batches_tracked += 1
        if self.running_mean is not None and self.running_var is not None and self.momentum:
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
                self.running_var.lerp_((variance * (count / (count - 1))).to(self.running_var), self.momentum)
        out = away * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(input.dtype)


class _Sum(torch.autograd.Function):
    """All-reduce sum over ranks, whose backward pass is the all-reduce sum of the gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient


def normalises_batches(*modules: nn.Module) -> bool:
    """Whether any of the modules holds a batch norm, which couples the samples of a micro-batch."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for module in modules for m in module.modules())


@contextmanager
def batch_statistics(*modules: nn.Module) -> Iterator[None]:
    """Context in which batch norms use the batch's statistics and do not update their running ones: for the teacher's forward
    pass, or a pass that is computed twice.
    """
    norms = [m for module in modules for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [(norm.training, norm.momentum) for norm in norms]
    for norm in norms:
        norm.training, norm.momentum = True, 0.0
    try:
        yield
    finally:
        for norm, (training, momentum) in zip(norms, before, strict=True):
            norm.training, norm.momentum = training, momentum
