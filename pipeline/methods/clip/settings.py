"""Settings of CLIP and SigLIP: pictures and their captions."""

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
        embed: features that pictures and texts share.
        width, depth, heads: of the transformer.
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
"""Sizes by the names of open_clip."""


class TextSettings(Settings):
    """The text tower: sizes by an open_clip name, each of which may be set otherwise."""

    architecture: str | None = Field(default="ViT-B-32", description="open_clip name that gives the sizes not set here")
    width: Count | None = Field(default=None, description="width of a token; null means the architecture's")
    depth: Count | None = Field(default=None, description="transformer blocks; null means the architecture's")
    num_heads: Count | None = Field(default=None, description="attention heads of a block; null means the architecture's")
    context_length: int = Field(default=77, ge=3, le=4096, description="tokens of a caption at most, both marks included")
    tokenizer: str = Field(default="ViT-B-32", min_length=1, description="open_clip name whose tokenizer is used")
    causal: bool = Field(default=True, description="a token sees only those before it (CLIP); false is SigLIP's")
    activation: Literal["gelu", "quick_gelu"] = Field(
        default="gelu", description="exact GELU, or x * sigmoid(1.702 x) of OpenAI's weights and of the SLIP family"
    )

    @field_validator("architecture")
    @classmethod
    def _known(cls, name: str | None) -> str | None:
        if name is not None and name not in TEXT_SIZES:
            raise ValueError(f"should be null or one of {', '.join(TEXT_SIZES)}")
        return name

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.architecture is None and None in (self.width, self.depth, self.num_heads):
            raise ValueError("without an architecture, width, depth and heads are all required")
        if self.sizes.width % self.sizes.heads:
            raise ValueError(f"width {self.sizes.width} does not divide by {self.sizes.heads} heads")
        return self

    @property
    def sizes(self) -> TextSizes:
        """The sizes that hold; without an architecture the features are as wide as the tokens."""
        width, depth, heads = self.width or 0, self.depth or 0, self.num_heads or 0
        base = TEXT_SIZES[self.architecture] if self.architecture else TextSizes(width, width, depth, heads)
        return TextSizes(base.embed, width or base.width, depth or base.depth, heads or base.heads)


class ContrastiveSettings(MethodSettings):
    """What all methods share that compare pictures with captions."""

    reads_text: ClassVar[bool] = True

    text: TextSettings = Field(default=TextSettings(), description="the text tower")
    embed_dim: Count | None = Field(
        default=None, description="features that pictures and texts share; null means the text architecture's"
    )
    max_logit_scale: float = Field(
        default=100.0, gt=1, description="largest inverse temperature; the scale is clamped to it in the forward"
    )
    logit_chunk_size: Count = Field(default=1024, json_schema_extra=RUNTIME, description="rows of logits that exist at a time")
    grad_cache: bool = Field(
        default=True,
        description="compare each sample with the whole global batch though it comes in micro-batches (GradCache, arXiv "
        "2101.06983), at the cost of a second forward pass; false compares it with its micro-batch over all ranks only",
    )
    text_layerwise_lr_decay: Share = Field(
        default=1.0, description="learning-rate factor from one block of the text tower to the block below"
    )
    layerwise_lr_decay: Share = Field(
        default=1.0, description="learning-rate factor from one block of the vision tower to the block below"
    )
    text_lr_mult: NonNegative = Field(default=1.0, description="learning-rate factor of the whole text tower")
    no_weight_decay: tuple[Literal["positions", "class_token", "token_embedding"], ...] = Field(
        default=("positions", "class_token"),
        description="matrices without weight decay; biases, norms, logit scale and other vectors never have any",
    )


@register("clip")
class ClipSettings(ContrastiveSettings, OneViewSettings):
    """CLIP (arXiv 2103.00020), and with ``loss: sigmoid`` SigLIP (arXiv 2303.15343)."""

    name: Literal["clip"] = Field(default="clip", description="the method")
    loss: Literal["softmax", "sigmoid"] = Field(default="softmax", description="CLIP's or SigLIP's")
    init_logit_scale: Positive | None = Field(
        default=None, description="initial inverse temperature; null is 1/0.07, or 10 with sigmoid"
    )
    init_logit_bias: float = Field(default=-10.0, description="initial bias of the sigmoid's logits")
    image_pool: Literal["class_token", "attention"] = Field(
        default="class_token",
        description="what stands for the picture: the class token, or attention over the patches (SigLIP's)",
    )
    patch_dropout: float = Field(
        default=0.0, ge=0, lt=1, description="share of the patches that training leaves out of each picture (FLIP); end with 0"
    )
    freeze: tuple[Literal["image", "text"], ...] = Field(
        default=(), description="towers that stand still (LiT: image, whose weights init_from.source gives)"
    )
    text_weights: FilePath | None = Field(
        default=None, description="safetensors file of initial weights of the text tower, by open_clip's names or fovea's"
    )

    @field_validator("freeze")
    @classmethod
    def _something_to_train(cls, towers: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(towers)) == 2:
            raise ValueError("should leave one tower to train")
        return towers
