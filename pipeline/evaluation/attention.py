"""Attention of the class token in the last block, and attention maps as images."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from timm.layers import apply_rot_embed_cat
from torch import Tensor, nn

from pipeline.models.eval_model import EvalModel, uncompiled

_SHADES = ((0, 0, 40), (60, 20, 120), (190, 50, 90), (250, 150, 40), (255, 250, 190))


def readable(subject: EvalModel) -> bool:
    """Whether the tower is a timm transformer whose queries and keys can be read."""
    return _last(subject) is not None


@torch.inference_mode()
def with_attention(subject: EvalModel, images: Tensor) -> tuple[Any, Tensor | None]:
    """The tokens of images, and the class token's attention to each patch in the last block.

    Queries and keys are captured by hooks during the block's forward pass, so that sharded weights are accessed only by their own
    modules; rotary positions are applied as in the block.

    Args:
        subject: model to evaluate; all ranks must make the same calls if an engine has sharded the weights.
        images: normalised, ``[n, 3, h, w]``.

    Returns:
        Tokens, and fp32 ``[n, heads, patches]`` attention weights; together with those of class token and registers they sum to
        one. ``None`` for a tower whose attention cannot be read.
    """
    attention = _last(subject)
    if attention is None:
        return subject.tokens(images), None
    heard: dict[str, Any] = {}

    def angles(_: nn.Module, args: Any, kwargs: Any) -> None:
        heard["rope"] = kwargs.get("rope", args[1] if len(args) > 1 else None)

    def keep(name: str) -> Any:
        return lambda _, __, out: heard.update({name: out.detach().float()})

    handles = [
        attention.register_forward_pre_hook(angles, with_kwargs=True),
        attention.q_norm.register_forward_hook(keep("q")),
        attention.k_norm.register_forward_hook(keep("k")),
    ]
    try:
        with uncompiled(subject.tower.vit.blocks):
            tokens = subject.tokens(images)
    finally:
        for handle in handles:
            handle.remove()
    prefix, q, k = subject.tower.vit.num_prefix_tokens, heard["q"], heard["k"]
    if heard["rope"] is not None:
        half = getattr(attention, "rotate_half", False)
        k = torch.cat([k[:, :, :prefix], apply_rot_embed_cat(k[:, :, prefix:], heard["rope"].float(), half=half)], dim=2)
    shares = ((q[:, :, :1] * attention.scale) @ k.transpose(2, 3)).softmax(-1)
    found: Tensor = shares[:, :, 0, prefix:]
    return tokens, found


@torch.inference_mode()
def looked_at(subject: EvalModel, images: Tensor) -> Tensor:
    """:func:`with_attention` averaged over heads, ``[n, patches]``; if the attention cannot be read, the cosine similarity of
    each patch with the class token.
    """
    tokens, attention = with_attention(subject, images)
    if attention is not None:
        return attention.mean(1)
    return F.cosine_similarity(tokens.patches.float(), tokens.cls.float()[:, None], dim=2)


def shaded(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Map numbers to colours, dark to bright from minimum to maximum: uint8 ``[rows, columns, 3]``."""
    low, high = float(values.min()), float(values.max())
    places = (values - low) / max(high - low, 1e-12) * (len(_SHADES) - 1)
    table = np.asarray(_SHADES, dtype=np.float64)
    below = np.clip(places.astype(int), 0, len(_SHADES) - 2)
    share = (places - below)[..., None]
    return np.rint(table[below] * (1 - share) + table[below + 1] * share).astype(np.uint8)


def _last(subject: EvalModel) -> Any:
    """The last block's attention module, if its queries and keys pass through modules of their own."""
    blocks = getattr(getattr(subject.tower, "vit", None), "blocks", None)
    attention = getattr(blocks[-1], "attn", None) if blocks is not None else None
    return attention if hasattr(attention, "q_norm") and hasattr(attention, "k_norm") and hasattr(attention, "scale") else None
