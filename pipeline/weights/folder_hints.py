"""Reads what a folder of weights says about its vision tower: heads, activation, norms, image size, normalization.

Supported are folders of transformers (``config.json`` with ``model_type``), timm (``architecture``), open_clip
(``open_clip_config.json``) and fovea's own exports. The files are untrusted: only plain, bounded values are taken, and no library
is asked to load anything from the folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.errors import CheckpointError
from pipeline.methods.shared.crops import NORMALIZE
from pipeline.models.settings import ModelSettings
from pipeline.models.tensor_files import read_folder, reason
from pipeline.untrusted import printable, read_json
from pipeline.weights.architecture import Hints
from pipeline.weights.folder_config import ImageSizes, image_sizes, input_size, is_of_fovea, three

OPEN_CLIP = "open_clip_config.json"
FILES = (
    "model.safetensors",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
)
_ACTIVATIONS = {
    "gelu": "gelu",
    "quick_gelu": "quick_gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
    "silu": "gelu",  # of a gated layer, which has no other
}
_TRANSFORMERS: dict[str, tuple[str, float]] = {  # activation and epsilon that transformers assumes where a file has none
    "dinov2": ("gelu", 1e-6),
    "dinov2_with_registers": ("gelu", 1e-6),
    "dinov3_vit": ("gelu", 1e-5),
    "vit": ("gelu", 1e-12),
    "vit_msn": ("gelu", 1e-6),
    "clip": ("quick_gelu", 1e-5),
    "clip_vision_model": ("quick_gelu", 1e-5),
    "siglip": ("gelu_pytorch_tanh", 1e-6),
    "siglip_vision_model": ("gelu_pytorch_tanh", 1e-6),
}
_CLOSE = 2e-3  # of means and standard deviations, which files round


def is_weights(folder: Path) -> bool:
    """Whether a folder holds weights of transformers, timm, open_clip or an export of fovea."""
    named = any((folder / name).is_file() or (folder / f"{name}.index.json").is_file() for name in FILES)
    return named and ((folder / "config.json").is_file() or (folder / OPEN_CLIP).is_file())


def tensors_of(folder: Path, *, shapes_only: bool = False) -> dict[str, Any]:
    """The tensors of a folder under their original names.

    Raises:
        CheckpointError: as :func:`pipeline.models.tensor_files.read_folder`.
    """
    return read_folder(folder, FILES, shapes_only=shapes_only)


def hints_of(folder: Path) -> Hints:
    """What the settings of a folder say; nothing for a folder without settings.

    Raises:
        CheckpointError: a settings file is not JSON, of a model type that is not a plain ViT, or holds values out of bounds.
    """
    if (folder / OPEN_CLIP).is_file():
        return _of_open_clip(folder / OPEN_CLIP)
    file = folder / "config.json"
    if not file.is_file():
        return Hints()
    document = _document(file)
    if is_of_fovea(document):
        return _of_fovea(document["fovea"], file)
    if isinstance(document.get("architecture"), str):
        return _of_timm(document, file)
    if isinstance(document.get("model_type"), str):
        return _of_transformers(document, file)
    return Hints()


def sizes_of(folder: Path) -> ImageSizes:
    """The sizes of images that the settings of a folder name; none for a folder without settings.

    Raises:
        CheckpointError: a settings file is not JSON, or names what is no size.
    """
    file = folder / OPEN_CLIP if (folder / OPEN_CLIP).is_file() else folder / "config.json"
    if not file.is_file():
        return ImageSizes()
    return image_sizes(_document(file), where=printable(str(file)), pixels=_pixels(file))


def _pixels(file: Path) -> dict[str, Any]:
    """The settings of transformers' image processor beside ``config.json``; empty if there are none."""
    beside = file.with_name("preprocessor_config.json")
    return _document(beside) if beside.is_file() else {}


