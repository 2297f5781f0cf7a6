"""Every setting of a run: one tree of frozen pydantic models. Each field carries its meaning, its unit and its limits.

Each section is in the ``settings.py`` of the room that uses it, each method's own in its folder below :mod:`pipeline.methods`.
Nothing here or there imports torch. YAML and overrides are read by :mod:`pipeline.config.load`; checks that span several sections
are in :mod:`pipeline.config.validate`.
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
from pipeline.models.settings import ModelSettings
from pipeline.runtime.settings import HealthSettings, LaunchSettings, RunSettings
from pipeline.tracking.settings import TrackingSettings
from pipeline.training.settings import OptimSettings, ScheduleSettings, TrainSettings
from pipeline.weights.settings import InitSettings


def _methods() -> dict[str, type[MethodSettings]]:
    """Settings of every method by its name: of all folders below ``pipeline/methods`` with a ``settings.py``."""
    folder = Path(__file__).resolve().parents[1] / "methods"
    for file in sorted(folder.glob("*/settings.py")):
        importlib.import_module(f"pipeline.methods.{file.parent.name}.settings")
    return dict(sorted(REGISTERED.items()))


METHODS = _methods()


def _beside(pattern: str) -> str:
    """The pattern of validation shards beside a pattern of training shards, or in a folder of them."""
    folder, _, name = pattern.rstrip("/").rpartition("/")
    if not name.endswith(".tar") and not re.search(r"[{*?\[]", name):
        folder = pattern.rstrip("/")
    if re.search(r"[{*?]", folder):
        folder = re.split(r"[{*?]", folder)[0].rpartition("/")[0]
    return f"{folder}/*val-*.tar" if folder else "*val-*.tar"


def _known_method(value: object) -> object:
    if isinstance(value, dict) and value.get("name") in METHODS:
        return METHODS[value["name"]].model_validate(value)
    return value


class Config(Settings):
    """The whole tree. ``method`` holds the class registered under ``method.name``."""

    run: RunSettings = Field(default=RunSettings(), description="which run this is")
    method: Annotated[SerializeAsAny[MethodSettings], BeforeValidator(_known_method)] = Field(
        default=Dinov2Settings(), description="the method"
    )
    model: ModelSettings = Field(description="the vision tower")
    init_from: InitSettings = Field(default=InitSettings(), description="the weights a fresh run begins with")
    data: DataSettings = Field(description="where samples come from")
    optim: OptimSettings = Field(default=OptimSettings(), description="the optimizer")
    schedule: ScheduleSettings = Field(default=ScheduleSettings(), description="what changes while a run goes on")
    train: TrainSettings = Field(default=TrainSettings(), description="the loop")
    checkpoint: CheckpointSettings = Field(
        default=CheckpointSettings(), json_schema_extra=RUNTIME, description="what is saved and resumed"
    )
    tracking: TrackingSettings = Field(
        default=TrackingSettings(), json_schema_extra=RUNTIME, description="what is told to MLflow"
    )
    evaluation: EvaluationSettings = Field(
        default=EvaluationSettings(), json_schema_extra=RUNTIME, description="what the weights are worth"
    )
    launch: LaunchSettings = Field(default=LaunchSettings(), json_schema_extra=RUNTIME, description="how ranks are started")
    watchdog: HealthSettings = Field(
        default=HealthSettings(),
        json_schema_extra=RUNTIME,
        description="stalled ranks and broken losses",
    )

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        """Reads settings as a run keeps them, those of earlier versions included."""
        return super().model_validate(upgrade(obj) if isinstance(obj, dict) else obj, **options)

    @property
    def voting_shards(self) -> tuple[str, ...]:
        """Patterns of the shards whose labels vote in the k-NN evaluation."""
        return self.evaluation.knn.train_shards or self.data.patterns

    @property
    def validation_shards(self) -> tuple[str, ...]:
        """Patterns of the shards that evaluations judge; ``*val-*.tar`` beside the training shards if none are named."""
        return self.evaluation.knn.val_shards or (_beside(self.data.patterns[0]),)

    def replace(self, **sections: Any) -> Self:
        """A copy with whole sections exchanged. Not validated again (:mod:`pipeline.config.validate`)."""
        return self.model_copy(update=sections)
