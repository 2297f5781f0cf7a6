"""``fovea visualize``: shows a run's features on user-supplied images in one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from pipeline.config.sizes import Size, grid_of, height_width, is_divisible, nearest_sizes, scaled, size_text
from pipeline.data.formats.composite import composite
from pipeline.errors import ConfigError, DataError
from pipeline.reports import images, page
from pipeline.weights.from_checkpoint import chosen

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.config.schema import Config
    from pipeline.data.augment.views import ViewSpec
    from pipeline.models.eval_model import EvalModel

_TILE = 168  # size in pixels of an image on the page


def run(path: Path, files: Sequence[Path], *, out: Path, texts: Sequence[str], size: Size | None) -> int:
    """Write the page and print its path; returns the exit code.

    Args:
        path: a run or a checkpoint.
        files: images.
        out: the HTML file.
        texts: sentences to locate in the images, for methods with a text encoder.
        size: side, or height and width, of the images in pixels; twice the training size by default.

    Raises:
        FoveaError: no checkpoint, no image, a size that is not a multiple of the patch size, or texts without a text encoder.
    """
    import torch

    from pipeline.checkpoint.files import verify
    from pipeline.data.augment.views import Normalize
    from pipeline.evaluation.runner import eval_model_of
    from pipeline.methods.registry import build_method
    from pipeline.methods.shared.contrastive import Contrastive
    from pipeline.weights.export.networks import settings_of
    from pipeline.weights.from_checkpoint import fill_trained

    if not files:
        raise ConfigError("at least one image must be given", where="visualize", hint="Add the names of image files")
    saved = chosen(path)
    verify(saved)
    config = settings_of(saved)
    method = build_method(config)
    fill_trained(method, saved)
    method.eval()
    model = eval_model_of(method, config, torch.device("cpu"))
    view = method.views[0]
    shown, patch = size or scaled(view.size, 2), model.tower.patch
    if not is_divisible(shown, patch):
        near = nearest_sizes(shown, patch)[0]
        raise ConfigError(
            f"{size_text(shown)} pixels must be a multiple of the patch size of {patch}",
            where="--size",
            hint=f"Choose for example {'x'.join(map(str, height_width(near))) if not isinstance(near, int) else near}",
        )
    if texts and (not isinstance(method, Contrastive) or "image_pool" in method.export()):
        raise ConfigError(f"{config.method.name} cannot compare patches with texts", where="--text", hint="Remove the option")
    normalize = view.normalize or Normalize()
    if view.channels is None:
        squares = [centre(file, shown) for file in files]
        batch = torch.stack([_normal(one, normalize.mean, normalize.std) for one in squares])
    else:
        batch = torch.stack([_channel_centre(file, config, view, shown) for file in files])
        squares = [composite(one.permute(1, 2, 0).numpy(), view.channels.composite) for one in batch]
    page.write(
        out,
        "visualize",
        title=f"fovea: {config.run.name}",
        method=config.method.name,
        run=config.run.name,
        checkpoint=saved.path.name,
        count=len(files),
        rows=_rows(model, method, batch, squares, list(texts)),
        size=size_text(shown),
        grid=size_text(grid_of(shown, patch)),
    )
    print(f"{out}: open it in a browser")
    return 0


def centre(file: Path, size: Size) -> np.ndarray:
    """The largest centred part of an image with the aspect ratio of a size, uint8 ``[height, width, 3]``.

    Raises:
        DataError: the file is not an image.
    """
    from PIL import ImageOps

    try:
        with Image.open(file) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise DataError(f"the image cannot be read ({error})", where=str(file), hint="Choose JPEG or PNG files") from error
    return np.asarray(ImageOps.fit(upright, height_width(size)[::-1], Image.Resampling.BICUBIC))


def _channel_centre(file: Path, config: Config, view: ViewSpec, size: Size) -> Tensor:
    """The same of an image of declared channels, normalized, float32 ``[channels, height, width]``, as evaluations see it.

    Raises:
        DataError: the file has other channels.
        ConfigError: an image of this run consists of several files.
    """
    from pipeline.data.augment.dali import Augmenter
    from pipeline.data.augment.plan import make_plan
    from pipeline.data.augment.views import ViewSpec
    from pipeline.data.formats import read
    from pipeline.data.formats.channels import required
    from pipeline.untrusted import read_bytes

    channels = required(config.data.channels)
    assert channels is not None
    if channels.members:
        raise ConfigError(
            "an image of this run consists of several files", where="visualize", hint="Join them in one TIFF or NumPy file"
        )
    limits = {"min_side": 1, "max_pixels": config.data.max_pixels}
    try:
        data = read_bytes(file, limit=1 << 30)
    except OSError as error:
        raise DataError(f"the image cannot be read ({error.strerror})", where=str(file), hint="Choose another file") from error
    about = read.inspect(data, channels, **limits)
    image = read.decode(data, channels, max_pixels=config.data.max_pixels) if about.status == "ok" else None
    if image is None:
        reason = about.status if about.status != "ok" else "undecodable"
        raise DataError(
            f"the image cannot be used ({reason}): the run reads {channels.count} channels of {channels.dtype}",
            where=str(file),
            hint="Choose a TIFF, PNG, NumPy or DICOM file with these channels",
        )
    spec = ViewSpec("image", 1, size, None, normalize=view.normalize, channels=view.channels)
    plan = make_plan(
        (spec,),
        ids=np.zeros(1, dtype=np.uint64),
        epochs=np.zeros(1, dtype=np.int64),
        sizes=np.array([image.shape[:2]]),
        seed=0,
    )
    made: Tensor = Augmenter((spec,), batch_size=1, hue="off").run([image.astype(np.float32)], plan)["image"][0][0].clone()
    return made


def _normal(pixels: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    import torch

    values = (pixels.astype(np.float32) / 255 - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return torch.from_numpy(values.transpose(2, 0, 1).copy())


def _rows(model: EvalModel, method: Any, batch: Tensor, squares: Sequence[np.ndarray], texts: list[str]) -> list[dict[str, Any]]:
    import torch
    from torch.nn import functional as F

    from pipeline.evaluation.attention import looked_at, readable, shaded
    from pipeline.evaluation.principal import principal

    with torch.inference_mode():
        patches = torch.cat([model.tokens(part).patches.float() for part in batch.split(4)])
        attention = torch.cat([looked_at(model, part) for part in batch.split(4)])
    grid = grid_of(batch.shape[-2:], model.tower.patch, patches.shape[1])
    colours, share = principal(patches)
    rows = [_row("image", "", list(squares))]
    maps = np.rint(255 * colours).astype(np.uint8).reshape(len(batch), *grid, 3)
    rows.append(_row("patches", f"{100 * share:.0f} % of the variance", list(maps)))
    note = "of the last block, mean of its heads" if readable(model) else "cosine with the class token"
    rows.append(_row("attention", note, [shaded(one.numpy().reshape(grid)) for one in attention]))
    if texts and model.texts is not None:
        with torch.inference_mode():
            embeddings = F.normalize(method.image_projection(patches).float(), dim=2)
            similarity = embeddings @ F.normalize(model.texts(texts).float(), dim=1).T
        for number, text in enumerate(texts):
            rows.append(_row(f"“{text}”", "cosine", [shaded(one[:, number].numpy().reshape(grid)) for one in similarity]))
    return rows


def _row(title: str, note: str, tiles: Sequence[np.ndarray]) -> dict[str, Any]:
    resized = [(images.fitted(tile, min(2 * _TILE, max(tile.shape))), title) for tile in tiles]
    return {"title": title, "note": note, "images": resized, "width": _TILE, "sharp": True}
