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


def readable(model: EvalModel) -> bool:
    """Whether the tower is a timm transformer whose queries and keys can be read."""
    return _last(model) is not None


@torch.inference_mode()
def with_attention(model: EvalModel, images: Tensor) -> tuple[Any, Tensor | None]:
    """The tokens of images, and the class token's attention to each patch in the last block.

    Queries and keys are captured by hooks during the block's forward pass, so that sharded weights are accessed only by their own
    modules; rotary positions are applied as in the block.

    Args:
        model: model to evaluate; all ranks must make the same calls if an engine has sharded the weights.
        images: normalised, ``[n, 3, h, w]``.

    Returns:
        Tokens, and fp32 ``[n, heads, patches]`` attention weights; together with those of class token and registers they sum to
        one. ``None`` for a tower whose attention cannot be read.
    """
    attention = _last(model)
    if attention is None:
        return model.tokens(images), None
    captured: dict[str, Any] = {}

    def angles(_: nn.Module, args: Any, kwargs: Any) -> None:
        captured["rope"] = kwargs.get("rope", args[1] if len(args) > 1 else None)

    def keep(name: str) -> Any:
        return lambda _, __, out: captured.update({name: out.detach().float()})

    handles = [
        attention.register_forward_pre_hook(angles, with_kwargs=True),
        attention.q_norm.register_forward_hook(keep("q")),
        attention.k_norm.register_forward_hook(keep("k")),
    ]
    try:
        with uncompiled(model.tower.vit.blocks):
            tokens = model.tokens(images)
    finally:
        for handle in handles:
            handle.remove()
    prefix, q, k = model.tower.vit.num_prefix_tokens, captured["q"], captured["k"]
    if captured["rope"] is not None:
        half = getattr(attention, "rotate_half", False)
        k = torch.cat([k[:, :, :prefix], apply_rot_embed_cat(k[:, :, prefix:], captured["rope"].float(), half=half)], dim=2)
    weights = ((q[:, :, :1] * attention.scale) @ k.transpose(2, 3)).softmax(-1)
    to_patches: Tensor = weights[:, :, 0, prefix:]
    return tokens, to_patches


@torch.inference_mode()
def looked_at(model: EvalModel, images: Tensor) -> Tensor:
    """:func:`with_attention` averaged over heads, ``[n, patches]``; if the attention cannot be read, the cosine similarity of
    each patch with the class token.
    """
    tokens, attention = with_attention(model, images)
    if attention is not None:
        return attention.mean(1)
    return F.cosine_similarity(tokens.patches.float(), tokens.cls.float()[:, None], dim=2)


def shaded(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Map numbers to colours, dark to bright from minimum to maximum: uint8 ``[rows, columns, 3]``."""
    low, high = float(values.min()), float(values.max())
    position = (values - low) / max(high - low, 1e-12) * (len(_SHADES) - 1)
    table = np.asarray(_SHADES, dtype=np.float64)
    below = np.clip(position.astype(int), 0, len(_SHADES) - 2)
    share = (position - below)[..., None]
    return np.rint(table[below] * (1 - share) + table[below + 1] * share).astype(np.uint8)


def _last(model: EvalModel) -> Any:
    """The last block's attention module, if its queries and keys pass through modules of their own."""
    blocks = getattr(getattr(model.tower, "vit", None), "blocks", None)
    pooled = getattr(model.tower, "pooled", False)  # there is no class token whose attention could be read
    attention = getattr(blocks[-1], "attn", None) if blocks is not None and not pooled else None
    return attention if hasattr(attention, "q_norm") and hasattr(attention, "k_norm") and hasattr(attention, "scale") else None
