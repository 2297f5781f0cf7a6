"""The methods at the sizes at which they are run on stand-in devices: ViT-B/16, larger, or ResNet-50."""

from __future__ import annotations

_VIT_B = ("model.embed_dim=768", "model.num_heads=12")
# 16 samples a rank: what is launched does not depend on it, and masks and plans take less time.
BATCH = "train.global_batch_size=128"
METHODS: dict[str, tuple[str, ...]] = {
    "dinov2": ("dinov2/vitl16_short", "train.micro_batch_size=16"),
    "clip": ("clip/vit_b16_cc12m",),
    "siglip": ("clip/siglip_b16",),
    "detailclip": ("detailclip/vit_b16_25ep",),
    "dino": ("dino/vit_s16", *_VIT_B),
    "coca": ("coca/vit_b32", "model.patch_size=16"),
    "simvlm": ("simvlm/scenes", *_VIT_B, "model.depth=12", "model.patch_size=16", "method.views.global_size=224"),
    "lejepa": ("lejepa/vit_s16", *_VIT_B),
    "mocov3": ("mocov3/vit_s16", *_VIT_B),
    "simclr": ("simclr/resnet50",),
    "mocov2": ("mocov2/resnet50",),
    "byol": ("byol/resnet50",),
    # A smaller teacher than its ViT-g, and not ZeRO 3, which compares the ranks' numbers before each forward pass.
    "distill": (
        *("dinov2/distill_vits14", "train.micro_batch_size=16", "train.zero_stage=1"),
        "method.teacher_model={embed_dim: 1024, depth: 24, num_heads: 16, patch_size: 14}",
    ),
}
