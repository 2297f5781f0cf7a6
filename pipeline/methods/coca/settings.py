"""CoCa settings."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.config.types import RUNTIME, Count, NonNegative
from pipeline.methods.clip.settings import ContrastiveSettings
from pipeline.methods.settings import OneViewSettings, register


@register("coca")
class CocaSettings(OneViewSettings, ContrastiveSettings):
    """CoCa (arXiv 2205.01917): CLIP's contrastive loss plus a captioning decoder."""

    name: Literal["coca"] = Field(default="coca", description="the method")
    contrastive_weight: NonNegative = Field(default=1.0, description="weight of the contrastive loss")
    caption_weight: NonNegative = Field(default=2.0, description="weight of the captioning (next-token) loss")
    decoder_depth: Count = Field(
        default=12, description="decoder blocks with cross-attention to the image, on top of the text-only blocks"
    )
    caption_queries: Count = Field(default=256, description="image tokens that attention pooling produces for the decoder")
    caption_chunk_size: Count = Field(
        default=1024,
        json_schema_extra=RUNTIME,
        description="tokens whose vocabulary logits are computed at a time; limits memory",
    )
