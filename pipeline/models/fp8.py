"""FP8 matrix products in the linear layers of a backbone's blocks: faster on GPUs with FP8 tensor cores, with lower precision.

Each row of both factors is scaled to the range of e4m3 by its own largest magnitude, and ``torch._scaled_mm`` multiplies them
into bf16 (DINOv3's choice for its largest model, arXiv 2508.10104). This applies to the output and to the gradient with
respect to the input; the gradient with respect to the weight, a sum over all tokens, stays a bf16 product. Master weights,
optimizer and teacher stay fp32. Layers whose sizes are not multiples of 16 are unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max
_MULTIPLE = 16  # required of the product's inner and outer sizes


def use_fp8(blocks: nn.Module) -> list[str]:
    """Makes linear layers compute in FP8 under autocast to bf16; parameters and names do not change.

    Args:
        blocks: the blocks of a backbone.

    Returns:
        Names of the converted layers.
    """
    fitting = dict(_fitting(blocks))
    for layer in fitting.values():
        layer.forward = MethodType(_forward, layer)  # type: ignore[method-assign]
    attention: Any
    for attention in blocks.modules():
        if getattr(attention, "q_bias", None) is not None:
            attention.qkv_bias_separate = True  # otherwise Eva uses the weight itself and bypasses the layer
    return list(fitting)


def computes_fp8(layer: nn.Module) -> bool:
    """Whether a layer was converted by :func:`use_fp8`."""
    return getattr(vars(layer).get("forward"), "__func__", None) is _forward


def scaled_product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b.T`` of ``[m, k]`` and ``[n, k]`` in bf16, both rounded to e4m3 by rows; ``k`` and ``n`` multiples of 16."""
    (left, left_scale), (right, right_scale) = rounded(a), rounded(b)
    if not len(a):
        return a.new_empty(0, len(b), dtype=torch.bfloat16)
    if not _scales_rows(a.device.type):
        return ((left.float() * left_scale) @ (right.float() * right_scale).t()).bfloat16()
    product: Tensor = torch._scaled_mm(left, right.t(), scale_a=left_scale, scale_b=right_scale.t(), out_dtype=torch.bfloat16)
    return product


@cache
def _scales_rows(device: str) -> bool:
    """Whether torch supports row-wise scaling on the device; on CPUs some versions do not, and the plain product is used."""
    if device != "cpu":
        return True
    ones, scale = torch.ones(16, 16, dtype=E4M3), torch.ones(16, 1)
    try:
        torch._scaled_mm(ones, ones.t(), scale_a=scale, scale_b=scale.t(), out_dtype=torch.bfloat16)
    except RuntimeError:
        return False
    return True


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows ``[n, k]`` in e4m3, and the fp32 factors ``[n, 1]`` that scale them back."""
    x = x.float()
    scale = x.abs().amax(1, keepdim=True).clamp(min=1e-12) / LARGEST
    return (x / scale).to(E4M3).contiguous(), scale


def _fitting(blocks: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for name, layer in blocks.named_modules():
        fits = isinstance(layer, nn.Linear) and layer.in_features % _MULTIPLE == 0 and layer.out_features % _MULTIPLE == 0
        if fits and "forward" not in vars(
            layer
        ):  # skip a tower's last projection, whose forward is replaced to compute selected rows only
            yield name, layer


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    if not torch.is_autocast_enabled(x.device.type):
        return nn.Linear.forward(layer, x)
    product: Tensor = _Linear.apply(x.flatten(0, -2), layer.weight)
    y = product.unflatten(
        0, x.shape[:-1]
    )  # outside the custom function: Eva adds its bias in place, which a custom function's view forbids
    return y if layer.bias is None else y + layer.bias.to(y.dtype)


class _Linear(torch.autograd.Function):
    # The weight is saved by reference: an engine that shards it (ZeRO 3) gathers it again when the gradient is computed.
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(rows.bfloat16(), weight)
        ctx.kind = rows.dtype
        return scaled_product(rows, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None]:
        rows, weight = ctx.saved_tensors
        to_input = to_weight = None
        if ctx.needs_input_grad[0]:
            to_input = scaled_product(upstream, weight.t()).to(ctx.kind)
        if ctx.needs_input_grad[1]:
            to_weight = (upstream.bfloat16().t() @ rows).to(weight.dtype)
        return to_input, to_weight
