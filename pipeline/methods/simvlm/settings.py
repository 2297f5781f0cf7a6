"""SimVLM settings."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from pipeline.config.types import RUNTIME, Count, Share
from pipeline.data.augment.settings import AugmentSettings
from pipeline.methods.clip.settings import TextSettings
from pipeline.methods.settings import OneViewSettings, register


@register("simvlm")
class SimvlmSettings(OneViewSettings):
    """SimVLM (arXiv 2108.10904): prefix language modelling with one transformer over image, prefix and caption."""

    reads_text: ClassVar[bool] = True

    name: Literal["simvlm"] = Field(default="simvlm", description="the method")
    augment: AugmentSettings = Field(
        default=OneViewSettings.model_fields["augment"].default.model_copy(update={"normalize": "imagenet"}),
        description="augmentation of the crop",
    )
    text: TextSettings = Field(default=TextSettings(), description="sizes and tokenizer of the transformer over image and text")
    longest_prefix: Count = Field(
        default=8, description="maximum text tokens in the prefix, the start token included; the length is drawn for each caption"
    )
    layerwise_lr_decay: Share = Field(
        default=1.0, description="layer-wise learning-rate decay: factor from each block of the tower to the one below"
    )
    caption_chunk_size: Count = Field(
        default=1024,
        json_schema_extra=RUNTIME,
        description="tokens whose vocabulary logits are computed at a time; limits memory",
    )
