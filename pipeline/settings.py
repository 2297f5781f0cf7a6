"""Every setting of a run: one tree of frozen pydantic models. Each field carries its meaning, its unit and its limits.

Any floor may import this module: it needs pydantic and the standard library only. Loading YAML, merging, overrides and the
checks that span several sections are in :mod:`pipeline.config`.

Each method's own settings are in :mod:`pipeline.methods`, one file a method.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator
from pydantic_core import PydanticCustomError

from pipeline.errors import ConfigError
from pipeline.fields import (
    RUNTIME,
    Count,
    FilePath,
    Length,
    NonNegative,
    PathName,
    Positive,
    Probability,
    ResumePath,
    Settings,
    Shards,
    Texts,
    TrackingUri,
)
from pipeline.judges import EvaluationSettings
from pipeline.methods import RECIPES, Dinov2Settings, RecipeSettings
from pipeline.sections import HealthSettings, InitSettings, ModelSettings, SourceSettings, StorageSettings


class RunSettings(Settings):
    """Which run this is."""

    name: str = Field(
        default="run", pattern=r"^[A-Za-z0-9][\w.+-]*$", description="name of the run; the config file's name if not given"
    )
    directory: FilePath | None = Field(
        default=None, json_schema_extra=RUNTIME, description="folder of everything the run writes; null means runs/<name>"
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="seed of order, crops, masks and initial weights")

    @property
    def folder(self) -> Path:
        """The run's directory, resolved."""
        return self.directory if self.directory is not None else Path("runs") / self.name


class DataSettings(Settings):
    """Where samples come from and how they are read."""

    shards: Shards = Field(
        default=(),
        json_schema_extra=RUNTIME,
        description="training shards: a path or URL with {000..123} or *, or a list of them",
    )
    sources: tuple[SourceSettings, ...] | None = Field(
        default=None,
        json_schema_extra=RUNTIME,
        description="several data sets instead of shards, each with name, shards, and weight or repeat",
    )
    index: FilePath | None = Field(
        default=None, json_schema_extra=RUNTIME, description="folder of the shard index; null means the user's cache"
    )
    storage: StorageSettings = Field(
        default=StorageSettings(), json_schema_extra=RUNTIME, description="object storage and the node's cache"
    )
    lanes: Count | None = Field(default=None, description="shards read side by side; null chooses from the data set")
    block: Count = Field(default=16384, description="samples shuffled together")
    image: Texts = Field(
        default=("jpg", "jpeg", "png", "webp", "tif", "tiff", "bmp", "jp2", "ppm"),
        min_length=1,
        description="extensions of a sample's picture, the preferred one first",
    )
    caption: str = Field(default="txt", description="extension of a sample's caption")
    caption_lines: bool = Field(
        default=False, description="each line of a caption member is a caption, of which an epoch shows one"
    )
    missing_caption: Literal["exclude", "blank"] = Field(
        default="exclude", description="samples without a caption, where the method reads text: left out, or with an empty one"
    )
    label: str = Field(default="cls", description="extension of a sample's class number")
    min_side: Count = Field(default=16, description="smallest accepted side, pixels")
    max_pixels: Count = Field(default=50_000_000, description="largest accepted area, pixels")
    damaged: Literal["refuse", "use"] = Field(
        default="refuse", description="shards whose tar breaks off or is damaged: stop, or use the samples before the damage"
    )
    workers: int = Field(
        default=1, ge=0, le=64, json_schema_extra=RUNTIME, description="feeder processes of a rank; 0 reads in the rank itself"
    )
    decode_threads: int = Field(default=2, ge=1, le=256, json_schema_extra=RUNTIME, description="decoding threads of a rank")
    prefetch: int = Field(default=2, ge=1, le=64, json_schema_extra=RUNTIME, description="batches prepared ahead")
    bad_budget: Probability = Field(
        default=0.01, json_schema_extra=RUNTIME, description="share of unusable samples that stops the run"
    )
    bad_window: Count = Field(default=10_000, json_schema_extra=RUNTIME, description="samples over which bad_budget is counted")
    crc: bool = Field(
        default=True, json_schema_extra=RUNTIME, description="compare each picture's bytes with the index's checksum"
    )

    @model_validator(mode="after")
    def _one_or_the_other(self) -> Self:
        if not self.shards and self.sources is None:
            raise PydanticCustomError("shards", "is required")
        if self.shards and self.sources is not None:
            raise PydanticCustomError(
                "shards", "and data.sources are both given; give one of them (data.shards=[] takes it back)"
            )
        sources = self.sources or ()
        if self.sources is not None and not sources:
            raise PydanticCustomError("sources", "names no data set")
        if len({source.name for source in sources}) < len(sources):
            raise PydanticCustomError("sources", "has two data sets of one name")
        for source in sources:
            if source.weight is not None and source.repeat is not None:
                raise PydanticCustomError("sources", "gives {name} both weight and repeat", {"name": source.name})
            if (source.weight is None) != (sources[0].weight is None):
                raise PydanticCustomError("sources", "gives some data sets a weight and others none")
        return self

    @property
    def patterns(self) -> tuple[str, ...]:
        """Patterns of all training shards, of one data set or of several."""
        return self.shards or tuple(pattern for source in self.sources or () for pattern in source.shards)

    def index_folder(self, urls: Sequence[str]) -> Path:
        """Where the index of these shards is kept: a folder named after them in ``index`` or in the user's cache.

        Raises:
            ConfigError: there is no such cache, since the user has no home directory.
        """
        name = hashlib.sha256("\n".join(os.path.abspath(url) if "://" not in url else url for url in urls).encode()).hexdigest()
        return (self.index or _user_cache() / "fovea" / "index") / name[:16]


