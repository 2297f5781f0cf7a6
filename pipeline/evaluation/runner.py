"""Runs the evaluations of a run on schedule, within a budget of the training time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.config.schema import Config
from pipeline.data.augment.views import Normalize
from pipeline.data.index.manifest import Manifest
from pipeline.data.inputs import Inputs, open_storage
from pipeline.data.loader.reader import Reader
from pipeline.data.loader.text import tokenizer
from pipeline.errors import CheckpointError, ConfigError
from pipeline.evaluation.attention import with_attention
from pipeline.evaluation.linear import LinearProbe, LogisticRegression
from pipeline.evaluation.online import OnlineKnn, Pictures, raw_pixels
from pipeline.evaluation.pairs import Retrieval, ZeroShot
from pipeline.evaluation.principal import sheet
from pipeline.evaluation.robustness import Robustness
from pipeline.evaluation.segmentation import Segmentation, places
from pipeline.evaluation.sheets import Finding, attention_sheet
from pipeline.evaluation.zeroshot import SIMPLE
from pipeline.methods.base import Method
from pipeline.methods.shared.contrastive import Contrastive
from pipeline.models.eval_model import EvalModel, preserve_rng_and_mode
from pipeline.runtime.process_group import World

_DRAWN = 8  # images per sheet
_SEARCHED = 128  # images searched for the nearest
Show = Callable[[int, str, NDArray[np.uint8]], None]
Evaluator = Callable[[EvalModel], dict[str, float]]


def lines(file: Path, *, what: str, place: str = "") -> list[str]:
    """The non-empty lines of a text file.

    Args:
        file: the file.
        what: its meaning, for messages.
        place: text that every line has to contain.

    Raises:
        ConfigError: the file cannot be read or is empty, or a line lacks ``place``.
    """
    try:
        found = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the {what} cannot be read ({error})", where=str(file), hint="Name a text file.") from error
    if not found or any(place not in line for line in found):
        told = f", each with {place}" if place else ""
        raise ConfigError(f"no {what}", where=str(file), hint=f"Write one a line{told}.")
    return found


def eval_model_of(method: Method, config: Config, device: torch.device) -> EvalModel:
    """The network that a method exports, as the evaluators see it."""
    view = method.views[0]
    normalize = view.normalize or Normalize()
    tower: Any = method.export()["backbone"]
    if not isinstance(method, Contrastive) or method.text is None:
        return EvalModel(tower, normalize.mean, normalize.std, config.train.precision)
    numbers = tokenizer(method.text)

    def texts(sentences: list[str]) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision == "bf16"):
            return method.encode_texts(torch.from_numpy(numbers(sentences)).to(device))

    return EvalModel(tower, normalize.mean, normalize.std, config.train.precision, method.encode_images, texts)


@dataclass(frozen=True)
class EvalData:
    """Data sets of the evaluations, as found by :func:`pipeline.data.inputs.evaluation_data`.

    Attributes:
        bank, queries: labelled images to learn from and to evaluate.
        dense: the same with a class for each pixel.
    """

    bank: Manifest | None = None
    queries: Manifest | None = None
    dense: tuple[Manifest, Manifest] | None = None


def build_evaluators(
    config: Config, inputs: EvalData | Inputs, world: World, *, size: int, normalize: Normalize
) -> tuple[dict[str, Evaluator], OnlineKnn | None]:
    """The enabled evaluators by name, and the k-NN itself, which also evaluates raw pixels.

    Args:
        config: the settings.
        inputs: the data sets they need.
        world: this rank's position in the process group.
        size: side of the images where the settings do not set one.
        normalize: mean and standard deviation of the images.

    Raises:
        ConfigError: a file of names cannot be read.
    """
    e, group, store = config.evaluation, world.control, open_storage(config)

    def pictures(manifest: Manifest | None, most: int | None, side: int, batch: int, place: float = 0.5) -> Pictures:
        if manifest is None:
            raise CheckpointError("evaluation without data", where="evaluation")
        return Pictures(
            manifest,
            size=side,
            normalize=normalize,
            most=most,
            batch=batch,
            place=place,
            rank=world.rank,
            world=world.size,
            device=world.device,
            store=store,
        )

    found: dict[str, Evaluator] = {}
    knn: OnlineKnn | None = None
    if e.labelled:
        side = e.knn.image_size or size
        bank = pictures(inputs.bank, e.knn.max_train, side, e.knn.batch_size)
        queries = pictures(inputs.queries, e.knn.max_val, side, e.knn.batch_size)
    if e.knn.enabled:
        knn = OnlineKnn(bank, queries, ks=e.knn.k, temperature=e.knn.temperature, group=group)
        found["knn"] = _nearest(knn)
    if e.linear.enabled:
        li = e.linear
        found["linear"] = LinearProbe(
            bank,
            queries,
            rates=li.learning_rates,
            layers=li.layers,
            epochs=li.epochs,
            batch=li.batch_size,
            hold_out=li.validation_fraction,
            group=group,
        )
    if e.logistic.enabled:
        lo = e.logistic
        found["logistic"] = LogisticRegression(
            bank, queries, costs=lo.C, iterations=lo.max_iter, hold_out=lo.validation_fraction, group=group
        )
    if e.segmentation.enabled and inputs.dense is not None:
        s = e.segmentation
        readers = [Reader(m, wants=("segmentation",), checksum=False, store=store) for m in inputs.dense]
        found["segmentation"] = Segmentation(
            pictures(inputs.dense[0], s.max_train, s.image_size or size, s.batch_size),
            pictures(inputs.dense[1], s.max_val, s.image_size or size, s.batch_size),
            (readers[0], readers[1]),
            size=s.image_size or size,
            classes=s.num_classes or 0,
            ignore=s.ignore_index,
            names=s.class_names,
            rates=s.learning_rates,
            epochs=s.epochs,
            batch=s.batch_size,
            hold_out=s.validation_fraction,
            windows={
                place: pictures(inputs.dense[1], s.max_val, s.image_size or size, s.batch_size, place)
                for place in (places(inputs.dense[1]) if s.sliding_window else ())
            },
            group=group,
        )
    if e.zeroshot.enabled:
        names = lines(e.zeroshot.class_names, what="class names") if e.zeroshot.class_names else []
        given = lines(e.zeroshot.templates, what="sentences", place="{}") if e.zeroshot.templates else SIMPLE
        found["zeroshot"] = ZeroShot(queries, names, templates=given, group=group)
    if e.retrieval.enabled and inputs.queries is not None:
        reader = Reader(inputs.queries, wants=("caption",), checksum=False, store=store)
        found["retrieval"] = Retrieval(queries, reader, merge=e.retrieval.merge_equal_captions, group=group)
    if e.robustness.enabled:
        r = e.robustness
        found["robustness"] = Robustness(bank, queries, budget=r.epsilon, epochs=r.epochs, k=r.k, group=group)
    return found, knn


def _nearest(knn: OnlineKnn) -> Evaluator:
    def judge(subject: EvalModel) -> dict[str, float]:
        return {f"knn/k{k}": value for k, value in knn(subject.cls).items()}

    return judge


class Evaluations:
    """All evaluations of a run, called at step 0 and then at the configured intervals.

    The network at step 0 and raw pixels are evaluated once, by the same code: under the name ``start`` if the network was
    initialized with pretrained weights, else ``untrained``. Random states and train/eval modes are restored afterwards.

    Args:
        config: the settings.
        inputs: the data sets.
        method: the method; the network that it exports is evaluated.
        world: this rank's position in the process group.
        fresh: whether step 0 is still to come.
        begun: whether the network was initialized with pretrained weights.
        show: receives each step's image sheets and their names, on the rank that has one.
    """

    def __init__(
        self,
        config: Config,
        inputs: Inputs,
        method: Method,
        world: World,
        fresh: bool,
        *,
        begun: bool = False,
        show: Show | None = None,
    ) -> None:
        e, view = config.evaluation, method.views[0]
        self._subject = eval_model_of(method, config, world.device)
        self._modules: list[nn.Module] = [method, *method.export().values()]
        self._evaluators, self._knn = build_evaluators(
            config, inputs, world, size=view.size, normalize=view.normalize or Normalize()
        )
        epoch, batch = inputs.order.samples_per_epoch, config.train.global_batch_size
        self._every = {name: every.steps(epoch, batch) for name, every in e.enabled.items()}
        self._last = config.train.duration.steps(epoch, batch)
        self._first, self._before = fresh and e.knn.baselines, "start" if begun else "untrained"
        self._budget, self._world = e.max_time_percent, world
        self._spent, self._took = 0.0, dict.fromkeys(self._evaluators, 0.0)
        self._waiting: set[str] = set()
        self._show = show
        shown = inputs.queries or (inputs.dense[1] if inputs.dense else None)
        self._pictures = self._finding = None
        if e.log_images and shown is not None:
            drawn = partial(
                Pictures,
                shown,
                size=e.knn.image_size or view.size,
                normalize=view.normalize or Normalize(),
                device=world.device,
                store=open_storage(config),
            )
            self._pictures = drawn(most=_DRAWN, batch=_DRAWN, rank=0, world=1)  # all ranks use the same few images
            reader = Reader(shown, wants=("caption",), checksum=False, store=open_storage(config))
            searched = drawn(most=_SEARCHED, batch=min(e.knn.batch_size, _SEARCHED), rank=world.rank, world=world.size)
            self._finding = Finding(searched, reader, group=world.control)

    def __call__(self, step: int = 0, seconds: float = 0.0) -> dict[str, float]:
        """Scores of the evaluations that are due, by metric name, the same on all ranks.

        Args:
            step: steps done.
            seconds: training time so far, without evaluations; the time budget refers to it.
        """
        due = self._due(step, seconds)
        scores: dict[str, float] = {}
        with preserve_rng_and_mode(self._modules):
            for name in due:
                begin = time.perf_counter()
                found = self._evaluators[name](self._subject)
                if self._first:
                    found |= self._baselines(name, found)
                scores |= found
                self._took[name] = time.perf_counter() - begin
                self._spent += self._took[name]
            if due and self._pictures is not None and self._finding is not None:
                begin = time.perf_counter()
                self._draw(step, self._pictures, self._finding)
                self._spent += time.perf_counter() - begin
        self._first = False
        return scores

    @torch.inference_mode()
    def _draw(self, step: int, pictures: Pictures, finding: Finding) -> None:
        """Draw the image sheets of a step; all ranks make the same forward passes, at most one uses the results."""
        shown = next(iter(pictures.shown()), None)
        images = pictures.blank() if shown is None else shown.images
        tokens, attention = with_attention(self._subject, images)
        found = finding(self._subject)
        if self._show is None:
            return
        mean, std = self._subject.mean, self._subject.std
        self._show(step, "pca", sheet(images, tokens.patches, mean=mean, std=std))
        if attention is not None:
            self._show(step, "attention", attention_sheet(images, attention, mean=mean, std=std))
        if found is not None:
            self._show(step, *found)

    def _baselines(self, name: str, found: dict[str, float]) -> dict[str, float]:
        """The scores renamed as those of a baseline, and those of raw pixels."""
        if name != "knn" or self._knn is None:
            return {f"{self._before}/{key}": value for key, value in found.items()}
        pixels = {f"pixels/k{k}": value for k, value in self._knn(raw_pixels).items()}
        return {key.replace("knn", self._before): value for key, value in found.items()} | pixels

    def _due(self, step: int, seconds: float) -> list[str]:
        """The evaluations that are due. Rank 0 decides for all ranks, since their clocks differ."""
        chosen: list[list[str]] = [[]]
        for name, every in self._every.items():
            if step % every == 0 or step >= self._last:
                self._waiting.add(name)
        if self._world.rank == 0:
            left = float("inf") if self._budget is None else self._budget / 100 * seconds - self._spent
            free = step == 0 or step >= self._last
            for name in self._every:
                if name in self._waiting and (free or self._took[name] <= left):
                    chosen[0].append(name)
                    left -= self._took[name]
        dist.broadcast_object_list(chosen, src=0, group=self._world.control)
        self._waiting -= set(chosen[0])
        return chosen[0]
