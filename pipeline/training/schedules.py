"""Schedules (learning rate, weight decay, teacher momentum and temperature) as functions of the samples seen.

Lengths are in samples, so that another world size or batch size does not shift the curves. Values at whole steps equal those of
the per-iteration tables of DINO and DINOv2 (``linspace`` warm-up with both end points, then a half cosine that reaches its end
one step after the last) or, as ``cosine_to_last``, those of DINOv3 (a warm-up that reaches its peak one step after its last, then
a half cosine that reaches its end on the last step).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Self

from pipeline.config.schema import Config
from pipeline.data.inputs import check_warmups
from pipeline.errors import ConfigError
from pipeline.methods.base import Step
from pipeline.training.settings import CurveSettings


@dataclass(frozen=True)
class Curve:
    """A linear warm-up from ``start`` to ``peak``, then a decay to ``end``.

    Attributes:
        start: value at sample 0 (unused without warm-up).
        peak: value at the end of the warm-up; reached on its last step and held on the next.
        end: value at ``length`` and beyond.
        warmup: length of the warm-up, samples.
        length: length of the whole curve, samples.
        shape: decay from ``peak`` to ``end``: half a cosine, DINOv3's ``cosine_to_last``, linear, or ``constant`` (stays at
            ``peak``).
        stair: samples of an epoch if the value changes only between epochs; 0 if it changes with each step.

    Raises:
        ConfigError: a negative length, or a warm-up longer than the curve.
    """

    start: float
    peak: float
    end: float
    warmup: int = 0
    length: int = 0
    shape: Literal["cosine", "cosine_to_last", "linear", "constant"] = "cosine"
    stair: int = 0

    def __post_init__(self) -> None:
        if self.warmup < 0 or self.length < 0 or (self.shape != "constant" and self.warmup > self.length):
            raise ConfigError(
                f"the warm-up of {self.warmup} samples is longer than the curve of {self.length}",
                hint="Make the warm-up shorter or the run longer",
            )

    def at(self, samples_seen: int, global_batch: int) -> float:
        """Value for the step that begins after ``samples_seen`` samples.

        Args:
            samples_seen: samples consumed before the step.
            global_batch: samples per step; the warm-up is complete on its last step, not one later.
        """
        if self.stair:  # the epoch then takes the role of the step
            samples_seen, global_batch = samples_seen - samples_seen % self.stair, self.stair
        if samples_seen < self.warmup:
            warmup_samples = self.warmup - (0 if self.shape == "cosine_to_last" else global_batch)
            share = min(samples_seen / warmup_samples, 1.0) if warmup_samples > 0 else 0.0
            return self.start + (self.peak - self.start) * share
        if self.shape == "constant":
            return self.peak
        if samples_seen >= self.length:
            return self.end
        rest = self.length - self.warmup
        if self.shape == "cosine_to_last":
            rest = max(rest - global_batch, 1)
        share = min((samples_seen - self.warmup) / rest, 1.0)
        if self.shape == "linear":
            return self.peak + (self.end - self.peak) * share
        return self.end + 0.5 * (self.peak - self.end) * (1.0 + math.cos(math.pi * share))


def constant(value: float) -> Curve:
    """A constant curve."""
    return Curve(start=value, peak=value, end=value, shape="constant")


@dataclass(frozen=True)
class Schedules:
    """All schedules of a run.

    Attributes:
        global_batch: samples per step, over all ranks and micro-batches.
        epoch_samples: samples of the training set.
        lr: learning rate.
        weight_decay: weight decay.
        momentum: the teacher's momentum.
        teacher_temperature: temperature of the teacher's targets.
        last_layer_freeze: samples during which groups marked ``last_layer`` have learning rate 0.
        backbone_freeze: samples during which groups marked ``backbone`` have learning rate 0; it then rises linearly to the
            others' over the length of the learning rate's warm-up.
    """

    global_batch: int
    epoch_samples: int
    lr: Curve
    weight_decay: Curve
    momentum: Curve = constant(1.0)  # noqa: RUF009 - frozen
    teacher_temperature: Curve = constant(0.07)  # noqa: RUF009 - frozen
    last_layer_freeze: int = 0
    backbone_freeze: int = 0

    @classmethod
    def from_config(cls, config: Config, *, epoch_samples: int) -> Self:
        """Build the schedules of a config over the optimizer steps of its run; an epoch's incomplete last batch counts as a step.

        Args:
            config: the run's settings.
            epoch_samples: samples of the training set.

        Raises:
            ConfigError: a warm-up longer than the run.
        """
        batch, schedule = config.train.global_batch_size, config.schedule
        check_warmups(config, epoch_samples)
        length = config.train.duration.steps(epoch_samples, batch) * batch

        def curve(start: float, peak: float, end: float, rest: CurveSettings) -> Curve:
            warmup = rest.warmup.samples(epoch_samples, batch)
            return Curve(start, peak, end, warmup, length, rest.shape, epoch_samples if rest.per_epoch else 0)

        def plain(s: CurveSettings) -> Curve:
            peak = s.start if s.peak is None else s.peak
            return curve(s.start, peak, peak if s.end is None else s.end, s)

        return cls(
            global_batch=batch,
            epoch_samples=epoch_samples,
            lr=curve(schedule.lr.start, config.optim.lr_scaling.scaled(schedule.lr.peak, batch), schedule.lr.end, schedule.lr),
            weight_decay=plain(schedule.weight_decay),
            momentum=plain(schedule.teacher_momentum),
            teacher_temperature=plain(schedule.teacher_temperature),
            last_layer_freeze=config.method.last_layer_freeze.samples(epoch_samples, batch),
            backbone_freeze=config.adapt.freeze_backbone.samples(epoch_samples, batch),
        )

    def at(self, samples_seen: int) -> Step:
        """Values for the step that begins after ``samples_seen`` samples."""
        lr = self.lr.at(samples_seen, self.global_batch)
        return Step(
            index=samples_seen // self.global_batch,
            samples_seen=samples_seen,
            epoch=samples_seen / self.epoch_samples,
            lr=lr,
            last_layer_lr=0.0 if samples_seen < self.last_layer_freeze else lr,
            weight_decay=self.weight_decay.at(samples_seen, self.global_batch),
            momentum=self.momentum.at(samples_seen, self.global_batch),
            teacher_temperature=self.teacher_temperature.at(samples_seen, self.global_batch),
            backbone_share=self._backbone_share(samples_seen),
        )

    def _backbone_share(self, samples_seen: int) -> float:
        """0 while the tower is frozen, 1 from a warm-up later on."""
        after = samples_seen - self.backbone_freeze
        if not self.backbone_freeze:
            return 1.0
        return min((after + self.global_batch) / (self.lr.warmup + self.global_batch), 1.0) if after >= 0 else 0.0
