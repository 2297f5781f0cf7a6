"""Schema of the configuration: one tree of frozen pydantic models. Each field documents its meaning, unit and limits.

Each section is in the ``settings.py`` of the package that uses it; each method's settings are in its folder below
:mod:`pipeline.methods`. None of these modules imports torch. :mod:`pipeline.config.load` reads YAML and overrides;
:mod:`pipeline.config.validate` has the checks across sections.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, SerializeAsAny

from pipeline.checkpoint.settings import CheckpointSettings
from pipeline.config.types import (
    RUNTIME,
    Settings,
)
from pipeline.config.upgrade import upgrade
from pipeline.data.settings import DataSettings
from pipeline.evaluation.settings import EvaluationSettings
from pipeline.methods.dinov2.settings import Dinov2Settings
from pipeline.methods.settings import REGISTERED, MethodSettings
from pipeline.methods.shared.guidance_settings import GuidanceSettings
from pipeline.models.settings import ModelSettings
from pipeline.runtime.notify_settings import NotifySettings
from pipeline.runtime.settings import LaunchSettings, RunSettings, WatchdogSettings
from pipeline.tracking.settings import TrackingSettings
from pipeline.training.settings import OptimSettings, ScheduleSettings, TrainSettings
from pipeline.weights.settings import AdaptSettings, InitSettings


def _methods() -> dict[str, type[MethodSettings]]:
    """Returns the settings class of every method by name: of all folders below ``pipeline/methods`` with a ``settings.py``."""
    folder = Path(__file__).resolve().parents[1] / "methods"
    for file in sorted(folder.glob("*/settings.py")):
        importlib.import_module(f"pipeline.methods.{file.parent.name}.settings")
    return dict(sorted(REGISTERED.items()))


METHODS = _methods()


def _beside(pattern: str) -> str:
    """Returns the pattern of validation shards beside a pattern of training shards, or in a directory of them."""
    folder, _, name = pattern.rstrip("/").rpartition("/")
    if not name.endswith(".tar") and not re.search(r"[{*?\[]", name):
        folder = pattern.rstrip("/")
    if re.search(r"[{*?]", folder):
        folder = re.split(r"[{*?]", folder)[0].rpartition("/")[0]
    return f"{folder}/*val-*.tar" if folder else "*val-*.tar"


def _known_method(value: object) -> object:
    name = value.get("name") if isinstance(value, dict) else None
    if isinstance(name, str) and name in METHODS:
        return METHODS[name].model_validate(value)
    return value


class Config(Settings):
    """The whole configuration. ``method`` is an instance of the class registered under ``method.name``."""

    run: RunSettings = Field(default=RunSettings(), description="name, directory and seed of the run")
    method: Annotated[SerializeAsAny[MethodSettings], BeforeValidator(_known_method)] = Field(
        default=Dinov2Settings(), description="the pretraining method"
    )
    model: ModelSettings = Field(description="the vision encoder")
    init_from: InitSettings = Field(default=InitSettings(), description="pretrained weights that a new run starts from")
    adapt: AdaptSettings = Field(
        default=AdaptSettings(), description="how a tower with pretrained weights is trained on (`fovea adapt`)"
    )
    guidance: GuidanceSettings = Field(default=GuidanceSettings(), description="guidance by columns of the samples' JSON")
    data: DataSettings = Field(description="training data")
    optim: OptimSettings = Field(default=OptimSettings(), description="the optimizer")
    schedule: ScheduleSettings = Field(
        default=ScheduleSettings(), description="schedules of learning rate, weight decay and the like"
    )
    train: TrainSettings = Field(default=TrainSettings(), description="the training loop")
    checkpoint: CheckpointSettings = Field(
        default=CheckpointSettings(), json_schema_extra=RUNTIME, description="checkpoints and resuming"
    )
    tracking: TrackingSettings = Field(default=TrackingSettings(), json_schema_extra=RUNTIME, description="logging to MLflow")
    evaluation: EvaluationSettings = Field(
        default=EvaluationSettings(), json_schema_extra=RUNTIME, description="evaluations during training"
    )
    launch: LaunchSettings = Field(default=LaunchSettings(), json_schema_extra=RUNTIME, description="how ranks are started")
    watchdog: WatchdogSettings = Field(
        default=WatchdogSettings(),
        json_schema_extra=RUNTIME,
        description="hang detection and rollback",
    )
    notify: NotifySettings = Field(
        default=NotifySettings(), json_schema_extra=RUNTIME, description="notifications about the end of the run"
    )

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        """Validates settings as a run stores them, including those of earlier versions."""
        return super().model_validate(upgrade(obj) if isinstance(obj, dict) else obj, **options)

    @property
    def voting_shards(self) -> tuple[str, ...]:
        """Patterns of the shards whose labels vote in the k-NN evaluation."""
        return self.evaluation.knn.train_shards or self.data.patterns

    @property
    def validation_shards(self) -> tuple[str, ...]:
        """Patterns of the validation shards; ``*val-*.tar`` beside the training shards if none are named."""
        return self.evaluation.knn.val_shards or (_beside(self.data.patterns[0]),)

    def replace(self, **sections: Any) -> Self:
        """Returns a copy with whole sections replaced. The copy is not validated again (:mod:`pipeline.config.validate`)."""
        return self.model_copy(update=sections)
