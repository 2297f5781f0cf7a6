"""Runs the evaluations of a run on schedule, within a budget of the training time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.config.schema import Config
from pipeline.config.sizes import Size
from pipeline.data.augment.views import Normalize, channel_spec
from pipeline.data.index.manifest import Manifest
from pipeline.data.indexing import open_storage
from pipeline.data.inputs import Inputs
from pipeline.data.loader.text import tokenizer
from pipeline.errors import ConfigError
from pipeline.evaluation.attention import with_attention
from pipeline.evaluation.base import Evaluator, evaluator_class
from pipeline.evaluation.images import EvalData, ImageSet, Placement
from pipeline.evaluation.principal import sheet
from pipeline.evaluation.results import baseline_metric
from pipeline.evaluation.settings import EvaluatorSettings
from pipeline.evaluation.sheets import NearestImages, attention_sheet
from pipeline.methods.base import Method
from pipeline.methods.shared.contrastive import Contrastive
from pipeline.models.eval_model import EvalModel, preserve_rng_and_mode, uncompiled
from pipeline.runtime.process_group import World

_SHEET_IMAGES = 8  # images per sheet
_SEARCHED_IMAGES = 128  # images searched for the nearest
Show = Callable[[int, str, NDArray[np.uint8]], None]
Evaluators = dict[str, Evaluator[EvaluatorSettings]]


def eval_model_of(method: Method, config: Config, device: torch.device) -> EvalModel:
    """The network that a method exports, as the evaluators see it."""
    view = method.views[0]
    normalize = view.normalize or Normalize()
    shown = view.channels.composite if view.channels is not None else None
    tower: Any = method.export()["backbone"]
    if not isinstance(method, Contrastive) or method.text is None:
        return EvalModel(tower, normalize.mean, normalize.std, config.train.precision, composite=shown)
    tokenize = tokenizer(method.text)

    def texts(sentences: list[str]) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision == "bf16"):
            return method.encode_texts(torch.from_numpy(tokenize(sentences)).to(device))

    return EvalModel(tower, normalize.mean, normalize.std, config.train.precision, method.encode_images, texts, shown)


def evaluated_modules(method: Method) -> list[nn.Module]:
    """All modules that an evaluation of the method runs."""
    return [method, *method.export().values()]


def placement(config: Config, world: World, *, size: Size, normalize: Normalize | None) -> Placement:
    """Where and how this rank sees images.

    Args:
        config: the settings.
        world: this rank's position in the process group.
        size: side, or height and width, of the images where the settings do not set one.
        normalize: mean and standard deviation of the images; ImageNet's by default.
    """
    return Placement(
        size=size,
        rank=world.rank,
        world_size=world.size,
        device=world.device,
        normalize=normalize or Normalize(),
        channels=channel_spec(config.data.channels),
        store=open_storage(config),
        group=world.control,
    )


def check_channels(model: EvalModel, config: Config) -> None:
    """Refuses pretrained weights of other channels than those of the shards.

    Raises:
        ConfigError: with both numbers.
    """
    spec = channel_spec(config.data.channels)
    count, needed = 3 if spec is None else spec.count, len(model.mean)
    if count != needed:
        raise ConfigError(
            f"the weights read {needed} channels, and the images have {count}",
            where="data.channels",
            hint="Leave it out" if needed == 3 else f"Name the {needed} channels that the weights were trained on",
        )


def build_evaluators(
    config: Config,
    where: Placement,
    *,
    bank: Manifest | None = None,
    queries: Manifest | None = None,
    dense: tuple[Manifest, Manifest] | None = None,
) -> Evaluators:
    """The enabled evaluators by name.

    Args:
        config: the settings.
        where: of this rank.
        bank, queries, dense: the data sets they need, see :func:`pipeline.data.inputs.evaluation_data`.

    Raises:
        FoveaError: a file that an evaluator's settings name cannot be used.
    """
    settings = config.evaluation
    data = EvalData(where, settings.knn, bank=bank, queries=queries, class_maps=dense)
    return {name: evaluator_class(name)(settings.section(name), data) for name in settings.enabled}


class Evaluations:
    """All evaluations of a run, called at step 0 and then at the configured intervals.

    The network at step 0 and raw pixels are evaluated once, by the same code, as ``baseline/<baseline>/<metric>``: ``init_from``
    if the network was initialized with pretrained weights, else ``random_init``, and ``pixels``. Random states and train/eval
    modes are restored afterwards.

    Args:
        config: the settings.
        inputs: the data sets.
        method: the method; the network that it exports is evaluated.
        world: this rank's position in the process group.
        fresh: whether step 0 is still to come.
        show: receives each step's image sheets and their names, on the rank that has one.
    """

    def __init__(
        self, config: Config, inputs: Inputs, method: Method, world: World, fresh: bool, *, show: Show | None = None
    ) -> None:
        settings, view = config.evaluation, method.views[0]
        self._model, self._modules = eval_model_of(method, config, world.device), evaluated_modules(method)
        where = placement(config, world, size=view.size, normalize=view.normalize)
        self._evaluators = build_evaluators(config, where, bank=inputs.bank, queries=inputs.queries, dense=inputs.dense)
        epoch, batch = inputs.order.samples_per_epoch, config.train.global_batch_size
        self._every = {name: every.steps(epoch, batch) for name, every in settings.enabled.items()}
        self._last = config.train.duration.steps(epoch, batch)
        pause = config.train.pause_at
        self._pause = pause.steps(epoch, batch) if pause is not None else None
        self._baselines_due = fresh and settings.knn.baselines
        self._start = "random_init" if config.init_from.source is None else "init_from"
        self._max_time_percent, self._world = settings.max_time_percent, world
        self._total_seconds, self._last_seconds = 0.0, dict.fromkeys(self._evaluators, 0.0)
        self._waiting: set[str] = set()
        self._show = show
        self._sheets: tuple[ImageSet, NearestImages] | None = None
        manifest = inputs.queries or (inputs.dense[1] if inputs.dense else None)
        if settings.log_images and manifest is not None:
            size, batch_size = settings.knn.image_size, min(settings.knn.batch_size, _SEARCHED_IMAGES)
            alone = EvalData(replace(where, rank=0, world_size=1), settings.knn)  # all ranks use the same few images
            images = alone.images(manifest, size=size, limit=_SHEET_IMAGES, batch_size=_SHEET_IMAGES)
            shared = EvalData(where, settings.knn)
            searched = shared.images(manifest, size=size, limit=_SEARCHED_IMAGES, batch_size=batch_size)
            self._sheets = images, NearestImages(searched, group=world.control)

    def __call__(self, step: int = 0, seconds: float = 0.0) -> dict[str, float]:
        """Scores of the evaluations that are due, by metric, the same on all ranks.

        Args:
            step: steps done.
            seconds: training time so far, without evaluations; the time budget refers to it.
        """
        due = self._due(step, seconds)
        scores: dict[str, float] = {}
        # Compiled code is for the batch sizes of training; uncompiled, scores are also those of `fovea eval`.
        with preserve_rng_and_mode(self._modules), uncompiled(block for root in self._modules for block in root.modules()):
            for name in due:
                begin = time.perf_counter()
                scores |= self._score(name)
                self._last_seconds[name] = time.perf_counter() - begin
                self._total_seconds += self._last_seconds[name]
            if due and self._sheets is not None:
                begin = time.perf_counter()
                self._draw(step, *self._sheets)
                self._total_seconds += time.perf_counter() - begin
        self._baselines_due = False
        return scores

    def _score(self, name: str) -> dict[str, float]:
        evaluator = self._evaluators[name]
        scores = {f"{name}/{metric}": value for metric, value in evaluator(self._model).items()}
        if not self._baselines_due:
            return scores
        start = {baseline_metric(self._start, metric): value for metric, value in scores.items()}
        pixels = evaluator.raw_pixel_scores()
        return scores | start | {baseline_metric("pixels", f"{name}/{metric}"): value for metric, value in pixels.items()}

    @torch.inference_mode()
    def _draw(self, step: int, images: ImageSet, nearest: NearestImages) -> None:
        """Draw the image sheets of a step; all ranks make the same forward passes, at most one uses the results."""
        batch = next(iter(images), None)
        views = images.blank() if batch is None else batch.images
        tokens, attention = with_attention(self._model, views)
        neighbours = nearest(self._model)
        if self._show is None:
            return
        patch, mean, std, shown = self._model.tower.patch, self._model.mean, self._model.std, self._model.composite
        self._show(step, "pca", sheet(views, tokens.patches, patch=patch, mean=mean, std=std, shown=shown))
        if attention is not None:
            self._show(step, "attention", attention_sheet(views, attention, patch=patch, mean=mean, std=std, shown=shown))
        if neighbours is not None:
            self._show(step, *neighbours)

    def _due(self, step: int, seconds: float) -> list[str]:
        """The evaluations that are due. Rank 0 decides for all ranks, since their clocks differ."""
        due: list[list[str]] = [[]]
        for name, every in self._every.items():
            if step % every == 0 or step >= self._last or step == self._pause:
                self._waiting.add(name)
        if self._world.rank == 0:
            left = float("inf")
            if self._max_time_percent is not None:
                left = self._max_time_percent / 100 * seconds - self._total_seconds
            unlimited = step == 0 or step >= self._last or step == self._pause
            for name in self._every:
                if name in self._waiting and (unlimited or self._last_seconds[name] <= left):
                    due[0].append(name)
                    left -= self._last_seconds[name]
        dist.broadcast_object_list(due, src=0, group=self._world.control)
        self._waiting -= set(due[0])
        return due[0]
