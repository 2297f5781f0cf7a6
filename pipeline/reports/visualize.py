"""``fovea visualize``: shows a run's features on user-supplied images in one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from pipeline.errors import ConfigError, DataError
from pipeline.reports import images, page
from pipeline.weights.from_checkpoint import chosen

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.models.eval_model import EvalModel

_TILE = 168  # size in pixels of an image on the page


def run(path: Path, files: Sequence[Path], *, out: Path, texts: Sequence[str], size: int | None) -> int:
    """Write the page and print its path; returns the exit code.

    Args:
        path: a run or a checkpoint.
        files: images.
        out: the HTML file.
        texts: sentences to locate in the images, for methods with a text encoder.
        size: side of the images in pixels; twice the training size by default.

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
    side, patch = size or 2 * view.size, model.tower.patch
    if side % patch:
        raise ConfigError(
            f"{side} pixels must be a multiple of the patch size of {patch}",
            where="--size",
            hint=f"Choose for example {side // patch * patch or patch}",
        )
    if texts and (not isinstance(method, Contrastive) or "image_pool" in method.export()):
        raise ConfigError(f"{config.method.name} cannot compare patches with texts", where="--text", hint="Remove the option")
    normalize = view.normalize or Normalize()
    squares = [square(file, side) for file in files]
    batch = torch.stack([_normal(one, normalize.mean, normalize.std) for one in squares])
    page.write(
        out,
        "visualize",
        title=f"fovea: {config.run.name}",
        method=config.method.name,
        run=config.run.name,
        checkpoint=saved.path.name,
        count=len(files),
        rows=_rows(model, method, batch, squares, list(texts)),
        size=side,
        side=side // patch,
    )
    print(f"{out}: open it in a browser")
    return 0


def square(file: Path, side: int) -> np.ndarray:
    """The centre square of an image, uint8 ``[side, side, 3]``.

    Raises:
        DataError: the file is not an image.
    """
    from PIL import ImageOps

    try:
        with Image.open(file) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise DataError(f"the image cannot be read ({error})", where=str(file), hint="Choose JPEG or PNG files") from error
    return np.asarray(ImageOps.fit(upright, (side, side), Image.Resampling.BICUBIC))


def _normal(pixels: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    import torch

    values = (pixels.astype(np.float32) / 255 - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return torch.from_numpy(values.transpose(2, 0, 1).copy())


def _rows(model: EvalModel, method: Any, batch: Tensor, squares: Sequence[np.ndarray], texts: list[str]) -> list[dict[str, Any]]:
    import torch
    from torch.nn import functional as F

    from pipeline.evaluation.attention import looked_at, readable, shaded
    from pipeline.evaluation.principal import principal

    side = batch.shape[-1] // model.tower.patch
    with torch.inference_mode():
        patches = torch.cat([model.tokens(part).patches.float() for part in batch.split(4)])
        attention = torch.cat([looked_at(model, part) for part in batch.split(4)])
    colours, share = principal(patches)
    rows = [_row("image", "", list(squares))]
    maps = np.rint(255 * colours).astype(np.uint8).reshape(len(batch), side, side, 3)
    rows.append(_row("patches", f"{100 * share:.0f} % of the variance", list(maps)))
    note = "of the last block, mean of its heads" if readable(model) else "cosine with the class token"
    rows.append(_row("attention", note, [shaded(one.numpy().reshape(side, side)) for one in attention]))
    if texts and model.texts is not None:
        with torch.inference_mode():
            embeddings = F.normalize(method.image_projection(patches).float(), dim=2)
            similarity = embeddings @ F.normalize(model.texts(texts).float(), dim=1).T
        for number, text in enumerate(texts):
            rows.append(_row(f"“{text}”", "cosine", [shaded(one[:, number].numpy().reshape(side, side)) for one in similarity]))
    return rows


def _row(title: str, note: str, tiles: Sequence[np.ndarray]) -> dict[str, Any]:
    resized = [(images.fitted(tile, min(2 * _TILE, max(tile.shape))), title) for tile in tiles]
    return {"title": title, "note": note, "images": resized, "width": _TILE, "sharp": True}
