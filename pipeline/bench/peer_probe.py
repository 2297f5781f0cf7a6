"""Trains one method in a plain loop of lightly's modules, in a process of its own: ``python peer_probe.py JSON``.

Heads, losses, momentum updates and transforms are lightly's, put together as its examples do. Backbone, rates, schedules, batch
and number of samples are those of a config of fovea, and so is the k-NN with which features are compared. Images are read from a
folder, as lightly does.
"""

from __future__ import annotations

import copy
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from pipeline.config.load import load
from pipeline.config.schema import Config
from pipeline.evaluation.knn import knn_accuracy
from pipeline.methods.shared.crops import NORMALIZE
from pipeline.models.resnet import build_trunk
from pipeline.training.schedules import Schedules


@dataclass(frozen=True)
class Loop:
    """A method that is trained.

    Attributes:
        loss: loss of a batch's views at a learning rate's step; ``progress`` is the share of the run that is done.
        parameters: modules whose parameters are trained, with a factor on their learning rate.
        after: called after each step with the teacher's momentum.
        compared: the backbone whose features are compared.
        clip: largest norm of a gradient, or ``None``.
        frozen: layers that are not trained in the first steps.
    """

    loss: Callable[[Sequence[Tensor]], Tensor]
    parameters: Sequence[tuple[nn.Module, float]]
    after: Callable[[float], None]
    compared: nn.Module
    clip: float | None = None
    frozen: nn.Module | None = None


