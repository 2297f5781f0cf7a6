"""Convolutional stems as patch embeddings."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from timm.layers import HybridEmbed, LayerNorm2d
from timm.models.vision_transformer_hybrid import ConvStem
from torch import nn

from pipeline.errors import ConfigError


def conv_stem(patch: int, width: int, channels: int = 3) -> Callable[..., nn.Module]:
    """Returns an ``embed_layer`` for timm: stride-2 3x3 convolutions, norm, GELU, down to one token per patch ("Early
    convolutions help transformers see better", arXiv 2106.14881).

    Args:
        patch: side of a patch in pixels, a power of two.
        width: token width; each earlier convolution has half the channels of the next.
        channels: channels of the images.
    """
    halvings = int(math.log2(patch)) if patch > 0 else 0
    if patch != 2**halvings or halvings < 1:
        raise ConfigError(
            f"{patch} is not a patch size of the convolutional stem", where="model.patch_size", hint="Choose 2, 4, 8, 16 or 32"
        )
    widths = tuple(width // 2 ** (halvings - i) for i in range(halvings))

    def embed(**kwargs: Any) -> nn.Module:
        stem = ConvStem(
            in_chans=channels,
            depth=halvings + 1,
            channels=(*widths, width),
            kernel_size=(3,) * halvings + (1,),
            stride=(2,) * halvings + (1,),
            norm_layer=LayerNorm2d,
            act_layer=nn.GELU,
        )
        return partial(HybridEmbed, backbone=stem, proj=False)(**kwargs)

    return embed
