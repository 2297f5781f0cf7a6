"""Digests of a rank's part of a checkpoint, by kind of tensor and network."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import xxhash
from torch import Tensor


def group_digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """A digest of 8 bytes, in hexadecimal, of the tensors of each group.

    Args:
        tensors: by name, such as ``exp_avg/backbone.blocks.0.norm1.weight``, of the group ``exp_avg/backbone``.
    """
    groups: dict[str, xxhash.xxh3_64] = {}
    for name in sorted(tensors):
        kind, _, rest = name.partition("/")
        digest = groups.setdefault(f"{kind}/{rest.partition('.')[0]}", xxhash.xxh3_64())
        flat = tensors[name].detach().cpu().contiguous().reshape(-1)
        digest.update(name.encode())
        if flat.numel():
            digest.update(flat.view(torch.uint8).numpy().data)
    return {name: digest.hexdigest() for name, digest in groups.items()}
