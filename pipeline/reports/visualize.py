"""``fovea visualize``: shows a run's features on user-supplied images in one HTML page."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from pipeline.errors import ConfigError, DataError
from pipeline.reports import html as pictures
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
        raise ConfigError("there are no pictures", where="visualize", hint="Name some files.")
    saved = chosen(path)
    verify(saved)
    config = settings_of(saved)
    method = build_method(config)
    fill_trained(method, saved)
    method.eval()
    subject = eval_model_of(method, config, torch.device("cpu"))
    view = method.views[0]
    side, patch = size or 2 * view.size, subject.tower.patch
    if side % patch:
        raise ConfigError(
            f"pictures of {side} pixels do not divide into patches of {patch}",
            where="--size",
            hint=f"choose a multiple of {patch}",
        )
    if texts and (not isinstance(method, Contrastive) or "image_pool" in method.export()):
        raise ConfigError(f"{config.method.name} does not compare patches with texts", where="--text", hint="Leave it out.")
    normalize = view.normalize or Normalize()
    squares = [square(file, side) for file in files]
    images = torch.stack([_normal(one, normalize.mean, normalize.std) for one in squares])
    rows = _rows(subject, method, images, squares, list(texts))
    body = [
        f'<p class="over">fovea · {html.escape(config.method.name)} · {html.escape(config.run.name)}</p>',
        f"<h1>{len(files)} pictures, as {html.escape(saved.path.name)} sees them</h1>",
        f'<figure><div class="scroll"><div class="rows">{"".join(rows)}</div></div><figcaption>Pictures are cut to the square in '
        f"their middle and shown at {side} pixels, {side // patch} x {side // patch} patches. Colours are the three directions "
        "in which the patches of all pictures together differ most. Bright is much, dark is little; each map by its own least "
        "and most.</figcaption></figure>",
    ]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(pictures.document(f"fovea: {config.run.name}", "\n".join(body)), encoding="utf-8")
    except OSError as error:
        raise DataError(f"the page cannot be written ({error.strerror})", where=str(out), hint="Choose another place.") from error
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
        raise DataError(f"the picture cannot be read ({error})", where=str(file), hint="Name JPEG or PNG files.") from error
    return np.asarray(ImageOps.fit(upright, (side, side), Image.Resampling.BICUBIC))


def _normal(pixels: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    import torch

    values = (pixels.astype(np.float32) / 255 - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return torch.from_numpy(values.transpose(2, 0, 1).copy())


def _rows(subject: EvalModel, method: Any, images: Tensor, squares: Sequence[np.ndarray], texts: list[str]) -> list[str]:
    import torch
    from torch.nn import functional as F

    from pipeline.evaluation.attention import looked_at, readable, shaded
    from pipeline.evaluation.principal import principal

    side = images.shape[-1] // subject.tower.patch
    with torch.inference_mode():
        patches = torch.cat([subject.tokens(part).patches.float() for part in images.split(4)])
        attention = torch.cat([looked_at(subject, part) for part in images.split(4)])
    colours, share = principal(patches)
    rows = [_row("picture", "", list(squares))]
    maps = np.rint(255 * colours).astype(np.uint8).reshape(len(images), side, side, 3)
    rows.append(_row("patches", f"{100 * share:.0f} % of the variance", list(maps)))
    note = "of the last block, mean of its heads" if readable(subject) else "cosine with the class token"
    rows.append(_row("attention", note, [shaded(one.numpy().reshape(side, side)) for one in attention]))
    if texts and subject.texts is not None:
        with torch.inference_mode():
            embedded = F.normalize(method.image_projection(patches).float(), dim=2)
            found = embedded @ F.normalize(subject.texts(texts).float(), dim=1).T
        for number, text in enumerate(texts):
            rows.append(_row(f"“{text}”", "cosine", [shaded(one[:, number].numpy().reshape(side, side)) for one in found]))
    return rows


def _row(title: str, note: str, tiles: Sequence[np.ndarray]) -> str:
    cells = "".join(
        pictures.tag(pictures.fitted(tile, min(2 * _TILE, max(tile.shape))), title, width=_TILE, kind="sharp") for tile in tiles
    )
    said = f'<div class="said"><b>{html.escape(title)}</b>{html.escape(note)}</div>'
    return f'<div class="row">{said}{cells}</div>'
