"""Extracts the networks to export from a checkpoint, whole, in fp32, on the CPU, with their metadata."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import nn

from pipeline.checkpoint.files import Saved, verify
from pipeline.config.schema import Config
from pipeline.config.sizes import Size, is_divisible, shortest_side, size_text
from pipeline.data.augment.views import Normalize
from pipeline.errors import CheckpointError, ConfigError
from pipeline.methods.registry import build_method
from pipeline.models.lora import merge_lora
from pipeline.models.resnet import ResNetTower, Tower
from pipeline.models.text import LogitScale, TextTower
from pipeline.models.vision import VisionTower
from pipeline.weights.from_checkpoint import fill_trained

Network = Literal["auto", "teacher", "student"]


@dataclass(frozen=True)
class Preprocessing:
    """Image preprocessing of a network: the largest centred box of the aspect ratio of ``size``, times ``centre``, resized to it.

    Attributes:
        size: side of a square, or height and width, in pixels.
        centre: sides of the box as a fraction of the largest one's.
        mean, std: normalization, as fractions of full intensity.
        interpolation: resize interpolation.
        channels: names of the channels; empty for red, green and blue.
        dtype: type of the values whose full range is one; float32 values are used as they are.
    """

    size: Size
    mean: tuple[float, ...]
    std: tuple[float, ...]
    centre: float = 1.0
    interpolation: str = "bicubic"
    channels: tuple[str, ...] = ()
    dtype: str = "uint8"

    @property
    def count(self) -> int:
        """Number of channels."""
        return len(self.channels) or 3

    def document(self) -> dict[str, Any]:
        """All of it for JSON; channels and type only where they are not 8-bit RGB."""
        document = asdict(self)
        if not self.channels:
            del document["channels"], document["dtype"]
        return document


@dataclass(frozen=True)
class Networks:
    """Input of an export.

    Attributes:
        config: the run's configuration.
        saved: the checkpoint.
        network: whether the weights are the teacher's or the student's.
        tower: the vision tower.
        others: all other exported networks by the method's names (``text``, ``image_projection``, …).
        logits: scale and bias of an image-text method.
        preprocessing: image preprocessing.
    """

    config: Config
    saved: Saved
    network: Literal["teacher", "student"]
    tower: Tower
    others: dict[str, nn.Module]
    logits: LogitScale | None
    preprocessing: Preprocessing

    @property
    def text(self) -> TextTower | None:
        """The text tower, if there is one."""
        tower = self.others.get("text")
        return tower if isinstance(tower, TextTower) else None

    @property
    def timm_model(self) -> nn.Module:
        """The vision tower's model of timm."""
        model: nn.Module = self.tower.net if isinstance(self.tower, ResNetTower) else self.tower.vit
        return model

    @property
    def transformer(self) -> VisionTower:
        """The vision tower, for formats of transformers only.

        Raises:
            ConfigError: it is a ResNet.
        """
        if isinstance(self.tower, ResNetTower):
            raise ConfigError(
                "the format is for vision transformers, and this is a ResNet",
                where="--to",
                hint="Export it to timm, onnx or safetensors",
            )
        if self.preprocessing.channels:
            raise ConfigError(
                f"the format is for RGB images, and these have {self.preprocessing.count} channels",
                where="--to",
                hint="Export it to timm, onnx or safetensors",
            )
        if not isinstance(self.preprocessing.size, int):
            raise ConfigError(
                f"the format is for square images, and these have {size_text(self.preprocessing.size)} pixels",
                where="--to",
                hint="Export it to timm, onnx or safetensors, or give a side with --size",
            )
        return self.tower

    @property
    def side(self) -> int:
        """Side of the images in pixels, for formats of square images, see :meth:`transformer`."""
        return shortest_side(self.preprocessing.size)

    def state(self) -> dict[str, torch.Tensor]:
        """All tensors, fp32, by network: ``backbone.vit.…`` (of a ResNet ``backbone.net.…``), ``text.…``, ``logits.…``."""
        modules: dict[str, nn.Module] = {"backbone": self.tower, **self.others}
        if self.logits is not None:
            modules["logits"] = self.logits
        return {
            f"{name}.{inner}": tensor.detach().float().contiguous()
            for name, module in modules.items()
            for inner, tensor in module.state_dict().items()
        }


