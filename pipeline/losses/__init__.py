"""Losses and targets: pure functions of tensors, in fp32 whatever comes in."""

from pipeline.losses.centering import batch_center, centered_targets, moved_center
from pipeline.losses.distill import cross_entropy, masked_patches, multi_crop
from pipeline.losses.koleo import koleo
from pipeline.losses.sinkhorn import sinkhorn, sinkhorn_potential

__all__ = [
    "batch_center",
    "centered_targets",
    "cross_entropy",
    "koleo",
    "masked_patches",
    "moved_center",
    "multi_crop",
    "sinkhorn",
    "sinkhorn_potential",
]