def _user_cache() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if cache.startswith("~"):  # a user ID without a name, as containers have, and no HOME
        raise ConfigError(
            f"user {os.getuid()} has no home directory for the index of the shards",
            where="data.index",
            hint="set it to a folder, or the variable XDG_CACHE_HOME",
        )
    return Path(cache)


class OptimSettings(Settings):
    """The optimizer."""

    name: Literal["adamw", "lamb", "lars", "sgd"] = Field(
        default="adamw",
        description="the optimizer; lars and sgd have their uses for convolutions with batch norm, not for transformers",
    )
    momentum: Probability = Field(default=0.9, description="LARS and SGD: share of the old velocity kept")
    trust: Positive = Field(default=1e-3, description="LARS: the trust coefficient eta")
    lr: Positive = Field(default=2e-4, description="base learning rate, before lr_rule")
    lr_rule: Literal["sqrt1024", "linear256", "none"] = Field(
        default="sqrt1024", description="peak rate: lr * sqrt(global batch / 1024), lr * global batch / 256, or lr"
    )
    betas: tuple[Probability, Probability] = Field(default=(0.9, 0.999), description="decay of the two moments")
    eps: Positive = Field(default=1e-8, description="added to the root of the second moment")

    def peak_lr(self, global_batch: int) -> float:
        """The learning rate after warm-up, for a global batch of so many samples."""
        factor = {"sqrt1024": (global_batch / 1024) ** 0.5, "linear256": global_batch / 256, "none": 1.0}
        return self.lr * factor[self.lr_rule]


class LearningRateCurve(Settings):
    """The learning rate over the run: a linear warm-up from ``start`` to the optimizer's peak, then ``shape`` to ``end``."""

    start: NonNegative = Field(default=0.0, description="learning rate at the first sample")
    end: NonNegative = Field(default=1e-6, description="learning rate at the last sample")
    warmup: Length = Field(default=Length(0), description="length of the rise from start to the peak")
    per_epoch: bool = Field(
        default=False,
        description="the value changes between epochs only, as in the code of MoCo v2 (learning rate), DINO and DetailCLIP "
        "(temperature of the teacher)",
    )
    shape: Literal["cosine", "cosine_to_last", "linear", "constant"] = Field(
        default="cosine",
        description="way from the peak to end; cosine_to_last is DINOv3's; constant stays at the peak",
    )


