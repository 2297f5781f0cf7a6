"""``fovea shards preview``: shows some training samples with the exact crops, augmentations and masks of training.

Samples come from the run's own order, augmentation plans and masks from its seed, pixels from the decoder and the DALI graph used
in training: the sheet shows the beginning of the first global batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from pipeline.config.load import Loaded
from pipeline.config.schema import Config
from pipeline.config.sizes import size_text
from pipeline.data.formats.composite import composite
from pipeline.data.index.captions import REPLACED
from pipeline.data.indexing import open_storage
from pipeline.data.inputs import Inputs, prepare
from pipeline.errors import DataError
from pipeline.reports import images, page
from pipeline.reports.images import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILLION
from pipeline.untrusted import printable

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.data.augment.plan import ViewPlan
    from pipeline.data.augment.views import ViewSpec

SAMPLES = 8
_COLOURS = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY)
_LARGE, _SMALL, _ORIGINAL = 288, 192, 448  # sides in pixels; the page shows them at half size


@dataclass(frozen=True)
class View:
    """One rendered view of a sample.

    Attributes:
        name: ``global 1``, ``local 3``…
        done: description of its augmentation; empty if it was only cropped.
        image: the image with masked patches hatched.
        hidden: share of its patches that is masked, 0 if none.
        sign: label of its frame on the original.
        colour: of that frame.
    """

    name: str
    done: str
    image: Image.Image
    hidden: float
    sign: str
    colour: str

    @property
    def about(self) -> str:
        """Description of mask and augmentation."""
        hidden = f"{100 * self.hidden:.0f} % hidden" if self.hidden else ""
        return ", ".join(text for text in (hidden, self.done) if text) or "only cropped"


@dataclass(frozen=True)
class Sample:
    """One sample with all its views.

    Attributes:
        key: key of the sample.
        label: class number, -1 if it has none.
        caption: text, empty if it has none.
        about: description of shard and size.
        image: the image with the crops' frames.
        views: in the order of the method; empty if the sample cannot be used.
    """

    key: str
    label: int
    caption: str
    about: str
    image: Image.Image
    views: tuple[View, ...]

    @property
    def label_text(self) -> str:
        """The class as text."""
        return f"class {self.label}" if self.label >= 0 else "no class"


def views_of(config: Config) -> tuple[ViewSpec, ...]:
    """The views of the configured method; its networks are not allocated."""
    import torch

    from pipeline.methods.registry import build_method

    with torch.device("meta"):
        return build_method(config).views


def gather(config: Config, inputs: Inputs, specs: tuple[ViewSpec, ...], count: int = SAMPLES) -> list[Sample]:
    """The first samples of the run, as in its first step.

    Args:
        config: the settings.
        inputs: the indexed shards and the order.
        specs: the method's views.
        count: number of samples.

    Raises:
        DataError: missing shards, or none of the samples can be decoded.
    """
    from pipeline.data.augment.dali import Augmenter
    from pipeline.data.augment.decode import decoder_of
    from pipeline.data.loader.encoded_batches import StepDataset
    from pipeline.data.loader.reader import Reader
    from pipeline.data.order.order import divisors

    order = inputs.order
    # Use the largest world size at which rank 0 still has enough samples: little is read, exactly as that rank would read it.
    ranks = max(n for n in divisors(order.global_batch) if order.global_batch // n >= min(count, order.global_batch))
    reader = Reader(
        inputs.train, wants=("image", "caption", "label"), checksum=config.data.verify_checksums, store=open_storage(config)
    )
    portion = StepDataset(reader, order, specs, seed=config.run.seed, world=ranks, rank=0)[0]
    records = portion.records[:count]
    decoder = decoder_of(inputs.train.fields, threads=config.data.decode_threads)
    decoded = decoder.decode([record.image or b"" for record in records])
    usable = [
        row
        for row, image in enumerate(decoded)
        if image is not None and image.shape[:2] == (records[row].height, records[row].width)
    ]
    if not usable:
        raise DataError(
            f"none of the first {len(records)} images can be decoded",
            where=", ".join(sorted({record.shard_name for record in records})),
            hint="Run `fovea shards verify` to list all images that cannot be decoded",
        )
    augmenter = Augmenter(specs, batch_size=len(usable), threads=config.data.decode_threads, hue=config.method.augment.hue_space)
    plans = [plan.take(usable) for plan in portion.plan]
    cut = augmenter.run([decoded[row] for row in usable], plans)
    samples = []
    for row, record in enumerate(records):
        about = printable(f"{record.width} x {record.height} pixels, {record.shard_name}")
        if row not in usable:
            reason = record.status if record.status != "ok" else "undecodable"
            blank = Image.new("RGB", (_ORIGINAL, _ORIGINAL), (128, 128, 128))
            about += f"; cannot be used ({reason}), training uses another sample of the shard instead"
            samples.append(
                Sample(printable(record.key), record.label, printable(" ".join((record.caption or "").split())), about, blank, ())
            )
            continue
        position = usable.index(row)
        views, frames, number = [], [], 0
        for spec in specs:
            for view in range(spec.count):
                plan, sign, colour = plans[number], str(number + 1), _COLOURS[number if number < 2 else 2 + (number - 2) % 4]
                mask = portion.masks[spec.name][view, row] if spec.name in portion.masks else None
                pixels = _colours(cut[spec.name][view][position], spec)
                image = images.fitted(pixels, _LARGE if number < 2 else _SMALL, sharp=True)
                if mask is not None and spec.mask is not None and mask.any():
                    image = images.veiled(image, mask.reshape(spec.grid(spec.mask.patch)))
                name = f"{spec.name} {view + 1}" if spec.count > 1 else spec.name
                views.append(
                    View(name, _done(plan, position), image, float(mask.mean()) if mask is not None else 0.0, sign, colour)
                )
                (top, left), (bottom, right) = plan.start[position], plan.end[position]
                box = (left / record.width, top / record.height, right / record.width, bottom / record.height)
                frames.append((box, colour, sign, 4 if number < 2 else 2))
                number += 1
        channels = specs[0].channels
        original = decoded[row] if channels is None else composite(decoded[row], channels.composite)
        image = images.boxed(images.fitted(original, _ORIGINAL), frames)
        samples.append(
            Sample(
                printable(record.key),
                record.label,
                printable(" ".join((record.caption or "").split())),
                about,
                image,
                tuple(views),
            )
        )
    return samples


def _colours(view: Tensor, spec: ViewSpec) -> NDArray[np.uint8]:
    """A normalized view as people see it, uint8 ``[size, size, 3]``."""
    if spec.channels is None:
        return images.pixels(view)
    return composite(view.permute(1, 2, 0).numpy(), spec.channels.composite)


def _done(plan: ViewPlan, row: int) -> str:
    """Describe the augmentations of a crop in the order in which they are applied."""
    from pipeline.data.augment.operators import OPERATORS

    labels = {"blur": f"blur {plan.values['sigma'][row]:.1f} px", "solarize": "solarized"}
    steps = [labels.get(one.name, one.name) for one in OPERATORS if plan.values[one.condition][row]]
    if "gain" in plan.values:
        steps.append("gain and offset")
    if "noise_sigma" in plan.values:
        steps.append(f"noise {plan.values['noise_sigma'][row]:.2f}")
    if "channel_kept" in plan.values and (lost := int((plan.values["channel_kept"][row] == 0).sum())):
        steps.append(f"without {lost} channels")
    return ", ".join([*steps, *(["flip"] if plan.flip[row] else [])])


# ---- the sheet ----------------------------------------------------------------------------------------------------------


def write(loaded: Loaded, out: Path, count: int = SAMPLES) -> None:
    """Draw the first samples of a configuration's training data with all views.

    Args:
        loaded: the configuration.
        out: output file; an image if its name ends in ``.png``, else a self-contained HTML page.
        count: number of samples, at most a global batch.

    Raises:
        FoveaError: shards that cannot be used, or a file that cannot be written.
    """
    # The shards of the k-NN evaluation are not needed here and may be missing.
    config = loaded.config.replace(evaluation=loaded.config.evaluation.only())
    inputs, specs = prepare(config, 1), views_of(config)
    samples = gather(config, inputs, specs, count)
    if out.suffix.lower() == ".png":
        with page.writing(out):
            sheet(samples).save(out)
        return
    train = inputs.train
    page.write(
        out,
        "preview",
        title=f"preview of {config.run.name}",
        method=config.method.name,
        total=train.total,
        shards=len(train.shards),
        classes=train.classes,
        rejected={status: count for status, count in train.counts.items() if status != "ok"},
        replaced=train.notes.get(REPLACED, 0),
        samples=samples,
        seed=config.run.seed,
        legend=legend(specs),
    )


def legend(specs: Sequence[ViewSpec]) -> str:
    """Describe the views of a method."""
    parts = []
    for spec in specs:
        crop = f"{spec.count} {spec.name} {'view' if spec.count == 1 else 'views'} of {size_text(spec.size)} pixels"
        crop += (
            f" from {100 * spec.crop_scale[0]:.0f} to {100 * spec.crop_scale[1]:.0f} % of the image" if spec.crop_scale else ""
        )
        if spec.mask is not None and spec.mask.probability > 0:
            low, high = (f"{100 * share:.0f}" for share in spec.mask.ratio)
            crop += f", {100 * spec.mask.probability:.0f} % of them with {low} to {high} % of their patches hidden"
        parts.append(crop)
    return "; ".join(parts)


def sheet(samples: Sequence[Sample]) -> Image.Image:
    """The samples below each other as one image."""
    gap, line = 24, 22
    rows = []
    for sample in samples:
        right, top, tallest = _ORIGINAL + 2 * gap, 2 * line + gap, 0
        corners: list[tuple[int, int]] = []
        for view in sample.views:
            if corners and right + view.image.width > 2016:
                right, top, tallest = _ORIGINAL + 2 * gap, top + tallest + 2 * line + gap, 0
            corners.append((right, top))
            right, tallest = right + max(view.image.width, _SMALL) + gap, max(tallest, view.image.height)
        rows.append((sample, corners, max(sample.image.height + gap, top + tallest + 2 * line + gap)))
    out = Image.new("RGB", (2016, sum(height for _, _, height in rows) + gap), "white")
    draw, y = ImageDraw.Draw(out), gap
    for sample, corners, height in rows:
        out.paste(sample.image, (gap, y))
        left = _ORIGINAL + 2 * gap
        draw.text(
            (left, y),
            f"{sample.key}   {sample.label_text}   {_clipped(sample.caption, 90)}",
            fill="#1c2126",
            font=images.font(20),
        )
        draw.text((left, y + line + 4), _clipped(sample.about, 120), fill="#5d6872", font=images.font(16))
        for view, (x, top) in zip(sample.views, corners, strict=True):
            out.paste(view.image, (x, y + top))
            under = y + top + view.image.height + 6
            draw.rectangle((x, under, x + 21, under + 19), fill=view.colour)
            draw.text((x + 11, under + 10), view.sign, fill=images.on(view.colour), font=images.font(15), anchor="mm")
            hidden = f"{100 * view.hidden:.0f} % hidden" if view.hidden else ""
            draw.text((x + 30, under), f"{view.name}  {hidden}", fill="#1c2126", font=images.font(16))
            draw.text((x, under + line), _clipped(view.done or "only cropped", 28), fill="#5d6872", font=images.font(13))
        y += height
    return out


def _clipped(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."