class Backbone(nn.Module):
    """The config's tower: the pooled feature of ``[batch, 3, side, side]``."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.tower = build_trunk(config.model, image_size=config.method.views.global_size)
        self.width = self.tower.width

    def forward(self, images: Tensor) -> Tensor:
        """Features ``[batch, width]``."""
        return self.tower(images, patches="none").cls


def main() -> None:
    """Run as JSON on the command line says; prints what was measured as JSON."""
    options = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    config = load(options["config"], options["settings"]).config
    print(json.dumps(train(config, Path(options["folder"]), options["steps"], options["every"], options["seed"])))


def train(config: Config, folder: Path, steps: int, every: int, seed: int) -> dict[str, Any]:
    """Train, and compare features every so many steps; with ``every`` 0 never.

    Args:
        config: rates, schedules, batch, backbone and views.
        folder: with ``train`` and ``val``, each a folder of images by class.
        steps: number of steps.
        every: steps between two comparisons.
        seed: of weights, order and views.

    Returns:
        ``cpu``: CPU seconds of the steps; ``knn``: accuracy in 0..1 by samples seen.
    """
    torch.manual_seed(seed)
    loop = _LOOPS[config.method.name](config)
    batches = _batches(config, folder / "train", steps, seed)
    images = len(list((folder / "train").glob("*/*")))
    batch = config.train.global_batch_size
    schedules = Schedules.from_config(config, epoch_samples=images)
    optimizer = _optimizer(loop, config)
    frozen = schedules.last_layer_freeze
    points: dict[int, float] = {}
    if every:
        points[0] = _accuracy(loop.compared, config, folder)
    cpu = 0.0
    for step in range(steps):
        begun, seen = time.process_time(), step * batch
        views = next(batches)
        rate, decay = schedules.lr.at(seen, batch), schedules.weight_decay.at(seen, batch)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["factor"]
            group["weight_decay"] = decay if group["decays"] else 0.0
        with torch.autocast("cpu", torch.bfloat16, enabled=config.train.precision == "bf16"):
            loss = loop.loss(views)
        optimizer.zero_grad()
        loss.backward()
        if loop.frozen is not None and seen < frozen:
            for parameter in loop.frozen.parameters():
                parameter.grad = None
        if loop.clip is not None:
            nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], loop.clip)
        optimizer.step()
        loop.after(schedules.momentum.at(seen, batch))
        cpu += time.process_time() - begun
        if every and ((step + 1) % every == 0 or step + 1 == steps):
            points[(step + 1) * batch] = _accuracy(loop.compared, config, folder)
    return {"cpu": cpu, "knn": points}


def _simclr(config: Config) -> Loop:
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead

    s: Any = config.method
    backbone = Backbone(config)
    head = SimCLRProjectionHead(backbone.width, s.head_hidden, s.head_out, num_layers=s.head_layers)
    criterion = NTXentLoss(temperature=s.temperature)

    def loss(views: Sequence[Tensor]) -> Tensor:
        one, other = (head(backbone(view)) for view in views)
        return criterion(one, other)

    return Loop(loss, [(backbone, 1.0), (head, 1.0)], lambda _: None, backbone)


def _byol(config: Config) -> Loop:
    from lightly.loss import NegativeCosineSimilarity
    from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum

    s: Any = config.method
    backbone = Backbone(config)
    projection = BYOLProjectionHead(backbone.width, s.head_hidden, s.head_out)
    prediction = BYOLPredictionHead(s.head_out, s.head_hidden, s.head_out)
    teacher, target = copy.deepcopy(backbone), copy.deepcopy(projection)
    deactivate_requires_grad(teacher)
    deactivate_requires_grad(target)
    criterion = NegativeCosineSimilarity()

    def loss(views: Sequence[Tensor]) -> Tensor:
        predicted = [prediction(projection(backbone(view))) for view in views]
        with torch.no_grad():
            targets = [target(teacher(view)) for view in views]
        return 0.5 * (criterion(predicted[0], targets[1]) + criterion(predicted[1], targets[0]))

    def after(momentum: float) -> None:
        update_momentum(backbone, teacher, m=momentum)
        update_momentum(projection, target, m=momentum)

    return Loop(loss, [(backbone, 1.0), (projection, 1.0), (prediction, s.predictor_lr_mult)], after, backbone)


def _mocov2(config: Config) -> Loop:
    from lightly.loss import NTXentLoss
    from lightly.models.modules import MoCoProjectionHead
    from lightly.models.utils import batch_shuffle, batch_unshuffle, deactivate_requires_grad, update_momentum

    s: Any = config.method
    backbone = Backbone(config)
    head = MoCoProjectionHead(backbone.width, s.head_hidden, s.head_out, batch_norm=s.head_norm == "batch")
    teacher, target = copy.deepcopy(backbone), copy.deepcopy(head)
    deactivate_requires_grad(teacher)
    deactivate_requires_grad(target)
    criterion = NTXentLoss(temperature=s.temperature, memory_bank_size=(s.queue, s.head_out))

    def loss(views: Sequence[Tensor]) -> Tensor:
        query = head(backbone(views[0]))
        with torch.no_grad():
            shuffled, order = batch_shuffle(views[1])
            key = batch_unshuffle(target(teacher(shuffled)), order)
        return criterion(query, key)

    def after(momentum: float) -> None:
        update_momentum(backbone, teacher, m=momentum)
        update_momentum(head, target, m=momentum)

    return Loop(loss, [(backbone, 1.0), (head, 1.0)], after, backbone)


def _dino(config: Config) -> Loop:
    from lightly.loss import DINOLoss
    from lightly.models.modules import DINOProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum

    s: Any = config.method
    temperature = config.schedule.teacher_temperature.start
    backbone = Backbone(config)
    sizes = (backbone.width, s.head_hidden, s.head_bottleneck, s.prototypes)
    head, target = (DINOProjectionHead(*sizes, batch_norm=s.head_norm == "batch") for _ in range(2))
    target.load_state_dict(head.state_dict())  # weight_norm cannot be copied
    teacher = copy.deepcopy(backbone)
    deactivate_requires_grad(teacher)
    deactivate_requires_grad(target)
    criterion = DINOLoss(s.prototypes, temperature, temperature, 1, s.student_temperature, s.center_momentum)

    def loss(views: Sequence[Tensor]) -> Tensor:
        with torch.no_grad():
            targets = [target(teacher(view)).float() for view in views[:2]]
        return criterion(targets, [head(backbone(view)).float() for view in views], epoch=0)

    def after(momentum: float) -> None:
        update_momentum(backbone, teacher, m=momentum)
        update_momentum(head, target, m=momentum)

    return Loop(loss, [(backbone, 1.0), (head, 1.0)], after, teacher, clip=s.clip_norm, frozen=head.last_layer)


_LOOPS: dict[str, Callable[[Config], Loop]] = {"simclr": _simclr, "byol": _byol, "mocov2": _mocov2, "dino": _dino}
METHODS = tuple(_LOOPS)


def _optimizer(loop: Loop, config: Config) -> torch.optim.Optimizer:
    from lightly.models.utils import get_weight_decay_parameters

    groups = []
    for module, factor in loop.parameters:
        for parameters, decays in zip(get_weight_decay_parameters([module]), (True, False), strict=True):
            trained = [parameter for parameter in parameters if parameter.requires_grad]
            if trained:
                groups.append({"params": trained, "factor": factor, "decays": decays})
    return torch.optim.AdamW(groups, lr=0.0, betas=config.optim.betas, eps=config.optim.eps)


def _batches(config: Config, folder: Path, steps: int, seed: int) -> Iterator[list[Tensor]]:
    from lightly.data import LightlyDataset

    draw = torch.Generator().manual_seed(seed)
    loader = torch.utils.data.DataLoader(
        LightlyDataset(str(folder), transform=_transform(config)),
        batch_size=config.train.global_batch_size,
        shuffle=True,
        drop_last=True,
        generator=draw,
    )
    while True:
        for views, *_ in loader:
            yield views


def _transform(config: Config) -> Any:
    from lightly.transforms import DINOTransform, SimCLRTransform

    views: Any = config.method.views
    augment = config.method.augment
    colours = {
        "cj_prob": augment.jitter_probability,
        "cj_strength": 1.0,
        "cj_bright": augment.brightness,
        "cj_contrast": augment.contrast,
        "cj_sat": augment.saturation,
        "cj_hue": augment.hue_shift,
        "random_gray_scale": augment.gray_probability,
        "hf_prob": augment.flip_probability,
    }
    mean, std = _normalization(config)
    constants = {"mean": mean, "std": std}
    if views.local_count == 0:
        low = views.global_scale[0]
        return SimCLRTransform(input_size=views.global_size, min_scale=low, gaussian_blur=0.0, normalize=constants, **colours)
    return DINOTransform(
        global_crop_size=views.global_size,
        global_crop_scale=views.global_scale,
        local_crop_size=views.local_size,
        local_crop_scale=views.local_scale,
        n_local_views=views.local_count,
        gaussian_blur=(0.0, 0.0, 0.0),
        solarization_prob=0.0,
        normalize=constants,
        **colours,
    )


def _normalization(config: Config) -> tuple[list[float], list[float]]:
    constants = NORMALIZE[config.method.augment.normalize]
    return list(constants.mean), list(constants.std)


@torch.no_grad()
def _accuracy(backbone: nn.Module, config: Config, folder: Path) -> float:
    """k-NN accuracy as fovea's evaluation has it: the same numbers of voters and queries, images at their own size."""
    knn = config.evaluation.knn
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in _normalization(config))
    training = backbone.training
    backbone.eval()
    features, labels = [], []
    for part, most in (("train", knn.max_train), ("val", knn.max_val)):
        files = sorted((folder / part).glob("*/*"), key=lambda file: file.name)
        count = min(most or len(files), len(files))
        chosen = [files[math.floor(i * len(files) / count)] for i in range(count)]
        stored = [torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1) for file in chosen]
        values = [(torch.stack(stored[i : i + 250]).float() / 255 - mean) / std for i in range(0, count, 250)]
        features.append(torch.cat([backbone(images).float() for images in values]))
        labels.append(torch.tensor([int(file.parent.name) for file in chosen]))
    backbone.train(training)
    k = max(knn.k)
    accuracy = knn_accuracy(features[1], labels[1], features[0], labels[0], ks=(k,), temperature=knn.temperature)
    return accuracy[k]


if __name__ == "__main__":
    main()
