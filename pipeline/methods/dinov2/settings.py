"""Settings of DINOv2."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field
from typing_extensions import override

from pipeline.config.types import Count, Length, NonNegative, PathName, Positive, Probability, Settings, Share, ShareRange
from pipeline.methods.settings import AugmentSettings, MethodSettings, ViewSettings, register


class Resolution(Settings):
    """Sizes of the crops of a step, where they change from step to step."""

    weight: Positive = Field(default=1.0, description="how often a step takes these sizes, relative to the others' weights")
    global_size: int | None = Field(
        default=None, ge=8, le=4096, description="side of a global crop, pixels; null means the views'"
    )
    local_size: int | None = Field(default=None, ge=8, le=4096, description="side of a local crop, pixels; null means the views'")
    gram_size: int | None = Field(
        default=None, ge=8, le=4096, description="side of what the Gram anchor sees, pixels; null means method.gram_size"
    )


@register("dinov2")
class Dinov2Settings(MethodSettings):
    """DINOv2 (arXiv 2304.07193): self-distillation of class and patch tokens."""

    name: Literal["dinov2"] = Field(default="dinov2", description="the method")
    views: ViewSettings = Field(default=ViewSettings(), description="the crops of a picture")
    resolutions: tuple[Resolution, ...] = Field(
        default=(),
        description="sizes of crops of which each step takes one by weight (DINOv3's high-resolution stage); none means those of "
        "views at every step. Then views.global_size is what the positions are made for and evaluations look at",
    )
    augment: AugmentSettings = Field(default=AugmentSettings(), description="what happens to a crop")
    mask_probability: Probability = Field(default=0.5, description="share of the global crops that are masked")
    mask_ratio: ShareRange = Field(default=(0.1, 0.5), description="least and largest share of patches hidden in a masked crop")
    prototypes: int = Field(default=65536, gt=1, description="outputs of the projection head")
    head_hidden: Count = Field(default=2048, description="width of the head's hidden layers")
    head_bottleneck: Count = Field(default=256, description="width before the prototypes")
    head_layers: int = Field(default=3, ge=1, le=8, description="linear layers of the head before the prototypes")
    ibot_prototypes: int | None = Field(
        default=None, gt=1, description="as prototypes, of the patch tokens' own head; null means the same"
    )
    ibot_hidden: Count | None = Field(default=None, description="as head_hidden, of the patch tokens' own head")
    ibot_bottleneck: Count | None = Field(default=None, description="as head_bottleneck, of the patch tokens' own head")
    shared_heads: bool = Field(default=False, description="class and patch tokens share one head")
    head_norm: Literal["weight_norm", "plain"] = Field(
        default="weight_norm", description="prototype layer: weight-normalised (v2) or plain (v3)"
    )
    dino_weight: NonNegative = Field(default=1.0, description="weight of the class-token term")
    local_weight: NonNegative = Field(default=1.0, description="factor of the local crops' part of the class-token term")
    ibot_weight: NonNegative = Field(default=1.0, description="weight of the masked-patch term")
    koleo_weight: NonNegative = Field(default=0.1, description="weight of the spreading term")
    koleo_group_size: int | None = Field(
        default=None,
        ge=2,
        description="samples that are kept apart from one another, this many consecutive ones; null means a rank's micro-batch, "
        "as in the reference. With a divisor of train.micro_batch_size the term no longer depends on how the batch is cut",
    )
    koleo_topk: int = Field(default=1, ge=1, le=16, description="nearest neighbours that each sample is kept from")
    koleo_across_ranks: bool = Field(
        default=False, description="compare with the other ranks' samples of the same micro-batch too; groups may then span ranks"
    )
    gram_weight: NonNegative = Field(
        default=0.0, description="weight of Gram anchoring: patches stay as alike to one another as they were (DINOv3)"
    )
    gram_size: int | None = Field(
        default=None,
        ge=8,
        le=4096,
        description="side, pixels, at which the anchor sees the global crops, without any distortion of colours; its patches are "
        "then resampled to the student's grid. null means as the student sees them",
    )
    gram_weights: PathName | None = Field(
        default=None,
        min_length=1,
        description="run or checkpoint whose teacher is the anchor; null means what this run starts with",
    )
    gram_update_every: Count | None = Field(
        default=None, description="steps after which the teacher becomes the anchor; null for never"
    )
    gram_max_updates: Count = Field(default=3, description="how often it does")
    student_temperature: Positive = Field(default=0.1, description="temperature of the student's softmax")
    centering: Literal["sinkhorn_knopp", "softmax_center"] = Field(
        default="sinkhorn_knopp", description="how the teacher's outputs become targets"
    )
    sinkhorn_iterations: int = Field(default=3, ge=1, le=100, description="normalisation rounds of the Sinkhorn targets")
    center_momentum: Probability = Field(
        default=0.9, description="share of the old centre kept each step, if targets are centred"
    )
    prototype_chunk_size: Count | None = Field(
        default=None,
        description="rows of prototype logits that are in memory at once; null means as many as fill 128 MiB, or 256 MiB where "
        "Triton works on them in place. Changes no result",
    )
    layerwise_lr_decay: Share = Field(default=1.0, description="learning-rate factor from one block to the block below")
    patch_embed_lr_mult: NonNegative = Field(default=0.2, description="learning-rate factor of the patch embedding")
    freeze_last_layer: Length = Field(
        default=Length(1250, "steps"), description="how long the prototype layer's learning rate is 0"
    )
    clip_norm: Positive | None = Field(default=3.0, description="largest L2 norm of the gradient; null means no clipping")
    clip_scope: Literal["network", "global", "parameter"] = Field(
        default="network", description="clip backbone and heads apart, or all together"
    )

    def at(self, resolution: Resolution) -> Self:
        """These settings with the crops' sizes of some steps."""
        sizes = {name: size for name in ("global_size", "local_size") if (size := getattr(resolution, name)) is not None}
        gram = resolution.gram_size or self.gram_size
        return self.model_copy(update={"views": self.views.model_copy(update=sizes), "gram_size": gram, "resolutions": ()})

    @property
    @override
    def anchors(self) -> dict[str, str | None]:
        """The Gram anchor's source, where one is wanted."""
        return {"gram": self.gram_weights} if self.gram_weight else {}

    @property
    def last_layer_freeze(self) -> Length:
        """How long the prototypes stand still."""
        return self.freeze_last_layer
