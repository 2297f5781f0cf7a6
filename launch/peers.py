"""Weights from elsewhere, to be judged by the code that judges ours: timm, Hugging Face and open_clip folders, files, names."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from pipeline.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from pipeline.evaluation.subject import Subject

_HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Peer:
    """Weights that were loaded.

    Attributes:
        name: what they are called.
        subject: who is judged.
        size: side of the pictures it was made for, pixels.
    """

    name: str
    subject: Subject
    size: int


def load(source: str, *, model: str | None, device: torch.device) -> Peer:
    """Loads weights, strictly.

    Args:
        source: a folder as ``fovea export`` and the Hugging Face hub have them (of timm, transformers or open_clip), a file of
            weights, or ``timm:NAME``.
        model: timm's name of the architecture that a file is of.
        device: where they go.

    Raises:
        CheckpointError: nothing is there, or the weights are of another architecture.
        ConfigError: a file without ``model``, or a library that is not installed.
    """
    path = Path(source)
    if source.startswith("timm:") or path.is_file():
        return _of_tower(source, model, device)
    if (path / "open_clip_config.json").is_file():
        return _of_open_clip(path, device)
    if (path / "config.json").is_file():
        about = json.loads((path / "config.json").read_text())
        if "architecture" in about:
            return _of_timm(path, device)
        if "model_type" in about:
            return _of_transformers(path, about, device)
    raise CheckpointError(
        "this is neither a run, nor weights",
        where=source,
        hint="give a run, a folder of timm, Hugging Face or open_clip, a file with --model NAME, or timm:NAME",
    )


class _Tower:
    """A model of another library, as :class:`pipeline.evaluation.subject.Tower`."""

    def __init__(self, call: Any, blocks: Any, prefix: int, patch: int, width: int, module: Any) -> None:
        self._call, self.patch, self.width, self.module = call, patch, width, module
        self.vit = SimpleNamespace(blocks=blocks, num_prefix_tokens=prefix)

    def __call__(self, images: Tensor) -> Any:
        return self._call(images)


def _tokens(tokens: Tensor, prefix: int) -> Any:
    from pipeline.models.tokens import Tokens

    return Tokens(cls=tokens[:, 0], registers=tokens[:, 1:prefix], patches=tokens[:, prefix:], kept=None)


def _wrapped(model: Any, name: str, size: int, mean: Any, std: Any, device: torch.device) -> Peer:
    from pipeline.evaluation.subject import Subject

    model = model.to(device).eval().requires_grad_(False)
    prefix, patch = model.num_prefix_tokens, int(model.patch_embed.patch_size[0])
    if not prefix:
        raise CheckpointError("the model has no class token", where=name, hint="choose a ViT that has one")
    tower = _Tower(lambda x: _tokens(model.forward_features(x), prefix), model.blocks, prefix, patch, model.num_features, model)
    return Peer(name, Subject(tower, tuple(mean), tuple(std)), size)


def _of_timm(path: Path, device: torch.device) -> Peer:
    import timm
    from safetensors import SafetensorError

    try:
        model = timm.create_model(f"local-dir:{path}", pretrained=True)  # as it is: of no classes, it might lack any tensor
    except (RuntimeError, OSError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"timm cannot load it ({error})", where=str(path), hint="give a whole folder") from error
    model.reset_classifier(0)
    data = timm.data.resolve_data_config(model=model)
    return _wrapped(model, path.name, int(data["input_size"][-1]), data["mean"], data["std"], device)


def _of_tower(source: str, model: str | None, device: torch.device) -> Peer:
    import timm
    import torch

    from pipeline.evaluation.subject import Subject
    from pipeline.models.released import fit, unwrapped
    from pipeline.models.vision import build_tower
    from pipeline.settings import ModelSettings
    from pipeline.training.initial import find, weights_of

    name = source.removeprefix("timm:") if source.startswith("timm:") else model
    if name is None:
        raise ConfigError(
            "a file does not say what architecture it is of", where="--model", hint="name timm's, such as vit_small_patch16_224"
        )
    about = timm.get_pretrained_cfg(name, allow_unregistered=True) if timm.is_model(name) else None
    size = int(about.input_size[-1]) if about is not None else 224
    tower = build_tower(ModelSettings(timm=name), image_size=size)
    state, _ = unwrapped(weights_of(find(source)))
    fitted = fit(state, tower, where=source)
    with torch.no_grad():
        for key, parameter in tower.named_parameters():
            if key in fitted.weights:
                parameter.copy_(fitted.weights[key])
    mean, std = (about.mean, about.std) if about is not None else (_HALF, _HALF)
    subject = Subject(tower.to(device).eval().requires_grad_(False), tuple(mean), tuple(std))
    return Peer(source, subject, size)


def _of_open_clip(path: Path, device: torch.device) -> Peer:
    import open_clip
    import torch

    from pipeline.evaluation.subject import Subject

    model, _ = open_clip.create_model_from_pretrained(f"local-dir:{path}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{path}")
    about = json.loads((path / "open_clip_config.json").read_text())["preprocess_cfg"]
    model = model.to(device).eval().requires_grad_(False)
    visual = model.visual
    if not hasattr(visual, "transformer"):
        raise CheckpointError(
            "its vision tower is none of open_clip's own", where=str(path), hint="judge it in timm's layout instead"
        )
    visual.output_tokens = True

    def tokens(images: Tensor) -> Any:
        pooled, patches = visual(images)
        return _Tokens(pooled, patches)

    patch, width = int(visual.patch_size[0]), int(visual.class_embedding.shape[0])
    tower = _Tower(tokens, visual.transformer.resblocks, 1, patch, width, model)
    size = about["size"][0] if isinstance(about["size"], list) else about["size"]

    def texts(sentences: list[str]) -> Tensor:
        found: Tensor = model.encode_text(tokenizer(sentences).to(device))
        return found

    def images(pictures: Tensor) -> Tensor:
        found: Tensor = torch.as_tensor(visual(pictures)[0])
        return found

    return Peer(path.name, Subject(tower, tuple(about["mean"]), tuple(about["std"]), images=images, texts=texts), int(size))


class _Tokens(SimpleNamespace):
    def __init__(self, cls: Tensor, patches: Tensor) -> None:
        super().__init__(cls=cls, patches=patches)


def _of_transformers(path: Path, about: dict[str, Any], device: torch.device) -> Peer:
    try:
        from transformers import AutoModel
    except ImportError as error:
        raise ConfigError("transformers is not installed", where=str(path), hint="pip install 'fovea[export]'") from error
    from pipeline.evaluation.subject import Subject

    model, report = AutoModel.from_pretrained(path, output_loading_info=True)
    wrong = sorted({*report["missing_keys"], *report["unexpected_keys"], *map(str, report["mismatched_keys"])})
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} weights do not fit, the first is {wrong[0]}", where=str(path), hint="give a whole folder"
        )
    model = model.to(device).eval().requires_grad_(False)
    layers = next((m for m in (getattr(model, "encoder", None), getattr(model, "model", None)) if hasattr(m, "layer")), None)
    if layers is None:
        raise CheckpointError(f"a {about['model_type']} is no plain ViT", where=str(path), hint="give a DINOv2 or DINOv3 model")
    prefix = 1 + int(about.get("num_register_tokens", 0))
    given = path / "preprocessor_config.json"
    pictures = json.loads(given.read_text()) if given.is_file() else {}
    tower = _Tower(
        lambda x: _tokens(model(x).last_hidden_state, prefix),
        layers.layer,
        prefix,
        int(about["patch_size"]),
        int(about["hidden_size"]),
        model,
    )
    mean = tuple(pictures.get("image_mean", (0.485, 0.456, 0.406)))
    std = tuple(pictures.get("image_std", (0.229, 0.224, 0.225)))
    size = pictures.get("crop_size", {}).get("height", about.get("image_size", 224))
    return Peer(path.name, Subject(tower, mean, std), int(size))