def settings_of(saved: Saved) -> Config:
    """The configuration that a checkpoint was written with.

    Raises:
        CheckpointError: it is missing, or of another version of fovea.
    """
    try:
        return Config.model_validate(saved.manifest["config"])
    except (KeyError, ValidationError) as error:
        problem = "are not in it" if isinstance(error, KeyError) else f"are not understood ({error.error_count()} problems)"
        raise CheckpointError(
            f"the settings of this checkpoint {problem}",
            where=str(saved.path),
            hint="Use the version of fovea that wrote it",
        ) from error


def read(
    saved: Saved,
    *,
    network: Network = "auto",
    size: Size | None = None,
    config: Config | None = None,
    student: str | None = None,
) -> Networks:
    """Reads the networks from a checkpoint of any ZeRO stage and world size.

    Args:
        saved: the checkpoint; its files' checksums are verified.
        network: the teacher's or the student's; ``auto`` is the method's own choice.
        size: side, or height and width, in pixels of the images the tower will be used on; default is the training size.
        config: the configuration, if it should not be read from the checkpoint.
        student: name of one of several jointly trained students; default is the one that ``model`` describes.

    Raises:
        CheckpointError: the checkpoint is damaged, or of another architecture.
        ConfigError: the method has no teacher, no such student or no vision tower, or the size is not a multiple of the patch.
    """
    verify(saved)
    config = settings_of(saved) if config is None else config
    torch.manual_seed(config.run.seed)
    method = build_method(config)
    fill_trained(method, saved, student=network == "student")
    method.eval()
    exported = method.export()
    tower = exported.pop("backbone", None)
    if student is not None:
        named = method.students(slow=network != "student")
        if student not in named:
            hint = f"Choose one of {', '.join(named)}" if named else "Leave it out: the method trains one tower"
            raise ConfigError(f"there is no student {student!r}", where="--student", hint=hint)
        tower = named[student]
    students = {id(module) for module in method.modules()}
    if not isinstance(tower, Tower):
        raise ConfigError(f"{config.method.name} has no vision tower to export", where="method.name", hint="Export another run")
    own: Literal["teacher", "student"] = "student" if id(tower) in students else "teacher"
    if network == "teacher" and own != "teacher":
        raise ConfigError(f"{config.method.name} has no teacher", where="--network", hint="Export the student")
    if network == "student" and own == "teacher":
        tower = method.get_submodule("backbone")
        if not isinstance(tower, Tower):
            raise ConfigError("the student has no vision tower", where="--network", hint="Export the teacher")
        own = "student"
    view = method.views[0]
    side = size or view.size
    if isinstance(tower, VisionTower) and not is_divisible(side, tower.patch):
        raise ConfigError(
            f"images of {size_text(side)} pixels are not divisible into patches of {tower.patch}",
            where="--size",
            hint=f"Choose a multiple of {tower.patch}",
        )
    if isinstance(tower, VisionTower):
        tower.merge_class_position()
        merge_lora(tower)
    normalize = view.normalize or Normalize()
    logits = getattr(method, "logits", None)
    return Networks(
        config=config,
        saved=saved,
        network=own,
        tower=tower.float().eval(),
        others={name: module.float().eval() for name, module in exported.items()},
        logits=logits if isinstance(logits, LogitScale) else None,
        preprocessing=Preprocessing(
            side,
            normalize.mean,
            normalize.std,
            channels=view.channels.names if view.channels is not None else (),
            dtype=view.channels.dtype if view.channels is not None else "uint8",
        ),
    )


def meta(config: Config) -> dict[str, Any]:
    """The settings for a model card: everything needed to repeat the run."""
    tree = config.model_dump(mode="json")
    chosen = {name: tree[name] for name in ("method", "model", "optim", "schedule", "train")}
    channels = tree["data"]["channels"]
    return chosen if channels is None else {**chosen, "channels": channels}
