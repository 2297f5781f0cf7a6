"""Builds the training step of any config, without a baseline."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.bench.pairs import Contest
from pipeline.bench.prove.batches import moved, random_batch
from pipeline.config.schema import Config
from pipeline.data.augment.views import Batch
from pipeline.methods.base import Method, Step
from pipeline.methods.registry import build_seeded_method
from pipeline.models.text import TextBlock
from pipeline.models.vision import VisionTower
from pipeline.training.build import engine_options
from pipeline.training.compilation import networks_of
from pipeline.training.engine import Engine

_STILL = Step(teacher_temperature=0.07, momentum=1.0)  # learning rate 0: every round is the same step


def training_step(config: Config, device: torch.device) -> tuple[Method, Callable[[Batch], Tensor]]:
    """A config's method, and a function that takes one step of one micro-batch and returns the loss on the device.

    Args:
        config: its ``train.micro_batch_size`` is the number of samples.
        device: device of the weights and the batches.
    """
    assert config.train.micro_batch_size is not None
    method = build_seeded_method(config, device).train()
    engine = Engine(method, engine_options(config, config.train.micro_batch_size, 1), device)

    def advance(batch: Batch) -> Tensor:
        engine.before_accumulation([batch], _STILL)
        terms = torch.stack(list(engine.forward_backward(batch, _STILL).values()))
        engine.step(_STILL, terms.isfinite().all())
        method.after_step(_STILL)
        return terms.detach().sum()

    return method, advance


def contest(config: Config, device: torch.device) -> Contest:
    """Steps on one random micro-batch, whose blocks may be compiled afterwards.

    Args:
        config: its ``train.micro_batch_size`` is the number of samples.
        device: device of the weights and the batch.
    """
    method, advance = training_step(config, device)
    samples = config.train.micro_batch_size or 1
    batch = moved(random_batch(method.views, samples, method.text, seed=1), device)
    modules = [module for root in networks_of(method) for module in root.modules()]
    blocks = [block for module in modules if isinstance(module, VisionTower) for block in module.vit.blocks]
    blocks += [module for module in modules if isinstance(module, TextBlock)]
    views = " and ".join(f"{view.count} of {view.size}" for view in method.views)
    about = f"{config.run.name}, {samples} samples, crops: {views} pixels"
    return Contest(lambda: float(advance(batch)), None, blocks, None, about)
