"""CoCa (Yu et al., "Contrastive captioners are image-text foundation models", arXiv 2205.01917).

CLIP's contrastive loss plus a captioning decoder. The lower half of the text tower is a causal, text-only decoder; a class
token at its end gives the caption's feature. The upper half adds cross-attention to the image, pooled to a few tokens, and
predicts each next token. Both losses come from one forward pass.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from typing_extensions import override

from pipeline.config.schema import Config
from pipeline.data.augment.views import Batch
from pipeline.methods.base import Step
from pipeline.methods.coca.settings import CocaSettings
from pipeline.methods.shared.captioning import average_count, caption_nll, prediction_mask
from pipeline.methods.shared.contrastive import Contrastive, caption_tokens, unit
from pipeline.methods.shared.crops import one_view, view_stages
from pipeline.models.captions import CaptionTower, Pooler
from pipeline.models.vision import VisionTower, build_tower


class CoCa(Contrastive):
    """CoCa; see the module.

    Args:
        backbone: the vision tower.
        settings: sizes and loss weights.
    """

    settings: CocaSettings
    text_tower: CaptionTower

    def __init__(self, backbone: VisionTower, settings: CocaSettings) -> None:
        super().__init__(backbone, settings, scale=1 / 0.07)
        t, sizes = settings.text, settings.text.sizes
        self.views, self.curriculum = one_view(settings), view_stages(settings, one_view)
        self.text_tower = CaptionTower(
            width=sizes.width,
            depth=sizes.depth,
            heads=sizes.heads,
            embed=settings.embed_dim or sizes.embed,
            context=t.context_length,
            decoder_depth=settings.decoder_depth,
            picture=backbone.width,
            quick_gelu=t.activation == "quick_gelu",
        )
        self.pooler = Pooler(backbone.width, 1 + settings.caption_queries, backbone.vit.blocks[0].attn.num_heads)
        self.backbone.mask_token.requires_grad_(False)  # used by other methods only: it never gets a gradient here
        self._counts: deque[Tensor] = deque()

    @override
    def before_accumulation(self, batches: Sequence[Batch], step: Step) -> None:
        """Prepares the contrastive loss over all micro-batches and counts the tokens to predict."""
        super().before_accumulation(batches, step)
        count = average_count([prediction_mask(caption_tokens(batch)) for batch in batches])
        self._counts = deque([count] * len(batches))

    @override
    def forward(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Loss terms ``contrastive`` and ``caption``."""
        s, tokens = self.settings, caption_tokens(batch)
        mask = prediction_mask(tokens)
        count = self._counts.popleft() if self._counts else average_count([mask])
        pooled = self._pooled(batch.views["image"][0])
        features, states = self.text_tower(tokens, pooled[:, 1:])
        known = sum(batch.text_ends) if batch.text_ends is not None else None
        caption = caption_nll(states, tokens, mask, self.text_tower.vocabulary, s.caption_chunk_size, known) / count
        compared = self.contrast((unit(self.image_projection(pooled[:, 0])), unit(features)))
        self.metrics |= {"token_perplexity": caption.detach().exp()}
        return {"contrastive": s.contrastive_weight * compared, "caption": s.caption_weight * caption}

    @override
    def features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """L2-normalized features of images and captions."""
        return unit(self.encode_images(batch.views["image"][0])), unit(self.encode_texts(caption_tokens(batch)))

    @override
    def encode_images(self, images: Tensor) -> Tensor:
        """Features ``[batch, embed]`` of full images, not normalized."""
        features: Tensor = self.image_projection(self._pooled(images)[:, 0])
        return features

    def _pooled(self, images: Tensor) -> Tensor:
        """Pooled image tokens ``[batch, 1 + queries, width]``: first the contrastive feature, then the decoder's."""
        seen = self.backbone(images)
        pooled: Tensor = self.pooler(torch.cat([seen.cls[:, None], seen.patches], dim=1))
        return pooled

    @override
    def on_step_skipped(self) -> None:
        """Discards the prepared state."""
        super().on_step_skipped()
        self._counts.clear()

    @override
    def export(self) -> dict[str, nn.Module]:
        """Both towers, the image projection and the image pooling."""
        return super().export() | {"pooler": self.pooler}


def build(config: Config, settings: CocaSettings) -> CoCa:
    """Builds CoCa with newly initialized towers."""
    return CoCa(build_tower(config.model, image_size=settings.views.global_size), settings)
