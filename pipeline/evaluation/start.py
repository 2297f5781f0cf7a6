"""Compares an adapted network with the one it began with: scores at weights between both, and how much each layer has changed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.checkpoint.files import Saved
from pipeline.config.schema import Config
from pipeline.errors import ConfigError
from pipeline.evaluation.base import evaluate_all
from pipeline.evaluation.features import all_gather_table, extract
from pipeline.evaluation.runner import Evaluators
from pipeline.models.eval_model import EvalModel
from pipeline.models.vision import VisionTower
from pipeline.runtime.process_group import World
from pipeline.weights.export.networks import read
from pipeline.weights.interpolate import between, start_tower


def compare_with_start(
    saved: Saved, config: Config, evaluators: Evaluators, world: World, shares: Sequence[float]
) -> dict[str, float]:
    """Scores by metric, the same on all ranks.

    Args:
        saved: the checkpoint.
        config: the run's settings.
        evaluators: those to apply at each point.
        world: this rank's position in the process group.
        shares: points between the start (0) and the checkpoint (1).

    Returns:
        ``between/<share>/<evaluator>/<metric>``, and for each block ``cka/block_<n>`` and ``cosine_to_start/block_<n>``: of the
        class token's features on the evaluated images, in the start and in the checkpoint.

    Raises:
        ConfigError: the run began with random weights, or has no vision transformer.
    """
    networks = read(saved, config=config)
    if not isinstance(networks.tower, VisionTower):
        raise ConfigError("the run has no vision transformer", where="model.timm_name", hint="Choose another run")
    start, end = start_tower(config), networks.tower
    p = networks.preprocessing

    def model_of(tower: VisionTower) -> EvalModel:
        return EvalModel(tower.to(world.device).requires_grad_(False), p.mean, p.std, config.train.precision)

    scores: dict[str, float] = {}
    for share in shares:
        at = evaluate_all(evaluators, model_of(between(start, end, share)))
        scores |= {f"between/{share:.2f}/{name}": value for name, value in at.items()}
    images = next(iter(evaluators.values())).data.queries
    pair = []
    for tower in (start, end):
        model = model_of(tower)
        table = extract(images, partial(_class_tokens, model), labelled=False)
        pair.append(all_gather_table(table, world.control).values)
    for block, (before, after) in enumerate(zip(pair[0].unbind(1), pair[1].unbind(1), strict=True)):
        scores[f"cka/block_{block:02d}"] = linear_cka(before, after)
        scores[f"cosine_to_start/block_{block:02d}"] = float(F.cosine_similarity(before.double(), after.double()).mean())
    return scores


def _class_tokens(model: EvalModel, images: Tensor) -> Tensor:
    """Features ``[n, blocks, width]``."""
    return model.layers(images, model.depth)[:, :, 0]


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear centred kernel alignment of two representations of the same images, 0 to 1 (Kornblith et al., arXiv 1905.00414).

    Args:
        x: ``[n, width]``.
        y: ``[n, other width]``.
    """
    a, b = x.double() - x.double().mean(0), y.double() - y.double().mean(0)
    cross = (b.T @ a).square().sum()
    return float(cross / ((a.T @ a).norm() * (b.T @ b).norm()).clamp(min=torch.finfo(torch.float64).tiny))