class Curve(Settings):
    """A value over the run: linear from ``start`` to ``peak`` during ``warmup``, then ``shape`` from ``peak`` to ``end``."""

    start: NonNegative = Field(description="value at the first sample")
    peak: NonNegative | None = Field(default=None, description="value after warm-up; null means start")
    end: NonNegative | None = Field(default=None, description="value at the last sample; null means the peak")
    warmup: Length = Field(default=Length(0), description="length of the way from start to peak")
    per_epoch: bool = Field(
        default=False,
        description="the value changes between epochs only, as in the code of MoCo v2 (learning rate), DINO and DetailCLIP "
        "(temperature of the teacher)",
    )
    shape: Literal["cosine", "cosine_to_last", "linear", "constant"] = Field(
        default="cosine",
        description="way from the peak to end; cosine_to_last is DINOv3's; constant stays at the peak",
    )


class ScheduleSettings(Settings):
    """What changes while a run goes on, all in samples seen."""

    lr: LearningRateCurve = Field(default=LearningRateCurve(), description="learning rate")
    weight_decay: Curve = Field(default=Curve(start=0.04, end=0.2), description="weight decay")
    momentum: Curve = Field(default=Curve(start=0.994, end=1.0), description="share of the old teacher kept each step")
    teacher_temperature: Curve = Field(
        default=Curve(start=0.04, peak=0.07, warmup=Length(37500, "steps"), shape="constant"),
        description="temperature of the teacher's targets",
    )


class TrainSettings(Settings):
    """The loop."""

    global_batch: Count = Field(default=1024, description="samples of one optimizer step over all ranks")
    micro_batch: Count | None = Field(
        default=None, description="samples of one forward pass of a rank; null means the rank's whole share"
    )
    length: Length = Field(default=Length(125_000, "steps"), description="length of the run")
    precision: Literal["fp32", "bf16"] = Field(
        default="bf16", description="number format of the student's forward and backward pass"
    )
    zero: Literal[0, 1, 2, 3] = Field(
        default=1,
        json_schema_extra=RUNTIME,
        description="DeepSpeed ZeRO stage: shard nothing (0), optimizer state (1), also gradients (2), also all weights (3)",
    )
    offload: Literal["none", "cpu"] = Field(
        default="none",
        json_schema_extra=RUNTIME,
        description="where AdamW works and keeps its fp32 state: on the GPU, or in host memory (12 bytes a parameter "
        "less on the GPUs, slower steps; stages 1 to 3)",
    )
    log_every: Count = Field(default=10, json_schema_extra=RUNTIME, description="steps between two logged lines")
    threads: Count | None = Field(
        default=None, json_schema_extra=RUNTIME, description="compute threads of a rank; null shares the cores out"
    )
    record_batches: bool = Field(
        default=False,
        json_schema_extra=RUNTIME,
        description="write every step's sample keys, pixel digest and terms of each rank to <run>/batches (slow; for audits)",
    )
    recompute: bool = Field(
        default=False,
        json_schema_extra=RUNTIME,
        description="activation checkpointing: forget a block's activations and compute them again (less memory, a third slower)",
    )
    compile: bool = Field(
        default=False, json_schema_extra=RUNTIME, description="torch.compile each transformer block; needs a C++ compiler on CPU"
    )
    graphs: bool = Field(
        default=False,
        json_schema_extra=RUNTIME,
        description="with train.compile: replay the compiled blocks as CUDA graphs, for small models whose steps are mostly "
        "launches; takes memory of its own; ZeRO stages 0 to 2, one micro-batch, without recompute; not yet run on a GPU",
    )
    fp8: Literal["off", "teacher", "all"] = Field(
        default="off",
        description="matrix products of the towers' blocks in 8-bit floats: of no tower, of those that no gradient goes through, "
        "or of all; needs bf16 and a GPU of compute capability 8.9, and gives other numbers",
    )
    deterministic: bool = Field(default=False, description="refuse operations whose result varies from run to run")
    max_nonfinite: Count = Field(default=10, json_schema_extra=RUNTIME, description="non-finite steps in a row that stop the run")


