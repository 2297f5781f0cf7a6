"""timm export: ``config.json`` and weights for ``timm.create_model("local-dir:FOLDER", pretrained=True)``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from timm.layers import SwiGLUPacked
from torch import Tensor, nn

from pipeline.config.sizes import Size, grid_of, height_width
from pipeline.data.formats.channels import full_range
from pipeline.errors import ConfigError
from pipeline.models.positions import resample_positions
from pipeline.models.resnet import ResNetTower
from pipeline.models.vision import VisionTower
from pipeline.weights.export.networks import Networks

_SWIGLU = "vit_giant_patch14_dinov2"  # timm's only plain name with this feed-forward layer; all sizes are given explicitly


def call(tower: VisionTower, size: Size) -> tuple[str, dict[str, Any]]:
    """Name and JSON-serializable keyword arguments with which timm creates the same tower.

    Raises:
        ConfigError: no such arguments exist.
    """
    name, args = tower.timm_name, {**tower.timm_args, "img_size": size if isinstance(size, int) else list(size)}
    layer: Any = args.get("mlp_layer")  # a copied partial is another object
    gated = getattr(layer, "func", None) is SwiGLUPacked.func and layer.keywords == SwiGLUPacked.keywords
    if gated and args.get("act_layer") is nn.SiLU:
        name = _SWIGLU
        args["init_values"] = args.get("init_values") or 1.0  # this name has a layer scale, which None does not remove
        args = {key: value for key, value in args.items() if key not in ("mlp_layer", "act_layer")}
    wrong = [key for key, value in args.items() if not isinstance(value, int | float | str | bool | None) and key != "img_size"]
    if wrong or not name:
        raise ConfigError(
            f"timm builds this tower from Python objects only ({', '.join(wrong) or 'its name is unknown'})",
            where="model.stem" if "embed_layer" in wrong else "model",
            hint="Export it to safetensors or onnx instead",
        )
    return name, args


def rebuilt(tower: VisionTower, size: Size, *, name: str, args: dict[str, Any]) -> nn.Module:
    """timm's own model, loaded strictly with the tower's weights; positions are resampled if the size differs.

    Raises:
        ConfigError: timm's model has other tensors.
    """
    model: nn.Module = timm.create_model(name, pretrained=False, **args)
    state = weights(tower, size)
    own = model.state_dict()
    wrong = sorted(own.keys() ^ state.keys()) or [key for key in own if own[key].shape != state[key].shape]
    if wrong:
        raise ConfigError(
            f"timm's {name} has different tensors, the first is {wrong[0]}", where="model", hint="Export to safetensors"
        )
    model.load_state_dict(state)
    return model.eval()


def weights(tower: VisionTower, size: Size) -> dict[str, Tensor]:
    """:func:`timm_state`, with a layer scale of one where the model of :func:`call` has one and the tower has none."""
    state = timm_state(tower, size)
    name, _ = call(tower, size)
    if name == _SWIGLU and "blocks.0.ls1.gamma" not in state:
        ones = {f"blocks.{i}.ls{j}.gamma": torch.ones(tower.width) for i in range(len(tower.vit.blocks)) for j in (1, 2)}
        state |= ones
    return state


def timm_state(tower: VisionTower, size: Size) -> dict[str, Tensor]:
    """The weights under timm's names, with positions on the grid of images of this size."""
    state = {key: tensor.detach().float().clone().contiguous() for key, tensor in tower.vit.state_dict().items()}
    grid = grid_of(size, tower.patch)
    old = tuple(tower.vit.patch_embed.grid_size)
    if "pos_embed" in state and grid != old:
        prefix = 0 if tower.vit.no_embed_class else tower.vit.num_prefix_tokens
        state["pos_embed"] = resample_positions(state["pos_embed"], grid, old, prefix=prefix, how=tower.resampling)
    return state


