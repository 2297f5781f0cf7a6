"""Loads pretrained weights for evaluation: timm, Hugging Face and open_clip folders, weights files, timm names."""

from __future__ import annotations

import dataclasses
import inspect
import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from pipeline.config.sizes import Size
from pipeline.data.channel_settings import MAX_CHANNELS
from pipeline.errors import CheckpointError, ConfigError
from pipeline.untrusted import printable, read_json
from pipeline.weights.folder_config import image_sizes, input_size, per_channel, read_settings, side, size_of, three

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from pipeline.models.eval_model import EvalModel

_HALF = (0.5, 0.5, 0.5)
_RGB = 3  # channels, unless a folder names others
_TIMM_WEIGHTS = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")
_TRANSFORMERS = ("dinov2", "dinov2_with_registers", "dinov3_vit", "vit", "vit_msn")
_OF_BACKBONES = {"out_features", "out_indices"}  # lists, which only transformers' detectors read; settings of older versions
_TRANSFORMERS_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class PretrainedModel:
    """A loaded pretrained model.

    Attributes:
        name: display name.
        subject: the model for evaluation.
        size: side, or height and width, in pixels of the images it was trained on.
    """

    name: str
    subject: EvalModel
    size: Size


def load(source: str, *, model: str | None, device: torch.device) -> PretrainedModel:
    """Loads weights, strictly.

    Args:
        source: a folder as written by ``fovea export`` or found on the Hugging Face hub (timm, transformers or open_clip), a
            weights file, or ``timm:NAME``.
        model: timm name of the architecture of a weights file.
        device: device of the model.

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
        about = read_json(path / "config.json", error=CheckpointError)
        if isinstance(about, dict) and isinstance(about.get("architecture"), str):
            return _of_timm(path, about, device)
        if isinstance(about, dict) and isinstance(about.get("model_type"), str):
            return _of_transformers(path, about, device)
    raise CheckpointError(
        "is neither a run nor weights",
        where=source,
        hint="Give a run, a folder of timm, Hugging Face or open_clip, a file with --model NAME, or timm:NAME",
    )


class _Tower:
    """A model of another library, adapted to :class:`pipeline.models.eval_model.Tower`."""

    def __init__(self, call: Any, blocks: Any, prefix: int, patch: int, width: int, module: Any) -> None:
        self._call, self.patch, self.width, self.module = call, patch, width, module
        self.vit = SimpleNamespace(blocks=blocks, num_prefix_tokens=prefix)

    def __call__(self, images: Tensor) -> Any:
        return self._call(images)


def _tokens(tokens: Tensor, prefix: int) -> Any:
    from pipeline.models.tokens import Tokens

    return Tokens(cls=tokens[:, 0], registers=tokens[:, 1:prefix], patches=tokens[:, prefix:], kept=None)


def _wrapped(model: Any, name: str, size: Size, mean: Any, std: Any, device: torch.device) -> PretrainedModel:
    from pipeline.models.eval_model import EvalModel

    model = model.to(device).eval().requires_grad_(False)
    prefix, patch = model.num_prefix_tokens, int(model.patch_embed.patch_size[0])
    if not prefix:
        raise CheckpointError("the model has no class token", where=name, hint="Choose a ViT that has one")
    tower = _Tower(lambda x: _tokens(model.forward_features(x), prefix), model.blocks, prefix, patch, model.num_features, model)
    return PretrainedModel(name, EvalModel(tower, tuple(mean), tuple(std)), size)


def _of_timm(path: Path, about: dict[str, Any], device: torch.device) -> PretrainedModel:
    """Loads timm's layout without timm's loader, which follows paths and URLs, and in old versions unpickles anything."""
    import timm
    import torch
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    from pipeline.models.tensor_files import read_folder, reason

    where, name = str(path / "config.json"), about["architecture"]
    if not timm.is_model(name):
        raise CheckpointError(
            f"timm has no model {printable(name, limit=80)!r}", where=where, hint="See timm.list_models('vit_*')"
        )
    own = about.get("pretrained_cfg")
    shown = own if isinstance(own, dict) else about  # an older layout
    usual = timm.get_pretrained_cfg(name, allow_unregistered=True)
    model_args = about.get("model_args")
    takes = _keywords(_parameters(VisionTransformer) | _parameters(Eva))
    args = read_settings(model_args if isinstance(model_args, dict) else {}, takes, where=where).values
    for key in ("num_classes", "global_pool"):
        value = about.get(key, shown.get(key))
        if value is not None:
            args.setdefault(key, read_settings({key: value}, takes, where=where).values[key])
    pixels = image_sizes(about, where=where).images or input_size(getattr(usual, "input_size", (3, 224, 224)), where=where)
    if shown.get("fixed_input_size", True):
        args.setdefault("img_size", pixels)
    count = args.get("in_chans", _RGB)
    if type(count) is not int or not 1 <= count <= MAX_CHANNELS:
        raise CheckpointError(f"in_chans must be from 1 to {MAX_CHANNELS}", where=where, hint="Give a complete folder")
    usual_mean, usual_std = (getattr(usual, "mean", _HALF), getattr(usual, "std", _HALF)) if count == _RGB else (None, None)
    mean = per_channel(shown.get("mean", usual_mean), count, where=where)
    std = per_channel(shown.get("std", usual_std), count, where=where, positive=True)
    state = read_folder(path, _TIMM_WEIGHTS)
    try:
        with torch.device("meta"):
            shapes = {key: tensor.shape for key, tensor in timm.create_model(name, pretrained=False, **args).state_dict().items()}
        needed = sum(map(math.prod, shapes.values()))
        if needed > 2 * sum(tensor.numel() for tensor in state.values() if isinstance(tensor, torch.Tensor)):
            raise CheckpointError(
                f"the settings need {needed} weights, more than the file has", where=where, hint="Give a complete folder"
            )
        if not shapes.keys() - state.keys():
            # Created with its classifier: without classes, timm accepts files that lack tensors.
            weights = {"state_dict": state, "num_classes": args.get("num_classes", getattr(usual, "num_classes", 1000))}
            model = timm.create_model(name, pretrained=True, pretrained_cfg=weights, **args)
    except CheckpointError:
        raise
    except Exception as error:  # timm validates with assertions, and invalid sizes raise arithmetic errors
        raise CheckpointError(f"timm cannot load it ({reason(error)})", where=str(path), hint="Give a complete folder") from None
    if missing := sorted(shapes.keys() - state.keys()):
        raise CheckpointError(
            f"timm cannot load it ({len(missing)} tensors are missing, the first is {missing[0]})",
            where=str(path),
            hint="Give a complete folder",
        )
    model.reset_classifier(0)
    return _wrapped(model, path.name, pixels, mean, std, device)


def _of_tower(source: str, model: str | None, device: torch.device) -> PretrainedModel:
    import timm
    import torch

    from pipeline.models.eval_model import EvalModel
    from pipeline.models.settings import ModelSettings
    from pipeline.models.vision import build_tower
    from pipeline.weights.init_from import find, weights_of
    from pipeline.weights.public_layouts import fit, unwrapped

    name = source.removeprefix("timm:") if source.startswith("timm:") else model
    if name is None:
        raise ConfigError(
            "a file does not name its architecture", where="--model", hint="Give a timm name, such as vit_small_patch16_224"
        )
    about = timm.get_pretrained_cfg(name, allow_unregistered=True) if timm.is_model(name) else None
    size = input_size(about.input_size, where=source) if about is not None else 224
    tower = build_tower(ModelSettings(timm_name=name), image_size=size)
    state, _ = unwrapped(weights_of(find(source)))
    fitted = fit(state, tower, where=source)
    with torch.no_grad():
        for key, parameter in tower.named_parameters():
            if key in fitted.weights:
                parameter.copy_(fitted.weights[key])
    mean, std = (about.mean, about.std) if about is not None else (_HALF, _HALF)
    subject = EvalModel(tower.to(device).eval().requires_grad_(False), tuple(mean), tuple(std))
    return PretrainedModel(source, subject, size)


def _of_open_clip(path: Path, device: torch.device) -> PretrainedModel:
    import torch

    from pipeline.models.eval_model import EvalModel
    from pipeline.weights.open_clip_folder import load as load_folder

    read = load_folder(path)
    model: Any = read.model.to(device).eval().requires_grad_(False)
    visual = model.visual
    if not hasattr(visual, "transformer"):
        raise CheckpointError(
            "its vision tower is not one of open_clip's own", where=str(path), hint="Evaluate it in timm's layout instead"
        )
    visual.output_tokens = True

    def tokens(images: Tensor) -> Any:
        pooled, patches = visual(images)
        return _Tokens(pooled, patches)

    patch, width = int(visual.patch_size[0]), int(visual.class_embedding.shape[0])
    tower = _Tower(tokens, visual.transformer.resblocks, 1, patch, width, model)

    def texts(sentences: list[str]) -> Tensor:
        features: Tensor = model.encode_text(read.tokenize(sentences).to(device))
        return features

    def images(images: Tensor) -> Tensor:
        features: Tensor = torch.as_tensor(visual(images)[0])
        return features

    return PretrainedModel(path.name, EvalModel(tower, read.mean, read.std, images=images, texts=texts), read.size)


class _Tokens(SimpleNamespace):
    def __init__(self, cls: Tensor, patches: Tensor) -> None:
        super().__init__(cls=cls, patches=patches)


def _of_transformers(path: Path, about: dict[str, Any], device: torch.device) -> PretrainedModel:
    """Loads a folder in transformers' layout. The library gets only validated settings and tensors, never the folder: from a
    folder it reads ``auto_map``, adapters, quantizers and kernels, all of which may download or run code.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ConfigError(
            "transformers is not installed", where=str(path), hint="Install it: pip install 'fovea[export]'"
        ) from error
    from pipeline.models.eval_model import EvalModel
    from pipeline.models.tensor_files import read_folder, reason

    where, kind = str(path / "config.json"), about["model_type"]
    if kind not in _TRANSFORMERS or kind not in transformers.CONFIG_MAPPING:
        raise CheckpointError(
            f"the model type {printable(kind, limit=80)} is not supported",
            where=where,
            hint=f"Give one of {', '.join(_TRANSFORMERS)}",
        )
    makes = transformers.CONFIG_MAPPING[kind]
    takes = _keywords(_parameters(makes) - _parameters(transformers.PretrainedConfig) - _OF_BACKBONES)
    settings = read_settings(about, takes, where=where, ignore_unknown=True).values
    state = {name: t for name, t in read_folder(path, _TRANSFORMERS_WEIGHTS).items() if not isinstance(t, dict)}
    try:
        config = makes(**settings)
        with torch.device("meta"):
            needed = sum(t.numel() for t in transformers.MODEL_MAPPING[makes](config).state_dict().values())
        if needed > 2 * sum(t.numel() for t in state.values()):
            raise CheckpointError(
                f"the settings need {needed} weights, more than the file has", where=where, hint="Give a complete folder"
            )
        model, report = transformers.MODEL_MAPPING[makes].from_pretrained(
            None,
            config=config,
            state_dict=state,
            output_loading_info=True,
            trust_remote_code=False,
            attn_implementation="sdpa",
        )
    except CheckpointError:
        raise
    except Exception as error:  # transformers' checks raise exceptions of any class
        raise CheckpointError(
            f"transformers cannot load it ({reason(error)})", where=str(path), hint="Give a complete folder"
        ) from None
    wrong = sorted({*report["missing_keys"], *report["unexpected_keys"], *map(str, report["mismatched_keys"])})
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} weights do not match, the first is {printable(wrong[0], limit=80)}",
            where=str(path),
            hint="Give a complete folder",
        )
    model = model.to(device).eval().requires_grad_(False)
    layers = next((m for m in (getattr(model, "encoder", None), getattr(model, "model", None)) if hasattr(m, "layer")), None)
    if layers is None:
        raise CheckpointError(f"the model type {kind} is not a plain ViT", where=str(path), hint="Give a DINOv2 or DINOv3 model")
    prefix = 1 + int(getattr(config, "num_register_tokens", 0))
    shown = path / "preprocessor_config.json"
    document = read_json(shown, error=CheckpointError) if shown.is_file() else {}
    pixels = document if isinstance(document, dict) else {}
    tower = _Tower(
        lambda x: _tokens(model(x).last_hidden_state, prefix),
        layers.layer,
        prefix,
        side(config.patch_size, where=where),
        int(config.hidden_size),
        model,
    )
    mean = three(pixels.get("image_mean", (0.485, 0.456, 0.406)), where=str(shown))
    std = three(pixels.get("image_std", (0.229, 0.224, 0.225)), where=str(shown), positive=True)
    size = image_sizes(about, where=where, pixels=pixels).images or size_of(config.image_size, where=where)
    return PretrainedModel(path.name, EvalModel(tower, mean, std), size)


def _parameters(one: Any) -> set[str]:
    if dataclasses.is_dataclass(one):
        return {field.name for field in dataclasses.fields(one)}
    return set(inspect.signature(one).parameters) - {"self", "args", "kwargs"}


def _keywords(names: set[str]) -> Any:
    def takes() -> None: ...

    parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in sorted(names)]
    takes.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return takes
