"""CLIP (Radford et al., arXiv 2103.00020) and SigLIP (Zhai et al., arXiv 2303.15343).

Images and captions are embedded as unit vectors. Their dot products over all pairs of the global batch, times a learned scale,
are the logits. CLIP classifies the matching caption of each image and the matching image of each caption (softmax); SigLIP
classifies each pair as matching or not (sigmoid).
"""

from __future__ import annotations

import math

import torch
from timm.layers import AttentionPoolLatent
from torch import Tensor, nn

from pipeline.config.schema import Config
from pipeline.config.sizes import grid_of
from pipeline.data.augment.views import Batch
from pipeline.methods.base import Step
from pipeline.methods.clip.settings import ClipSettings
from pipeline.methods.shared.contrastive import Contrastive, caption_tokens, random_keep, unit
from pipeline.methods.shared.crops import one_view, view_stages
from pipeline.models.text_weights import load_text
from pipeline.models.tokens import Tokens
from pipeline.models.vision import VisionTower, build_tower

INIT_SCALE = {"softmax": 1 / 0.07, "sigmoid": 10.0}


class CLIP(Contrastive):
    """CLIP or SigLIP; see the module.

    Args:
        backbone: the vision tower.
        settings: sizes, loss and optimization settings.
    """

    settings: ClipSettings

    def __init__(self, backbone: VisionTower, settings: ClipSettings) -> None:
        sigmoid = settings.loss == "sigmoid"
        super().__init__(
            backbone,
            settings,
            scale=settings.init_logit_scale or INIT_SCALE[settings.loss],
            bias=settings.init_logit_bias if sigmoid else None,
        )
        self.views, self.curriculum = one_view(settings), view_stages(settings, one_view, patch=backbone.patch)
        if settings.image_pool == "attention":
            heads = backbone.vit.blocks[0].attn.num_heads
            self.pool: nn.Module | None = AttentionPoolLatent(backbone.width, num_heads=heads, mlp_ratio=4.0)
        else:
            self.pool = None
        frozen = {"image": self.backbone, "text": self.text_tower}
        for name in settings.freeze:
            frozen[name].requires_grad_(False)
        # Only other methods use the mask token: here it never gets a gradient.
        self.backbone.mask_token.requires_grad_(False)

    def forward(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Loss term ``contrastive``."""
        return {"contrastive": self.contrast(self.features(batch))}

    def features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """L2-normalized features of images and captions."""
        s, images = self.settings, batch.views["image"][0]
        keep = batch.kept_patches("image")
        if keep is None and self.training and s.patch_dropout > 0:
            patches = math.prod(grid_of(images.shape[-2:], self.backbone.patch))
            keep = random_keep(batch.numbers(), batch.position, patches, s.patch_dropout)
        with torch.set_grad_enabled(torch.is_grad_enabled() and "image" not in s.freeze):
            tokens = self.backbone(images, keep=keep, patches="none" if self.pool is None else "all")
        with torch.set_grad_enabled(torch.is_grad_enabled() and "text" not in s.freeze):
            texts = self.text_tower(caption_tokens(batch))
        return unit(self._pooled(tokens)), unit(texts)

    def encode_images(self, images: Tensor) -> Tensor:
        """Features ``[batch, embed]`` of full images, not normalized."""
        return self._pooled(self.backbone(images))

    def _pooled(self, tokens: Tokens) -> Tensor:
        features: Tensor = self.image_projection(tokens.cls if self.pool is None else self.pool(tokens.patches))
        return features

    def export(self) -> dict[str, nn.Module]:
        """Both towers, the image projection, and the image pooling if it has weights."""
        return super().export() | ({"image_pool": self.pool} if self.pool is not None else {})


def build(config: Config, settings: ClipSettings) -> CLIP:
    """Builds CLIP with newly initialized towers; loads the text tower's initial weights if the settings name them."""
    method = CLIP(build_tower(config.model, image_size=settings.views.global_size), settings)
    if settings.text_weights is not None:
        load_text(method.text_tower, settings.text_weights)
    return method