def _resnet(tower: ResNetTower) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Name, JSON-serializable arguments and weights of timm's own model, which is created and loaded to check them.

    Raises:
        ConfigError: the stem is not one of timm's.
    """
    if tower.stem != "patch":
        raise ConfigError(
            "timm has no ResNet with a small stem",
            where=f"model.stem={tower.stem}",
            hint="Export it to safetensors or onnx instead",
        )
    args = {key: list(value) if isinstance(value, tuple) else value for key, value in tower.timm_args.items()}
    state = {key: tensor.detach().clone().contiguous() for key, tensor in tower.net.state_dict().items()}
    timm.create_model(tower.timm_name, pretrained=False, **args).load_state_dict(state)
    return tower.timm_name, args, state


def _write_config(networks: Networks, folder: Path, name: str, args: dict[str, Any], of_kind: dict[str, Any]) -> None:
    """Writes timm's ``config.json``; what differs between a transformer and a ResNet is given."""
    p, known = networks.preprocessing, {"img_size", "num_classes"}
    pretrained = {
        "tag": networks.config.run.name,
        "custom_load": False,
        "input_size": [p.count, *height_width(p.size)],
        "fixed_input_size": False,
        "interpolation": p.interpolation,
        "crop_pct": p.centre,
        "crop_mode": "center",
        "mean": list(p.mean),
        "std": list(p.std),
        "num_classes": 0,
        "pool_size": None,
        "first_conv": of_kind["first_conv"],
        "classifier": of_kind["classifier"],
    }
    sized = {"img_size": p.size if isinstance(p.size, int) else list(p.size)} if of_kind.get("sized", True) else {}
    config = {
        "architecture": name,
        "num_classes": 0,
        "num_features": networks.tower.width,
        "global_pool": of_kind["pool"],
        "pretrained_cfg": pretrained,
        "model_args": {key: value for key, value in args.items() if key not in known} | sized,
    }
    if p.channels:
        config["fovea"] = {"channels": list(p.channels), "dtype": p.dtype}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def _transform(networks: Networks) -> list[str]:
    """Lines of Python that make ``images`` from an image: timm's transform, which is for RGB images only, or arithmetic."""
    p = networks.preprocessing
    if not p.channels:
        return [
            "transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))",
            "images = transform(image)[None]",
        ]
    scale = "" if p.dtype == "float32" else f" / {full_range(p.dtype):.0f}"
    return [
        f"# image: float32 [{p.count}, height, width], values as stored; mean and std as below, [{p.count}, 1, 1]",
        f"image = torch.nn.functional.interpolate(image[None], {height_width(p.size)}, mode='bicubic', antialias=True)",
        f"images = (image{scale} - mean) / std",
    ]


def write(networks: Networks, folder: Path) -> tuple[str, list[str]]:
    """Writes the files to a folder; returns lines of Python that load them, and notes.

    Raises:
        ConfigError: timm cannot create this tower.
    """
    tower, p = networks.tower, networks.preprocessing
    if isinstance(tower, ResNetTower):
        name, args, state = _resnet(tower)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        first = "conv1" if "conv1.weight" in state else "conv1.0"
        _write_config(networks, folder, name, args, {"first_conv": first, "classifier": "fc", "pool": "avg", "sized": False})
        lines = [f'model = timm.create_model("local-dir:{folder}", pretrained=True).eval()', *_transform(networks)]
        return "\n".join(["import timm", *lines, "features = model(images)  # the mean of the last map"]), []
    name, args = call(tower, p.size)
    rebuilt(tower, p.size, name=name, args=args)  # checks that the export can be loaded
    save_file(weights(tower, p.size), folder / "model.safetensors", metadata={"format": "pt"})
    _write_config(networks, folder, name, args, {"first_conv": "patch_embed.proj", "classifier": "head", "pool": "token"})

    reading = "\n".join(_transform(networks))
    usage = f"""
import timm
model = timm.create_model("local-dir:{folder}", pretrained=True).eval()
{reading}
tokens = model.forward_features(images)  # the class token is tokens[:, 0]
"""
    notes = ["The mask token is left out: timm's models have none."]
    if tower.local_norm is not None:
        notes.append("The norm for local crops is left out: it belongs to training.")
    if tower.resampling != "antialias":
        notes.append(f"For images of another size the run resampled positions as {tower.resampling!r}; timm antialiases.")
    return usage, notes
