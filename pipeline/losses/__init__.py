"""Losses and targets: pure functions of tensors, in fp32 whatever comes in."""

from pipeline.losses.centering import batch_center, centered_targets, moved_center
from pipeline.losses.contrastive import clip_loss, gathered, place, siglip_loss
from pipeline.losses.distill import cross_entropy, masked_patches, multi_crop
from pipeline.losses.koleo import koleo
from pipeline.losses.sinkhorn import sinkhorn, sinkhorn_potential

__all__ = [
    "batch_center",
    "centered_targets",
    "clip_loss",
    "cross_entropy",
    "gathered",
    "koleo",
    "masked_patches",
    "moved_center",
    "multi_crop",
    "place",
    "siglip_loss",
    "sinkhorn",
    "sinkhorn_potential",
]
