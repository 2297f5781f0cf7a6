"""CLIP and SigLIP settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from pipeline.config.types import RUNTIME, Count, FilePath, NonNegative, Positive, Settings, Share
from pipeline.methods.settings import MethodSettings, OneViewSettings, register


@dataclass(frozen=True)
class TextSizes:
    """Sizes of a text tower.

    Attributes:
        embed: dimension of the joint image-text embedding.
        width, depth, heads: sizes of the transformer.
    """

    embed: int
    width: int
    depth: int
    heads: int


_SMALL, _BASE, _LARGE = TextSizes(384, 384, 12, 6), TextSizes(512, 512, 12, 8), TextSizes(768, 768, 12, 12)
TEXT_SIZES = {
    **dict.fromkeys(("ViT-S-32", "ViT-S-16"), _SMALL),
    **dict.fromkeys(("ViT-M-32", "ViT-M-16", "ViT-B-32", "ViT-B-32-256", "ViT-B-16"), _BASE),
    "ViT-B-16-plus": TextSizes(640, 640, 12, 10),
    **dict.fromkeys(("ViT-L-16", "ViT-L-14", "ViT-L-14-336"), _LARGE),
    **dict.fromkeys(("ViT-H-14", "ViT-g-14"), TextSizes(1024, 1024, 24, 16)),
    "ViT-bigG-14": TextSizes(1280, 1280, 32, 20),
}
"""Text tower sizes by open_clip model name."""


class TextSettings(Settings):
    """Text tower; sizes come from an open_clip model name, and each can be overridden."""

    architecture: str | None = Field(default="ViT-B-32", description="open_clip model name that provides the sizes not set here")
    width: Count | None = Field(default=None, description="token width; null means the architecture's")
    depth: Count | None = Field(default=None, description="number of transformer blocks; null means the architecture's")
    num_heads: Count | None = Field(default=None, description="attention heads per block; null means the architecture's")
    context_length: int = Field(
        default=77, ge=3, le=4096, description="maximum tokens per caption, start and end tokens included"
    )
    tokenizer: str = Field(default="ViT-B-32", min_length=1, description="open_clip model name whose tokenizer is used")
    causal: bool = Field(default=True, description="causal attention (CLIP); false is bidirectional (SigLIP)")
    activation: Literal["gelu", "quick_gelu"] = Field(
        default="gelu", description="exact GELU, or x * sigmoid(1.702 x) as in OpenAI's weights and the SLIP family"
    )

    @field_validator("architecture")
    @classmethod
    def _known(cls, name: str | None) -> str | None:
        if name is not None and name not in TEXT_SIZES:
            raise ValueError(f"must be null or one of {', '.join(TEXT_SIZES)}")
        return name

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.architecture is None and None in (self.width, self.depth, self.num_heads):
            raise ValueError("without an architecture, width, depth and num_heads are all required")
        if self.sizes.width % self.sizes.heads:
            raise ValueError(f"width {self.sizes.width} is not divisible by {self.sizes.heads} heads")
        return self

    @property
    def sizes(self) -> TextSizes:
        """The resolved sizes; without an architecture the embedding is as wide as the tokens."""
        width, depth, heads = self.width or 0, self.depth or 0, self.num_heads or 0
        base = TEXT_SIZES[self.architecture] if self.architecture else TextSizes(width, width, depth, heads)
        return TextSizes(base.embed, width or base.width, depth or base.depth, heads or base.heads)


class ContrastiveSettings(MethodSettings):
    """Base settings of the methods with an image-text contrastive loss."""

    reads_text: ClassVar[bool] = True

    text: TextSettings = Field(default=TextSettings(), description="the text tower")
    embed_dim: Count | None = Field(
        default=None, description="dimension of the joint image-text embedding; null means the text architecture's"
    )
    max_logit_scale: float = Field(
        default=100.0, gt=1, description="upper limit of the inverse temperature; the scale is clamped to it in the forward pass"
    )
    logit_chunk_size: Count = Field(
        default=1024, json_schema_extra=RUNTIME, description="rows of the logit matrix computed at a time; limits memory"
    )
    grad_cache: bool = Field(
        default=True,
        description="contrast each sample with the entire global batch even when it is split into micro-batches "
        "(GradCache, arXiv 2101.06983), at the cost of a second forward pass; false contrasts it with its "
        "micro-batch over all ranks only",
    )
    text_layerwise_lr_decay: Share = Field(
        default=1.0, description="layer-wise learning-rate decay of the text tower: factor from each block to the one below"
    )
    layerwise_lr_decay: Share = Field(
        default=1.0, description="layer-wise learning-rate decay of the vision tower: factor from each block to the one below"
    )
    text_lr_mult: NonNegative = Field(default=1.0, description="learning-rate multiplier of the entire text tower")
    no_weight_decay: tuple[Literal["positions", "class_token", "token_embedding"], ...] = Field(
        default=("positions", "class_token"),
        description="parameters without weight decay; biases, norms, logit scale and other vectors are never decayed",
    )


@register("clip")
class ClipSettings(OneViewSettings, ContrastiveSettings):
    """CLIP (arXiv 2103.00020), and with ``loss: sigmoid`` SigLIP (arXiv 2303.15343)."""

    drops_patches: ClassVar[bool] = True

    name: Literal["clip"] = Field(default="clip", description="the method")
    loss: Literal["softmax", "sigmoid"] = Field(default="softmax", description="softmax (CLIP) or sigmoid (SigLIP) loss")
    init_logit_scale: Positive | None = Field(
        default=None, description="initial inverse temperature; null means 1/0.07, or 10 with the sigmoid loss"
    )
    init_logit_bias: float = Field(default=-10.0, description="initial bias of the sigmoid loss's logits")
    image_pool: Literal["class_token", "attention"] = Field(
        default="class_token",
        description="image feature: the class token, or attention pooling over the patch tokens (SigLIP)",
    )
    patch_dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="fraction of patches dropped from each image in training (FLIP); finish training with 0",
    )
    freeze: tuple[Literal["image", "text"], ...] = Field(
        default=(), description="towers that are frozen (LiT: image, with weights from init_from.source)"
    )
    text_weights: FilePath | None = Field(
        default=None,
        description="safetensors file with initial weights of the text tower, under open_clip's or fovea's names; null for none",
    )

    @field_validator("freeze")
    @classmethod
    def _something_to_train(cls, towers: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(towers)) == 2:
            raise ValueError("must leave one tower to train")
        return towers
