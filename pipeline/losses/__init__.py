"""Losses and targets: pure functions of tensors, computed in fp32 whatever the input dtype."""

from pipeline.losses.centering import batch_center, centered_targets, global_mean, moved_center
from pipeline.losses.contrastive import clip_loss, gathered, rank_offset, siglip_loss
from pipeline.losses.distill import cross_entropy, masked_patches, multi_crop
from pipeline.losses.gram import gram, resampled_patches
from pipeline.losses.guidance import correlation_ratio, dependence, value_cross_entropy, value_sums
from pipeline.losses.health import effective_rank, spread
from pipeline.losses.koleo import koleo, koleo_across_ranks
from pipeline.losses.pairs import (
    cosine_regression,
    info_nce,
    momentum_contrast,
    nt_xent,
    queue_contrast,
    repulsion,
    same_or_not,
)
from pipeline.losses.preservation import feature_distance
from pipeline.losses.prototypes import (
    SAME_VIEW,
    Kernels,
    Pairing,
    Products,
    Targets,
    TargetStatistics,
    kernels_for,
    logit_chunks,
    multi_crop_pairings,
    prototype_cross_entropy,
    rows_per_chunk,
)
from pipeline.losses.sigreg import random_directions, sigreg
from pipeline.losses.sinkhorn import potential_over_chunks, sinkhorn, sinkhorn_potential
from pipeline.losses.tokens import mean_over_ranks, token_cross_entropy

__all__ = [
    "SAME_VIEW",
    "Kernels",
    "Pairing",
    "Products",
    "TargetStatistics",
    "Targets",
    "batch_center",
    "centered_targets",
    "clip_loss",
    "correlation_ratio",
    "cosine_regression",
    "cross_entropy",
    "dependence",
    "effective_rank",
    "feature_distance",
    "gathered",
    "global_mean",
    "gram",
    "info_nce",
    "kernels_for",
    "koleo",
    "koleo_across_ranks",
    "logit_chunks",
    "masked_patches",
    "mean_over_ranks",
    "momentum_contrast",
    "moved_center",
    "multi_crop",
    "multi_crop_pairings",
    "nt_xent",
    "potential_over_chunks",
    "prototype_cross_entropy",
    "queue_contrast",
    "random_directions",
    "rank_offset",
    "repulsion",
    "resampled_patches",
    "rows_per_chunk",
    "same_or_not",
    "siglip_loss",
    "sigreg",
    "sinkhorn",
    "sinkhorn_potential",
    "spread",
    "token_cross_entropy",
    "value_cross_entropy",
    "value_sums",
]
