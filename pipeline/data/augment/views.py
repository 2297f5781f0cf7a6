"""Interface between data loading and methods: view specifications and batches.

A method describes its views with :class:`ViewSpec`; the data pipeline answers with a :class:`Batch`. Nothing here decodes, trains
or depends on a method.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from pipeline.config.sizes import Size, grid_of, height_width
from pipeline.config.types import Length
from pipeline.data.augment.operators import Augment
from pipeline.data.channel_settings import ChannelSettings
from pipeline.data.formats.composite import default_shown
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Normalize:
    """Mean and standard deviation of each channel (red, green and blue, unless others are declared), as fractions of full
    intensity; of float32 images in the channels' own units.
    """

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD


@dataclass(frozen=True)
class ChannelSpec:
    """Channels of images that are not 8-bit RGB.

    Attributes:
        names: of the channels, in order.
        dtype: type of the stored values.
        rgb: positions of the red, green and blue channel, if there are any.
        groups: number of the group of each channel; a group shares its brightness and contrast factors.
        composite: positions of the channels that are shown as red, green and blue (a single one as gray), or ``pca``.
    """

    names: tuple[str, ...]
    dtype: str
    rgb: tuple[int, int, int] | None = None
    groups: tuple[int, ...] = ()
    composite: tuple[int, ...] | Literal["pca"] = ()

    @property
    def count(self) -> int:
        """Number of channels."""
        return len(self.names)

    @property
    def full_range(self) -> float:
        """The value that the normalization calls one."""
        return {"uint8": 255.0, "uint16": 65535.0}.get(self.dtype, 1.0)


def channel_spec(settings: ChannelSettings | None) -> ChannelSpec | None:
    """The channels of ``data.channels``; ``None`` for 8-bit RGB."""
    if settings is None:
        return None
    names = settings.labels
    shown = settings.composite or settings.rgb or tuple(names[at] for at in default_shown(settings.count))
    composite: tuple[int, ...] | Literal["pca"] = "pca"
    if isinstance(shown, tuple):
        composite = tuple(names.index(name) for name in shown)
    return ChannelSpec(names, settings.dtype, settings.rgb_indices, settings.group_numbers, composite)


def channel_normalize(settings: ChannelSettings) -> Normalize:
    """The normalization of ``data.channels``: none, if it gives neither mean nor standard deviation."""
    ones = (1.0,) * settings.count
    return Normalize(settings.mean or (0.0,) * settings.count, settings.std or ones)


@dataclass(frozen=True)
class MaskSpec:
    """Block masks over the patches of a view (masked image modelling).

    Attributes:
        patch: patch side in pixels.
        probability: fraction of the crops of a global batch that are masked.
        ratio: minimum and maximum fraction of masked patches in a masked crop; stratified over the global batch.
    """

    patch: int
    probability: float = 0.5
    ratio: tuple[float, float] = (0.1, 0.5)


@dataclass(frozen=True)
class PatchDropout:
    """Patches of a view that the student does not see.

    Attributes:
        patch: patch side in pixels.
        fraction: fraction of the patches of each crop that are dropped; at least one stays.
    """

    patch: int
    fraction: float

    def kept(self, patches: int) -> int:
        """Number of patches of a crop that stay."""
        return max(1, int(patches * (1 - self.fraction) + 1e-9))


@dataclass(frozen=True)
class ViewSpec:
    """Specification of one kind of view of a method.

    Attributes:
        name: ``global``, ``local``, ``image``…
        count: number of such views per sample.
        size: side of the square view, or height and width, pixels.
        crop_scale: minimum and maximum fraction of the image's area; ``None`` means the evaluation view: the largest centred box
            of the view's aspect ratio, for a square view a square.
        centre: sides of that box as a fraction of the largest one's (224 of 256 in most protocols).
        position: position of that box along the side that it does not fill, from 0 (left or top) over the middle to 1.
        crop_ratio: minimum and maximum width/height of the crop, relative to that of the view.
        augment: one per view, cycled when there are fewer than ``count`` (asymmetric augmentations of BYOL and DINO).
        mask: block masks to draw for each view, if the method masks patches.
        dropout: which patches the student does not see, if any are dropped.
        normalize: mean and standard deviation; CLIP has its own.
        boxes: whether the batch includes the crop boxes.
        interpolation: bicubic, or bilinear as in the code of MoCo and SLIP; both antialiased.
        channels: channels of the images; ``None`` for 8-bit RGB.
        same_as: name of an earlier spec whose crop boxes and flips these views share, given the same scale, ratio and flip
            probability; ``None`` for independent ones.
    """

    name: str
    count: int
    size: Size
    crop_scale: tuple[float, float] | None
    augment: tuple[Augment, ...] = (Augment(flip_probability=0.0),)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    centre: float = 1.0
    position: float = 0.5
    mask: MaskSpec | None = None
    dropout: PatchDropout | None = None
    normalize: Normalize = Normalize()
    boxes: bool = False
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    same_as: str | None = None
    channels: ChannelSpec | None = None

    def of_channels(self, settings: ChannelSettings | None) -> ViewSpec:
        """The same view of images with the channels of ``data.channels``, normalized as it says; unchanged for 8-bit RGB."""
        spec = channel_spec(settings)
        if settings is None or spec is None:
            return self
        augment = tuple(replace(one, groups=spec.groups) for one in self.augment)
        return replace(self, channels=spec, normalize=channel_normalize(settings), augment=augment)

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width, pixels."""
        return height_width(self.size)

    def grid(self, patch: int) -> tuple[int, int]:
        """Rows and columns of patches of this side."""
        return grid_of(self.size, patch)

    @property
    def in_channels(self) -> int:
        """Number of channels of the view."""
        return 3 if self.channels is None else self.channels.count


