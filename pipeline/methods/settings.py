"""Base settings of all methods: crops, augmentation, gradient clipping, and the registry of settings classes.

To add a method, create a folder here: ``<name>/settings.py`` with a subclass of :class:`MethodSettings` under ``@register``,
and ``<name>/method.py`` with a function ``build``; ``method.name`` then selects both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal, Self, TypeVar

from pydantic import Field, ValidationInfo, field_validator, model_validator

from pipeline.config.types import Length, Positive, Settings
from pipeline.data.augment.settings import AugmentSettings, CurriculumStage, MultiCropSettings, ViewSettings


class MethodSettings(Settings):
    """Base class of every method's settings; subclasses narrow ``name`` to a literal and are registered."""

    reads_text: ClassVar[bool] = False  # whether the method reads captions
    resizable: ClassVar[bool] = False  # whether views.curriculum applies: the method's views may change their size
    drops_patches: ClassVar[bool] = False  # whether patch_dropout of these stages applies
    guidable: ClassVar[bool] = False  # whether the settings in guidance apply: the method trains one tower without captions

    name: str = Field(description="the method")
    views: ViewSettings = Field(default=ViewSettings(), description="crop sizes and scales")
    augment: AugmentSettings = Field(default=AugmentSettings(), description="augmentation of a crop")
    clip_norm: Positive | None = Field(default=None, description="maximum L2 norm of the gradient; null disables clipping")
    clip_scope: Literal["network", "global", "parameter"] = Field(
        default="global",
        description="clip the gradient by the norm of each network, of all parameters together, or of each parameter "
        "(DINO's code)",
    )

    @field_validator("views", "augment", mode="before")
    @classmethod
    def _fill_partial_section(cls, value: Any, info: ValidationInfo) -> Any:
        """Fills a partial section with this method's defaults, not those of the shared class."""
        if not isinstance(value, dict) or info.field_name is None:
            return value
        values_set = {key: tuple(part) if isinstance(part, list) else part for key, part in value.items()}
        return cls.model_fields[info.field_name].default.model_dump() | values_set

    @model_validator(mode="after")
    def _local_settings_need_local_crops(self) -> Self:
        default = type(self).model_fields["augment"].default.local_blur_probability
        if not isinstance(self.views, MultiCropSettings) and self.augment.local_blur_probability != default:
            raise ValueError("augment.local_blur_probability has no effect: the method has no local crops; leave it out")
        return self

    def at_stage(self, stage: CurriculumStage) -> Self:
        """These settings with the sizes of views in a stage of ``views.curriculum``."""
        return self.model_copy(update={"views": self.views.at(stage)})

    @property
    def last_layer_freeze(self) -> Length:
        """Time for which the parameters that the method marks as its last layer are frozen."""
        return Length(0)

    @property
    def anchors(self) -> dict[str, str | None]:
        """Sources of the weights of the method's frozen networks, by attribute name; None means this run's initial weights."""
        return {}


R = TypeVar("R", bound=type[MethodSettings])
REGISTERED: dict[str, type[MethodSettings]] = {}


def register(name: str) -> Callable[[R], R]:
    """Class decorator: registers a method's settings as ``method.name: <name>``.

    Raises:
        ValueError: if another class is registered under the name.
    """

    def enter(cls: R) -> R:
        if REGISTERED.setdefault(name, cls) is not cls:
            raise ValueError(f"two methods are called {name!r}")
        return cls

    return enter


class OneViewSettings(MethodSettings):
    """Base settings of methods that see one crop of nearly the whole image, with its caption."""

    resizable: ClassVar[bool] = True

    views: ViewSettings = Field(default=ViewSettings(global_scale=(0.9, 1.0)), description="crop size and scale")
    augment: AugmentSettings = Field(
        default=AugmentSettings(
            flip_probability=0.0,
            jitter_probability=0.0,
            gray_probability=0.0,
            blur_probability=(0.0,),
            solarize_probability=(0.0,),
            normalize="openai",
        ),
        description="augmentation of the crop; by default none, not even a flip, because captions mention left and right",
    )

    @model_validator(mode="after")
    def _single_view(self) -> Self:
        for name in ("blur_probability", "solarize_probability"):
            if len(getattr(self.augment, name)) > 1:
                raise ValueError(f"augment.{name} must be one number: the method has one view of an image")
        return self
