"""What the class token looks at: its row of the last block's attention, read beside a forward pass, and maps as colours."""

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
    """Whether the tower is one of timm's transformers, whose queries and keys can be read."""
    return _last(subject) is not None


@torch.inference_mode()
def with_attention(subject: EvalModel, images: Tensor) -> tuple[Any, Tensor | None]:
    """The tokens of images, and how much of the class token's attention in the last block each patch has.

    Queries and keys are overheard while the block works, so that weights are read by their owners alone; rotary positions are
    applied as the block does.

    Args:
        subject: whose tower is asked; all ranks ask alike where an engine has cut the weights.
        images: normalised, ``[n, 3, h, w]``.

    Returns:
        Tokens, and fp32 ``[n, heads, patches]``: shares of one, of which class token and registers have the rest; ``None`` of
        a tower that cannot be read so.
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
    """:func:`with_attention`, the mean of all heads, ``[n, patches]``; of a tower that cannot be read, the cosine of each patch
    with the class token."""
    tokens, attention = with_attention(subject, images)
    if attention is not None:
        return attention.mean(1)
    return F.cosine_similarity(tokens.patches.float(), tokens.cls.float()[:, None], dim=2)


def shaded(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Numbers as colours, dark to bright from their least to their most: uint8 ``[rows, columns, 3]``."""
    low, high = float(values.min()), float(values.max())
    places = (values - low) / max(high - low, 1e-12) * (len(_SHADES) - 1)
    table = np.asarray(_SHADES, dtype=np.float64)
    below = np.clip(places.astype(int), 0, len(_SHADES) - 2)
    share = (places - below)[..., None]
    return np.rint(table[below] * (1 - share) + table[below + 1] * share).astype(np.uint8)


def _last(subject: EvalModel) -> Any:
    """The last block's attention, if its queries and keys pass through modules of their own."""
    blocks = getattr(getattr(subject.tower, "vit", None), "blocks", None)
    attention = getattr(blocks[-1], "attn", None) if blocks is not None else None
    return attention if hasattr(attention, "q_norm") and hasattr(attention, "k_norm") and hasattr(attention, "scale") else None
