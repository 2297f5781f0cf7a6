"""Gathers weights in bf16 under ZeRO 3 where autocast rounds them to bf16 anyway: half of the bytes, the same results.

A rank keeps its fp32 shard. In a training pass DeepSpeed rounds it before it is sent and restores fp32 after, and autocast,
which rounds each weight of a linear layer or convolution before its product, finds the numbers that it would have computed
itself. Other parameters (norms, scales, positions, prototypes) are used in fp32 and gathered in fp32, as is everything outside a
training pass. Gradients are reduced in fp32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from pipeline.models.fp8 import computes_fp8

_MARK = "fovea_rounded"
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)
_active = False


def mark_rounded(networks: Iterable[nn.Module], partition_parameters: Any) -> int:
    """Mark the parameters whose gathers may be rounded, and make DeepSpeed ask; returns their number.

    Args:
        networks: the networks that are sharded.
        partition_parameters: DeepSpeed's module of that name; without the function that chooses a gather's dtype, which older
            versions lack, nothing is marked.
    """
    choose = getattr(partition_parameters, "get_allgather_dtype", None)
    if choose is None:
        return 0
    if not hasattr(choose, _MARK):

        def chosen(parameter: Any, shard: Any) -> torch.dtype:
            dtype: torch.dtype = torch.bfloat16 if _active and hasattr(parameter, _MARK) else choose(parameter, shard)
            return dtype

        setattr(chosen, _MARK, True)
        partition_parameters.get_allgather_dtype = chosen
    number = 0
    for network in networks:
        for layer in network.modules():
            if isinstance(layer, _LAYERS) and not computes_fp8(layer):  # fp8 scales the fp32 weight itself
                for parameter in layer.parameters(recurse=False):
                    setattr(parameter, _MARK, True)
                    number += 1
    return number


@contextlib.contextmanager
def rounded_gathers(*, enabled: bool) -> Iterator[None]:
    """Context of a training pass under autocast to bf16, in which marked parameters are gathered in bf16."""
    global _active
    before, _active = _active, enabled
    try:
        yield
    finally:
        _active = before


def drop_rounded(parameters: Iterable[Any]) -> None:
    """Release marked parameters that a training pass has left gathered, so that they are gathered again in fp32."""
    for parameter in parameters:
        if hasattr(parameter, _MARK) and parameter.ds_status.name == "AVAILABLE" and not parameter.ds_active_sub_modules:
            parameter.partition()