@dataclass(frozen=True)
class ViewSet:
    """A set of views that a step may use, where a method mixes sizes.

    Attributes:
        views: the same in every set of a method, except for their sizes.
        weight: how often a step uses this set, relative to the others' weights.
    """

    views: tuple[ViewSpec, ...]
    weight: float = 1.0


@dataclass(frozen=True)
class ViewStage:
    """The views of a stretch of the run, before those that the method has in the end.

    Attributes:
        views: the same as in the end, except for their sizes.
        until: where the stage ends, counted from the start of the run; text such as ``3 epochs`` becomes a :class:`Length`.

    Raises:
        ConfigError: this is not a length.
    """

    views: tuple[ViewSpec, ...]
    until: Length | str | int

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "until", Length.parse(self.until))
        except ValueError as error:
            message = f"{self.until!r} is not the end of a stage: it {error}"
            raise ConfigError(message, where="ViewStage.until", hint="Write a length such as '3 epochs'") from None


@dataclass(frozen=True)
class TextSpec:
    """Specification of the text that a method reads: one tokenized caption per sample.

    Attributes:
        tokenizer: name of an open_clip architecture whose tokenizer is used.
        context: context length in tokens, start and end tokens included; longer captions are truncated, the end token stays.
        trim: whether a micro-batch may have fewer tokens: as many as its longest caption, rounded up to a multiple of 8. For
            text encoders that pool at the end token and never attend beyond it.
    """

    tokenizer: str = "ViT-B-32"
    context: int = 77
    trim: bool = False


@dataclass(frozen=True)
class Masks:
    """Masks of all views of one name, crop-major: row ``v * batch + i`` is view ``v`` of sample ``i``.

    Attributes:
        grid: bool ``[views * batch, patches]``, true where masked.
        index: int64 ``[masked]``, positions of the masked patches in ``grid.flatten()``, ascending.
        weight: float32 ``[masked]``, one over the number of masked patches of the same crop.
        capacity: numbers of masked patches that such a batch does not exceed, ascending: practically never, and never. Empty if
            unknown.
    """

    grid: Tensor
    index: Tensor
    weight: Tensor
    capacity: tuple[int, ...] = ()


