"""Settings of CoCa."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.config.types import RUNTIME, Count, NonNegative
from pipeline.methods.clip.settings import ContrastiveSettings
from pipeline.methods.settings import OneViewSettings, register


@register("coca")
class CocaSettings(ContrastiveSettings, OneViewSettings):
    """CoCa (arXiv 2205.01917): CLIP's comparison, and a decoder that writes the caption."""

    name: Literal["coca"] = Field(default="coca", description="the method")
    contrastive_weight: NonNegative = Field(default=1.0, description="weight of the comparison")
    caption_weight: NonNegative = Field(default=2.0, description="weight of the next-token term")
    decoder_depth: Count = Field(default=12, description="blocks that see the picture, above those of the text alone")
    caption_queries: Count = Field(default=256, description="tokens that the picture is pooled to for the decoder")
    caption_chunk_size: Count = Field(default=1024, json_schema_extra=RUNTIME, description="tokens whose logits exist at a time")
