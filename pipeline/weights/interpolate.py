"""Weights between the start of a run and its end (WiSE-FT, Wortsman et al., arXiv 2109.01903).

On the straight line from pretrained to adapted weights there are often networks that keep what the first knew and have what the
second learned. Adapters are merged first.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch

from pipeline.config.schema import Config
from pipeline.errors import ConfigError
from pipeline.methods.registry import build_method
from pipeline.models.vision import VisionTower
from pipeline.weights import init_from
from pipeline.weights.export.networks import Networks
from pipeline.weights.settings import AdaptSettings


def start_tower(config: Config) -> VisionTower:
    """The exported tower as a run begins with it, on the CPU.

    Raises:
        ConfigError: the run began with random weights, or has no vision transformer.
        CheckpointError: the weights that it began with are missing or do not fit.
    """
    if config.init_from.source is None:
        raise ConfigError(
            "the run began with random weights", where="init_from.source", hint="Choose a run that began with pretrained weights"
        )
    plain = config.replace(adapt=AdaptSettings())
    torch.manual_seed(config.run.seed)
    method = build_method(plain)
    init_from.begin(method, plain, record=False)
    tower = method.export()["backbone"]
    if not isinstance(tower, VisionTower):
        raise ConfigError("the run has no vision transformer", where="model.timm_name", hint="Choose another run")
    tower.merge_class_position()
    return tower.float().eval()


@torch.no_grad()
def between(start: VisionTower, end: VisionTower, share: float) -> VisionTower:
    """A tower with the weights ``start + share * (end - start)``; both must have merged adapters."""
    tower = copy.deepcopy(end)
    begun = dict(start.named_parameters())
    for name, parameter in tower.named_parameters():
        parameter.copy_(torch.lerp(begun[name].to(parameter), parameter, share))
    return tower


def interpolated(networks: Networks, share: float) -> Networks:
    """Networks to export whose vision tower is this share of the way from the run's start; other networks stay as they are.

    Raises:
        ConfigError: as :func:`start_tower`, or the tower is a ResNet.
    """
    return replace(networks, tower=between(start_tower(networks.config), networks.transformer, share))
