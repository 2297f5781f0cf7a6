"""DINOv2 settings; also DINOv3's Gram anchoring and mixed resolutions."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator
from typing_extensions import override

from pipeline.config.types import (
    Count,
    ImageSize,
    Length,
    NonNegative,
    PathName,
    Positive,
    Probability,
    Settings,
    Share,
    ShareRange,
)
from pipeline.data.augment.settings import AugmentSettings, MultiCropSettings
from pipeline.methods.settings import MethodSettings, register


class Resolution(Settings):
    """One set of crop sizes, where the sizes change from step to step."""

    weight: Positive = Field(default=1.0, description="relative frequency of steps with these sizes")
    global_size: ImageSize | None = Field(
        default=None, description="side of a global crop in pixels, or [height, width]; null means views.global_size"
    )
    local_size: ImageSize | None = Field(
        default=None, description="side of a local crop in pixels, or [height, width]; null means views.local_size"
    )
    gram_size: int | None = Field(
        default=None, ge=8, le=4096, description="side of the Gram anchor's input in pixels; null means method.gram_size"
    )


@register("dinov2")
class Dinov2Settings(MethodSettings):
    """DINOv2 (arXiv 2304.07193): self-distillation of class and patch tokens."""

    resizable: ClassVar[bool] = True
    guidable: ClassVar[bool] = True

    name: Literal["dinov2"] = Field(default="dinov2", description="the method")
    views: MultiCropSettings = Field(default=MultiCropSettings(), description="multi-crop sizes and counts")
    resolutions: tuple[Resolution, ...] = Field(
        default=(),
        description="crop sizes, of which each step draws one by weight (DINOv3's high-resolution stage); empty uses "
        "those of views at every step. With resolutions, views.global_size sets the position embedding's grid "
        "and the evaluation size",
    )
    augment: AugmentSettings = Field(
        default=AugmentSettings(),
        description="augmentation of a crop. The blur probabilities are those that trained the public weights (0, 0.9, 0.5); the "
        "paper's text has 1, 0.1, 0.5",
    )
    mask_probability: Probability = Field(default=0.5, description="fraction of the global crops that are masked")
    mask_ratio: ShareRange = Field(
        default=(0.1, 0.5), description="smallest and largest fraction of masked patches in a masked crop"
    )
    prototypes: int = Field(default=65536, gt=1, description="output dimension of the projection head")
    head_hidden: Count = Field(default=2048, description="width of the head's hidden layers")
    head_bottleneck: Count = Field(default=256, description="width of the head's bottleneck before the prototypes")
    head_layers: int = Field(default=3, ge=1, le=8, description="number of linear layers of the head before the prototypes")
    ibot_prototypes: int | None = Field(
        default=None, gt=1, description="output dimension of the separate patch-token (iBOT) head; null means prototypes"
    )
    ibot_hidden: Count | None = Field(
        default=None, description="hidden width of the separate patch-token (iBOT) head; null means head_hidden"
    )
    ibot_bottleneck: Count | None = Field(
        default=None, description="bottleneck width of the separate patch-token (iBOT) head; null means head_bottleneck"
    )
    shared_heads: bool = Field(default=False, description="use one head for class and patch tokens")
    head_norm: Literal["weight_norm", "plain"] = Field(
        default="weight_norm", description="prototype layer: weight-normalized (DINOv2) or plain linear (DINOv3)"
    )
    dino_weight: NonNegative = Field(default=1.0, description="weight of the class-token (DINO) loss")
    local_weight: NonNegative = Field(default=1.0, description="multiplier of the local crops' part of the class-token loss")
    ibot_weight: NonNegative = Field(default=1.0, description="weight of the masked-patch (iBOT) loss")
    koleo_weight: NonNegative = Field(default=0.1, description="weight of the KoLeo regularizer, which spreads features")
    koleo_group_size: int | None = Field(
        default=None,
        ge=2,
        description="consecutive samples among which KoLeo searches nearest neighbours; null means a rank's micro-batch, "
        "as in the reference code. With a divisor of train.micro_batch_size the loss does not depend on how "
        "the batch is split",
    )
    koleo_topk: int = Field(default=1, ge=1, le=16, description="nearest neighbours per sample in the KoLeo loss")
    koleo_across_ranks: bool = Field(
        default=False,
        description="search KoLeo neighbours among all ranks' samples of the micro-batch; groups may then span ranks",
    )
    gram_weight: NonNegative = Field(
        default=0.0,
        description="weight of Gram anchoring (DINOv3), which keeps the similarities between patch tokens close to the anchor's",
    )
    gram_size: int | None = Field(
        default=None,
        ge=8,
        le=4096,
        description="side in pixels at which the anchor sees the global crops, without colour augmentation; its patch "
        "tokens are then resampled to the student's grid. null gives the anchor the student's crops",
    )
    gram_weights: PathName | None = Field(
        default=None,
        min_length=1,
        description="run or checkpoint whose teacher is the Gram anchor; null means this run's initial weights",
    )
    gram_update_every: Count | None = Field(
        default=None, description="steps between copies of the teacher into the Gram anchor; null for never"
    )
    gram_max_updates: Count = Field(default=3, description="maximum number of Gram anchor updates")
    student_temperature: Positive = Field(default=0.1, description="student softmax temperature")
    centering: Literal["sinkhorn_knopp", "softmax_center"] = Field(
        default="sinkhorn_knopp", description="how the teacher's outputs become targets: Sinkhorn-Knopp or softmax with centering"
    )
    sinkhorn_iterations: int = Field(default=3, ge=1, le=100, description="Sinkhorn-Knopp iterations")
    center_momentum: Probability = Field(default=0.9, description="EMA momentum of the centre, with softmax_center")
    target_batch: Literal["global", "micro"] = Field(
        default="global",
        description="samples that determine Sinkhorn-Knopp's targets together: the global batch, however it is split, or each "
        "micro-batch alone (over all ranks), as where accumulation is naive; micro is for comparisons",
    )
    prototype_chunk_size: Count | None = Field(
        default=None,
        description="rows of prototype logits in memory at a time; null means as many as fit in 128 MiB, or 256 MiB where "
        "Triton kernels work in place. Does not change results",
    )
    layerwise_lr_decay: Share = Field(
        default=1.0, description="layer-wise learning-rate decay: factor from each block to the one below"
    )
    patch_embed_lr_mult: NonNegative = Field(default=0.2, description="learning-rate multiplier of the patch embedding")
    freeze_last_layer: Length = Field(
        default=Length(1250, "steps"), description="time at the start during which the prototype layer's learning rate is 0"
    )
    clip_norm: Positive | None = Field(default=3.0, description="maximum L2 norm of the gradient; null disables clipping")
    clip_scope: Literal["network", "global", "parameter"] = Field(
        default="network",
        description="clip the gradient by the norm of each network (backbone, heads), of all parameters together, or of "
        "each parameter",
    )

    def at(self, resolution: Resolution) -> Self:
        """These settings with the crop sizes of ``resolution``."""
        sizes = {name: size for name in ("global_size", "local_size") if (size := getattr(resolution, name)) is not None}
        gram = resolution.gram_size or self.gram_size
        return self.model_copy(update={"views": self.views.model_copy(update=sizes), "gram_size": gram, "resolutions": ()})

    @property
    @override
    def anchors(self) -> dict[str, str | None]:
        """Source of the Gram anchor's weights, if the loss uses one."""
        return {"gram": self.gram_weights} if self.gram_weight else {}

    @model_validator(mode="after")
    def _check_targets(self) -> Self:
        if self.target_batch == "micro" and self.centering != "sinkhorn_knopp":
            raise ValueError("target_batch: micro needs centering: sinkhorn_knopp; a running centre is the global batch's")
        return self

    @property
    def last_layer_freeze(self) -> Length:
        """Time for which the prototype layer is frozen."""
        return self.freeze_last_layer