def normalization(mean: Any, std: Any, *, where: str) -> str:
    """Name of the normalization with these numbers.

    Raises:
        CheckpointError: none has them.
    """
    numbers = (*three(mean, where=where), *three(std, where=where, positive=True))
    for name, known in NORMALIZE.items():
        if all(abs(a - b) < _CLOSE for a, b in zip(numbers, (*known.mean, *known.std), strict=True)):
            return name
    raise CheckpointError(
        f"images are normalized with means {list(numbers[:3])} and deviations {list(numbers[3:])}, which no setting has",
        where=where,
        hint=f"Choose the nearest of {', '.join(NORMALIZE)} and correct the file: the difference moves every feature",
    )


def _document(file: Path) -> dict[str, Any]:
    document = read_json(file, error=CheckpointError)
    if not isinstance(document, dict):
        raise CheckpointError("must hold a JSON object", where=printable(str(file)), hint="Download the folder again")
    return document


def _of_transformers(document: dict[str, Any], file: Path) -> Hints:
    kind, where = document["model_type"], printable(str(file))
    if kind not in _TRANSFORMERS:
        raise CheckpointError(
            f"the model type {printable(kind, limit=80)} is not a plain vision transformer",
            where=where,
            hint=f"Choose one of {', '.join(_TRANSFORMERS)}",
        )
    nested = document.get("vision_config")
    about: Mapping[str, Any] = nested if isinstance(nested, dict) else document
    activation, eps = _TRANSFORMERS[kind]
    model: dict[str, Any] = {}
    act = about.get("hidden_act", activation)
    if not isinstance(act, str) or act not in _ACTIVATIONS:
        raise CheckpointError(
            f"the activation {printable(str(act), limit=40)} is not supported",
            where=where,
            hint=f"Choose weights with one of {', '.join(_ACTIVATIONS)}",
        )
    if _ACTIVATIONS[act] != "gelu":
        model["activation"] = _ACTIVATIONS[act]
    model |= _checked(
        {
            "num_heads": about.get("num_attention_heads"),
            "norm_eps": about.get("layer_norm_eps", eps),
            "rope_base": about.get("rope_theta") if kind == "dinov3_vit" else None,
        },
        where,
    )
    pixels, beside = _pixels(file), printable(str(file.with_name("preprocessor_config.json")))
    mean, std = pixels.get("image_mean"), pixels.get("image_std")
    named = normalization(mean, std, where=beside) if mean is not None and std is not None else None
    return Hints(model, image_sizes(document, where=where, pixels=pixels).positions, named, f"{file.name} beside the weights")


