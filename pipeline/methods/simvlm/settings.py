"""Settings of SimVLM."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from pipeline.config.types import RUNTIME, Count, Share
from pipeline.methods.clip.settings import TextSettings
from pipeline.methods.settings import OneViewSettings, register


@register("simvlm")
class SimvlmSettings(OneViewSettings):
    """SimVLM's objective (arXiv 2108.10904): one transformer goes on with the caption after picture and prefix."""

    reads_text: ClassVar[bool] = True

    name: Literal["simvlm"] = Field(default="simvlm", description="the method")
    normalize: Literal["openai", "imagenet", "half"] = Field(
        default="imagenet", description="mean and deviation taken off the colours; half is 0.5 and 0.5"
    )
    text: TextSettings = Field(default=TextSettings(), description="sizes of the transformer over picture and text, tokenizer")
    longest_prefix: Count = Field(
        default=8, description="text tokens, the start mark among them, that at most belong to the prefix; drawn for each caption"
    )
    layerwise_lr_decay: Share = Field(
        default=1.0, description="learning-rate factor from one block of the tower to the block below"
    )
    caption_chunk_size: Count = Field(default=1024, json_schema_extra=RUNTIME, description="tokens whose logits exist at a time")
