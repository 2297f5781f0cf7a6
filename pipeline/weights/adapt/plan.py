"""Chooses the settings with which pretrained weights are trained on new images, each with its reason.

What papers and released code prescribe is taken from them; what they leave open for sets of a few hundred to a few hundred
thousand images is fovea's own choice, and is called so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.config.schema import Config
from pipeline.config.sizes import shortest_side
from pipeline.config.types import Length
from pipeline.errors import ConfigError, DataError
from pipeline.weights.adapt.columns import Guides
from pipeline.weights.adapt.describe import Described

LEAST_IMAGES = 128
_EPOCHS, _LEAST_SAMPLES, _MOST_SAMPLES = 60, 20_000, 2_000_000
_LARGEST_VIEW = 224  # pixels
_QUARTER = 0.25
_SMALL = 8_000_000  # parameters of a tower whose batch needs no division
_PAPER = "arXiv 2304.07193"
_OURS = "fovea's choice"


@dataclass(frozen=True)
class Images:
    """What is known of the images.

    Attributes:
        patterns: the shards, absolute.
        count: number of usable samples.
        gray: whether all inspected ones have a single channel.
        validation: whether they are labelled and labelled validation shards are beside them.
    """

    patterns: tuple[str, ...]
    count: int
    gray: bool = False
    validation: bool = False


@dataclass(frozen=True)
class Replay:
    """Old shards that are shown along with the new ones.

    Attributes:
        patterns: the shards, absolute.
        share: of all samples, between 0 and 1.
    """

    patterns: tuple[str, ...]
    share: float


@dataclass(frozen=True)
class Plan:
    """Settings of a run.

    Attributes:
        settings: the sections of a configuration.
        reasons: why, by dotted key.
        freeze: samples for which the tower is frozen.
    """

    settings: dict[str, Any]
    reasons: dict[str, str]
    freeze: int


def make_plan(
    weights: Described,
    images: Images,
    *,
    name: str,
    directory: str,
    source: str,
    train: str = "all",
    guides: Guides | None = None,
    own: Mapping[str, Any] | None = None,
    replay: Replay | None = None,
) -> Plan:
    """Chooses the settings.

    Args:
        weights: where training starts.
        images: what it is trained on.
        name: name of the run.
        directory: its directory, absolute.
        source: the weights, absolute.
        train: part of the tower that is trained, as in ``adapt.train``.
        guides: columns of metadata that guide the run.
        own: sections with the user's own settings, valid; what is chosen follows their length, batch and size of views.
        replay: old shards, and how many of the samples are theirs.

    Raises:
        DataError: there are too few images.
    """
    count = images.count
    if count < LEAST_IMAGES:
        raise DataError(
            f"{count} images are too few to train on: with fewer than {LEAST_IMAGES} every batch shows the same ones",
            where=", ".join(images.patterns),
            hint=f"Add images until there are {LEAST_IMAGES}, or evaluate the weights as they are: fovea eval WEIGHTS --knn …",
        )
    reasons = dict(weights.architecture.reasons)
    settings: dict[str, Any] = {
        "run": {"name": name, "directory": directory},
        "model": dict(weights.architecture.model),
        "init_from": {"source": source, **({"heads": True} if weights.method is not None else {})},
        "data": _data(images, replay, reasons),
    }
    of_user = _section(own, "train")
    batch = int(of_user.get("global_batch_size", _batch(count)))
    epoch = count if replay is None else round(count / (1 - replay.share))  # samples until each new one was shown
    samples = min(max(_EPOCHS * epoch, _LEAST_SAMPLES), max(_MOST_SAMPLES, epoch))
    steps = max(Length.parse(of_user.get("duration", samples)).steps(epoch, batch), 1)
    settings["train"] = {"global_batch_size": batch, "duration": f"{steps} steps"}
    reasons["train.global_batch_size"] = f"32 batches in an epoch of {count} images, but 32 to 256 images each; {_OURS}"
    reasons["train.duration"] = f"{samples / epoch:.3g} epochs: {_EPOCHS}, but 20 thousand to 2 million samples; {_OURS}"
    if weights.parameters > _SMALL and batch > 8 and batch % 8 == 0:
        settings["train"]["micro_batch_size"] = batch // 8
        reasons["train.micro_batch_size"] = f"memory, and up to eight ranks give the same run; {_OURS}"
    warm = max(steps // 10, 1)
    micro = of_user.get("micro_batch_size", settings["train"].get("micro_batch_size"))
    settings["method"] = _method(weights, images, micro, warm, _section(_section(own, "method"), "views"), reasons)
    freeze = 0 if weights.method is not None else warm
    settings["adapt"] = _adapt(weights, train, settings["method"], reasons)
    if freeze:
        settings["adapt"]["freeze_backbone"] = f"{freeze} steps"
    if freeze:
        reasons["adapt.freeze_backbone"] = (
            f"the heads are new: for the first {freeze * batch} samples only they are trained; then the tower's rate rises "
            "over as many (as LP-FT, arXiv 2202.10054)"
        )
    if guides is not None:
        settings["guidance"] = {"columns": guides.columns}
        reasons["guidance.columns"] = guides.reason
    settings |= _schedules(steps, warm, weights.run, reasons)
    every = f"{max(steps // 5, 1)} steps"
    settings["checkpoint"] = {"every": every}
    if images.validation:
        own_voters = {"train_shards": list(images.patterns)} if replay is not None else {}
        settings["evaluation"] = {"knn": {"enabled": True, "every": every, **own_voters}}
        reasons["evaluation.knn.enabled"] = "the shards are labelled, and val-*.tar are beside them"
    return Plan(settings, reasons, freeze * batch)


def _data(images: Images, replay: Replay | None, reasons: dict[str, str]) -> dict[str, Any]:
    if replay is None:
        return {"shards": list(images.patterns)}
    reasons["data.sources"] = (
        f"{replay.share:.0%} of the samples are old ones, so that less is forgotten (replay, as in arXiv 1811.11682)"
    )
    new = {"name": "new", "shards": list(images.patterns), "weight": round(1 - replay.share, 6)}
    return {"sources": [new, {"name": "replayed", "shards": list(replay.patterns), "weight": round(replay.share, 6)}]}


def _adapt(weights: Described, train: str, method: dict[str, Any], reasons: dict[str, str]) -> dict[str, Any]:
    """What is trained, and at which share of the heads' rate."""
    if train == "lora":
        method["layerwise_lr_decay"] = 1.0
        reasons["method.layerwise_lr_decay"] = "adapters begin at zero and are trained at one rate (LoRA, arXiv 2106.09685)"
        reasons["adapt.backbone_lr_mult"] = f"adapters begin at zero, like heads they need the rate of a new run; {_OURS}"
        reasons["adapt.lora.rank"] = "arXiv 2106.09685, section 7.2: ranks from 1 to 8 are enough there"
        return {"train": "lora", "lora": {"rank": 8, "alpha": 16.0}, "backbone_lr_mult": 1.0}
    share = 0.1 if weights.run is None else 1.0
    reasons["adapt.backbone_lr_mult"] = f"new heads need the rate of a new run, pretrained blocks less; {_OURS}"
    if weights.run is not None:
        reasons["adapt.backbone_lr_mult"] = "heads and tower are of one run"
    if train == "last_blocks":
        depth = int(weights.architecture.model.get("depth") or 12)
        reasons["adapt.last_blocks"] = f"a third of {depth}; {_OURS}"
        return {"train": "last_blocks", "last_blocks": max(depth // 3, 1), "backbone_lr_mult": share}
    return {"backbone_lr_mult": share}


def _batch(count: int) -> int:
    """A power of two from 32 to 256, about a thirty-second of the images."""
    return min(max(1 << (max(count // 32, 1).bit_length() - 1), 32), 256)


def _section(settings: Mapping[str, Any] | None, name: str) -> Mapping[str, Any]:
    section = (settings or {}).get(name)
    return section if isinstance(section, dict) else {}


def _method(
    weights: Described, images: Images, micro: int | None, warm: int, views: Mapping[str, Any], reasons: dict[str, str]
) -> dict[str, Any]:
    """DINOv2's settings: those of the weights' own run, or of a new head; ``views`` are the user's own."""
    if weights.method is not None:
        own = weights.method.model_dump(mode="json", exclude_defaults=True)
        own |= {"name": "dinov2", "freeze_last_layer": f"{warm} steps"}
        reasons["method"] = "the settings and heads of the run that the weights are from"
        return own
    patch, native = _patch_of(weights), shortest_side(weights.architecture.image_size)
    side = max(min(native, _LARGEST_VIEW) // patch, 2) * patch
    size = views.get("global_size", side)
    seen = size if isinstance(size, int) else shortest_side(tuple(size))
    local = max(round(seen * 3 / 7 / patch), 1) * patch
    reasons["method.views.global_size"] += f", at most {_LARGEST_VIEW}" if native > side else ""
    reasons["method.views.local_size"] = f"three sevenths of it, as 96 or 98 of 224 ({_PAPER}, table 17)"
    reasons["method.views.local_count"] = f"half of the paper's eight, for time; {_OURS}"
    prototypes = 1024 if images.count < 10_000 else 8192 if images.count < 200_000 else 65536
    reasons["method.prototypes"] = f"65536 in {_PAPER} for 142 million images; fewer for fewer; {_OURS}"
    reasons["method.layerwise_lr_decay"] = f"0.9 in the code of {_PAPER}; lower blocks change less"
    reasons["method.freeze_last_layer"] = "the prototypes begin with the rest of the heads, while the tower is frozen"
    chosen: dict[str, Any] = {
        "name": "dinov2",
        "views": {"global_size": side, "local_count": 4, "local_size": local},
        "augment": {"normalize": weights.architecture.normalize},
        "prototypes": prototypes,
        "head_hidden": min(2048, 4 * _width_of(weights)),
        "layerwise_lr_decay": 0.9,
        "freeze_last_layer": "0 steps",
    }
    if images.gray:
        chosen["augment"] |= {"hue_space": "off", "saturation": 0.0, "gray_probability": 0.0}
        reasons["method.augment.hue_space"] = "the images are gray: a change of colour would show what the data never have"
    if micro is not None and micro > 1:
        chosen["koleo_group_size"] = micro
        reasons["method.koleo_group_size"] = "a micro-batch, so that the loss does not depend on the number of ranks"
    return chosen


def _schedules(steps: int, warm: int, run: Config | None, reasons: dict[str, str]) -> dict[str, Any]:
    momentum = round(min(max(1 - 10 / steps, 0.95), 0.994), 4)
    reasons["schedule.lr.peak"] = f"of the heads; a tenth of it for the tower's last block; {_OURS}"
    reasons["schedule.teacher_momentum.start"] = f"0.994 in {_PAPER} for 125 thousand steps; faster in shorter runs; {_OURS}"
    reasons["schedule.teacher_temperature.start"] = f"where {_PAPER} begins; a short run does not reach the end of its rise"
    peak, temperature, decay = 1e-3, 0.04, 0.04
    if run is not None:
        schedule = run.schedule
        scaled = run.optim.lr_scaling.scaled(schedule.lr.peak, run.train.global_batch_size)
        peak = float(f"{_QUARTER * scaled:.3g}")
        warmed = schedule.teacher_temperature
        temperature = warmed.start if warmed.peak is None else warmed.peak
        decay = schedule.weight_decay.start
        reasons["schedule.lr.peak"] = f"a quarter of that of the run that the weights are from; {_OURS}"
        reasons["schedule.teacher_temperature.start"] = "where that run ended"
        reasons["schedule.weight_decay.start"] = "where that run began"
    return {
        "optim": {"lr_scaling": {"rule": "none"}},
        "schedule": {
            "lr": {"peak": peak, "end": 1e-6, "warmup": f"{warm} steps"},
            "weight_decay": {"start": decay, "end": decay},
            "teacher_momentum": {"start": momentum, "end": 1.0},
            "teacher_temperature": {"start": temperature},
        },
    }


def _patch_of(weights: Described) -> int:
    from pipeline.models.settings import ModelSettings

    side = ModelSettings.model_validate(weights.architecture.model).patch_side
    if side is None:
        raise ConfigError("the patch side is unknown", where="--from", hint="Give the weights as a file")
    return side


def _width_of(weights: Described) -> int:
    return int(weights.architecture.model.get("embed_dim") or 512)


def check_length(config: Any, count: int) -> None:
    """Refuses a run in which new heads would never train the tower.

    Raises:
        ConfigError: the tower is frozen for the whole run.
    """
    batch = config.train.global_batch_size
    length = config.train.duration.samples(count, batch)
    frozen: Length = config.adapt.freeze_backbone
    if frozen.samples(count, batch) >= length:
        raise ConfigError(
            f"the tower is frozen for {frozen}, and the run ends after {config.train.duration}",
            where="adapt.freeze_backbone",
            hint="Make train.duration longer, or adapt.freeze_backbone shorter",
        )