class CheckpointSettings(Settings):
    """What is saved, and what a start takes up again."""

    every: Length = Field(default=Length(3750, "steps"), description="distance of two checkpoints")
    asynchronous: bool = Field(default=True, description="write while training goes on, from a copy in host memory")
    most_failures: Count = Field(default=3, description="checkpoints in a row that may fail before the run stops")
    keep_last: Count = Field(default=3, description="checkpoints kept, the newest")
    keep_every: Length | None = Field(default=None, description="distance of checkpoints that are kept for ever; null for none")
    keep_best: str | None = Field(
        default=None,
        min_length=1,
        description="metric whose highest checkpoint is kept, such as knn/k20; each evaluation is then saved; null for none",
    )
    copy_to: PathName | None = Field(
        default=None,
        min_length=1,
        description="bucket or folder that each checkpoint is copied to, below the run's name, and fetched from; null for none",
    )
    resume: ResumePath = Field(
        default="auto",
        min_length=1,
        description="auto takes the run's newest whole checkpoint, never starts anew, or a checkpoint's path to begin from",
    )
    allow_data_change: bool = Field(
        default=False,
        description="go on over other data than the checkpoint was trained on: at the same step, in the new data's order",
    )


class TrackingSettings(Settings):
    """What is told to MLflow."""

    enabled: bool = Field(default=True, description="log to MLflow")
    uri: TrackingUri | None = Field(
        default=None,
        description="MLflow tracking URI; null means MLFLOW_TRACKING_URI, or else a SQLite file in the run's directory",
    )
    experiment: str | None = Field(
        default=None, min_length=1, description="MLflow experiment; null means MLFLOW_EXPERIMENT_NAME, or else fovea"
    )


class LaunchSettings(Settings):
    """How ranks are started on this machine."""

    ranks: Count | None = Field(default=None, description="processes; null means one for each GPU, or one")
    backend: Literal["auto", "gloo", "nccl"] = Field(
        default="auto", description="collective library; auto is nccl with GPUs, else gloo"
    )
    init: Literal["deepspeed", "accelerate"] = Field(
        default="deepspeed",
        description="who sets DeepSpeed up: fovea, or Hugging Face Accelerate (which needs transformers); the run is the same",
    )
    timeout: Positive = Field(default=600.0, description="seconds a collective may take")


def _beside(pattern: str) -> str:
    """The pattern of validation shards beside a pattern of training shards, or in a folder of them."""
    folder, _, name = pattern.rstrip("/").rpartition("/")
    if not name.endswith(".tar") and not re.search(r"[{*?\[]", name):
        folder = pattern.rstrip("/")
    if re.search(r"[{*?]", folder):
        folder = re.split(r"[{*?]", folder)[0].rpartition("/")[0]
    return f"{folder}/*val-*.tar" if folder else "*val-*.tar"


def _known_recipe(value: object) -> object:
    if isinstance(value, dict) and value.get("name") in RECIPES:
        return RECIPES[value["name"]].model_validate(value)
    return value


# Settings that are gone because only one value was legal. Runs and checkpoints of earlier versions hold them.
_RETIRED = {"recipe.local_loss": True, "recipe.gather_with_grad": True, "recipe.views.global_count": 2}


def without_retired(document: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings as they are read, without those that are gone, where they have the only value that was legal."""
    kept: dict[str, Any] = {}
    for name, value in document.items():
        key = prefix + name
        if key not in _RETIRED or value != _RETIRED[key]:
            kept[name] = without_retired(value, f"{key}.") if isinstance(value, dict) else value
    return kept


class Config(Settings):
    """The whole tree. ``recipe`` holds the class registered under ``recipe.name``."""

    run: RunSettings = Field(default=RunSettings(), description="which run this is")
    recipe: Annotated[SerializeAsAny[RecipeSettings], BeforeValidator(_known_recipe)] = Field(
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
    health: HealthSettings = Field(
        default=HealthSettings(),
        json_schema_extra=RUNTIME,
        description="stalled ranks and broken losses",
    )

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        """Reads settings as a run keeps them, those of earlier versions included."""
        return super().model_validate(without_retired(obj) if isinstance(obj, dict) else obj, **options)

    @property
    def voting_shards(self) -> tuple[str, ...]:
        """Patterns of the shards whose labels vote in the k-NN evaluation."""
        return self.evaluation.knn.train_shards or self.data.patterns

    @property
    def validation_shards(self) -> tuple[str, ...]:
        """Patterns of the shards that evaluations judge; ``*val-*.tar`` beside the training shards if none are named."""
        return self.evaluation.knn.val_shards or (_beside(self.data.patterns[0]),)

    def replace(self, **sections: Any) -> Self:
        """A copy with whole sections exchanged. Not checked again: call :func:`pipeline.checks.check` where that matters."""
        return self.model_copy(update=sections)