@dataclass(frozen=True)
class Boxes:
    """Crop boxes of the views of one name, one tensor per view.

    Attributes:
        corners: float32 ``[batch, 4]`` each: top, left, bottom, right, pixels of the image as displayed (EXIF applied).
        flipped: bool ``[batch]`` each: whether the crop was flipped horizontally.
    """

    corners: list[Tensor]
    flipped: list[Tensor]


@dataclass(frozen=True)
class Batch:
    """One rank's (micro-)batch, on the device.

    Attributes:
        views: for each view name its views, each float ``[batch, channels, height, width]``, normalized;
            three channels unless others are declared.
        masks: for each view name with a ``MaskSpec``.
        labels: int64 ``[batch]``, -1 for samples without a label. Never read by self-supervised methods.
        keys: the samples' own names, in order.
        ids: the samples' numbers, ``shard << 32 | row``, in order.
        position: samples of the run consumed before this global batch.
        tokens: int64 ``[batch, context]`` caption tokens, if the method reads text; padded with 0 after the end token. Fewer
            than the context length if the ``TextSpec`` says ``trim``.
        captions: the caption of each sample chosen for this epoch; empty where there is none.
        boxes: for each view name whose ``ViewSpec`` requests them.
        seed: seed of what a method draws on the device for this micro-batch, so that it can be drawn again.
        id_tensor: int64 ``[batch]``, ``ids`` on the device; see :meth:`numbers`.
        text_ends: position of each caption's end token, on the host, where a size depends on it.
        kept: for each view name with a ``PatchDropout`` int64 ``[views * batch, kept]``, crop-major: the patches that the student
            sees, ascending.
        columns: for each column of metadata that is read int64 ``[batch]``, the number of the sample's value, -1 without one.
    """

    views: dict[str, list[Tensor]]
    labels: Tensor
    keys: list[str]
    ids: list[int]
    position: int
    masks: dict[str, Masks] = field(default_factory=dict)
    tokens: Tensor | None = None
    captions: list[str] | None = None
    boxes: dict[str, Boxes] = field(default_factory=dict)
    seed: int = 0
    id_tensor: Tensor | None = None
    text_ends: list[int] | None = None
    columns: dict[str, Tensor] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)

    def kept_patches(self, name: str, view: int | None = None) -> Tensor | None:
        """The patches that the student sees of all views of a name, or of one of them, ``[batch, kept]``; ``None`` for all."""
        kept = self.kept.get(name)
        return kept if kept is None or view is None else kept.unflatten(0, (len(self.views[name]), -1))[view]

    def numbers(self) -> Tensor:
        """``ids`` as int64 ``[batch]`` on the device, loaded with the batch: a list becomes a tensor only by a blocking copy."""
        if self.id_tensor is not None:
            return self.id_tensor
        return self.labels.new_tensor(self.ids)

    def tensors(self) -> Iterator[Tensor]:
        """All tensors of the batch."""
        for views in self.views.values():
            yield from views
        for masks in self.masks.values():
            yield from (masks.grid, masks.index, masks.weight)
        for boxes in self.boxes.values():
            yield from (*boxes.corners, *boxes.flipped)
        yield self.labels
        if self.tokens is not None:
            yield self.tokens
        if self.id_tensor is not None:
            yield self.id_tensor
        yield from self.columns.values()
        yield from self.kept.values()

    @property
    def layout(self) -> Hashable:
        """What the work of a micro-batch depends on: equal for steps with views of the same sizes and numbers of patches."""
        return self.sides, tuple((name, kept.shape[1]) for name, kept in self.kept.items())

    @property
    def sides(self) -> tuple[Size, ...]:
        """Size of each kind of view, pixels: a side, or height and width."""
        shapes = [tuple(views[0].shape[-2:]) for views in self.views.values() if views]
        return tuple(width if height == width else (height, width) for height, width in shapes)