def _checked(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values that are given, validated by the rules of the configuration."""
    present = {name: value for name, value in values.items() if value is not None}
    try:
        checked = ModelSettings.model_validate(present)
    except ValidationError as error:
        raise CheckpointError(
            f"its settings are invalid ({printable(error.errors()[0]['msg'], limit=120)})",
            where=where,
            hint="Download the folder again",
        ) from None
    return {name: getattr(checked, name) for name in present}


def _of_timm(document: dict[str, Any], file: Path) -> Hints:
    where, name = printable(str(file)), document["architecture"]
    own = document.get("pretrained_cfg")
    shown: Mapping[str, Any] = own if isinstance(own, dict) else document
    args = document.get("model_args")
    hints = of_timm_name(name, where=where, heads=args.get("num_heads") if isinstance(args, dict) else None)
    size = image_sizes(document, where=where).positions or hints.image_size
    mean, std = shown.get("mean"), shown.get("std")
    named = normalization(mean, std, where=where) if mean is not None and std is not None else hints.normalize
    return Hints(hints.model, size, named, f"{file.name} beside the weights")


def of_timm_name(name: str, *, where: str, heads: Any = None) -> Hints:
    """What timm's own definition of a model says, built without memory for its weights.

    Args:
        name: timm's name of the model.
        where: for messages.
        heads: number of heads, if a file changes it.

    Raises:
        CheckpointError: timm has no such vision transformer.
    """
    import timm
    import torch
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    if not timm.is_model(name):
        raise CheckpointError(
            f"timm has no model {printable(name, limit=80)!r}", where=where, hint="See timm.list_models('vit_*')"
        )
    try:
        with torch.device("meta"):
            model: Any = timm.create_model(name, pretrained=False)
    except Exception as error:  # timm validates with assertions
        raise CheckpointError(f"timm cannot build {name} ({reason(error)})", where=where, hint="Choose another") from None
    if not isinstance(model, VisionTransformer | Eva):
        raise CheckpointError(f"{name} is not a plain vision transformer", where=where, hint="Choose one of timm's vit_* models")
    block = model.blocks[0]
    act = type(block.mlp.act).__name__.lower().replace("_", "")
    kinds = {"gelu": "gelu", "quickgelu": "quick_gelu", "gelutanh": "gelu_tanh", "silu": "gelu"}
    if act not in kinds:
        raise CheckpointError(f"{name} has the activation {act}", where=where, hint="Choose a model with GELU")
    settings = {"num_heads": heads or block.attn.num_heads, "norm_eps": block.norm1.eps}
    settings |= {"activation": kinds[act]} if kinds[act] != "gelu" else {}
    about = timm.get_pretrained_cfg(name, allow_unregistered=True)
    named = normalization(about.mean, about.std, where=where) if about is not None else None
    size = input_size(about.input_size, where=where) if about is not None else None
    return Hints(_checked(settings, where), size, named, f"timm's definition of {name}")


def _of_open_clip(file: Path) -> Hints:
    where, document = printable(str(file)), _document(file)
    about = document.get("model_cfg")
    vision = about.get("vision_cfg") if isinstance(about, dict) else None
    if not isinstance(about, dict) or not isinstance(vision, dict):
        raise CheckpointError("must contain model_cfg with vision_cfg", where=where, hint="Download the folder again")
    pixels = document.get("preprocess_cfg")
    pixels = pixels if isinstance(pixels, dict) else {}
    mean, std = pixels.get("mean"), pixels.get("std")
    named = normalization(mean, std, where=where) if mean is not None and std is not None else "openai"
    size = image_sizes(document, where=where).positions
    if isinstance(vision.get("timm_model_name"), str):
        hints = of_timm_name(vision["timm_model_name"], where=where)
        return Hints(hints.model, size or hints.image_size, named, f"{file.name}, and {hints.source}")
    width, head = vision.get("width", 768), vision.get("head_width", 64)
    if not (isinstance(width, int) and isinstance(head, int) and head > 0 and width % head == 0):
        raise CheckpointError("width must be a multiple of head_width", where=where, hint="Download the folder again")
    norms = vision.get("norm_kwargs")
    eps = norms.get("eps") if isinstance(norms, dict) else None
    model = _checked({"num_heads": width // head, "norm_eps": eps if eps is not None else 1e-5}, where)
    if about.get("quick_gelu") is True:
        model["activation"] = "quick_gelu"
    return Hints(model, size, named, f"{file.name} beside the weights")


def _of_fovea(document: dict[str, Any], file: Path) -> Hints:
    model, method = document.get("model"), document.get("method")
    try:
        settings = ModelSettings.model_validate(model)
    except ValidationError as error:
        raise CheckpointError(
            f"its settings are not understood ({error.error_count()} problems)",
            where=printable(str(file)),
            hint="Use the version of fovea that wrote it",
        ) from None
    augment = method.get("augment") if isinstance(method, dict) else None
    named = augment.get("normalize") if isinstance(augment, dict) else None
    changed = settings.model_dump(exclude_defaults=True)
    return Hints(
        changed,
        image_sizes({"fovea": document}, where=printable(str(file))).positions,
        named if isinstance(named, str) and named in NORMALIZE else None,
        f"{file.name} of the export",
        complete=True,
    )
