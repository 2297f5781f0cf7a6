"""ONNX export: one graph from pixels to class token and patch tokens (and the image feature of image-text methods)."""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from pipeline.config.sizes import height_width
from pipeline.errors import ConfigError
from pipeline.models.resnet import ResNetTower
from pipeline.weights.export.formats.timm import timm_state
from pipeline.weights.export.networks import Networks

OPSET = 18


class _ImageEncoder(nn.Module):
    """timm's model with named outputs, and the method's image projection on top."""

    def __init__(self, model: nn.Module, prefix: int, projection: nn.Module | None) -> None:
        super().__init__()
        self.model, self.prefix, self.projection = model, prefix, projection

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        tokens = self.model.forward_features(images)  # type: ignore[operator]
        cls = tokens[:, 0] if self.prefix else self.model.attn_pool(tokens)  # type: ignore[operator]
        outputs = (cls, tokens[:, self.prefix :])
        return outputs if self.projection is None else (*outputs, self.projection(cls))


class _ResNet(nn.Module):
    """A ResNet with named outputs."""

    def __init__(self, tower: ResNetTower) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        tokens = self.tower(images)
        return tokens.cls, tokens.patches


def write(networks: Networks, folder: Path) -> tuple[str, list[str]]:
    """Writes ``model.onnx`` and ``preprocessor.json`` to a folder; returns lines of Python that load them, and notes.

    Raises:
        ConfigError: onnx is not installed, or the tower cannot be traced.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"{error.name} is not installed", where="--to onnx", hint="Install it: pip install 'fovea[export]'"
        ) from error
    tower, size, count = networks.tower, networks.preprocessing.size, networks.preprocessing.count
    height, width = height_width(size)
    pooled = networks.others.get("image_pool") is not None
    projection = None if pooled else networks.others.get("image_projection")
    if isinstance(tower, ResNetTower):
        encoder: nn.Module = _ResNet(tower).eval()
    else:
        args = {**tower.timm_args, "img_size": size if isinstance(size, int) else list(size), "dynamic_img_size": False}
        model = timm.create_model(tower.timm_name, pretrained=False, **args)
        model.load_state_dict(timm_state(tower, size))
        encoder = _ImageEncoder(model.eval(), tower.vit.num_prefix_tokens, projection).eval()
    names = ["cls", "patches"] + ([] if projection is None else ["feature"])
    batch = torch.export.Dim("batch", min=1, max=65536)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            encoder,
            (torch.zeros(2, count, height, width),),
            dynamo=True,
            opset_version=OPSET,
            input_names=["images"],
            output_names=names,
            dynamic_shapes=({0: batch},),
            verbose=False,
        )
    if program is None:
        raise ConfigError("the tower cannot be traced", where="--to onnx", hint="Export it to safetensors")
    program.save(str(folder / "model.onnx"))
    (folder / "preprocessor.json").write_text(json.dumps(networks.preprocessing.document(), indent=1) + "\n")
    usage = f"""
import onnxruntime
session = onnxruntime.InferenceSession("{folder / "model.onnx"}")
{", ".join(names)} = session.run(None, {{"images": images}})  # float32 [n, {count}, {height}, {width}], normalised as below
"""
    notes = [f"Images are {height} x {width} pixels, any number at a time; ONNX opset {OPSET}.", "The mask token is left out."]
    if isinstance(tower, ResNetTower):
        notes[1:] = ["`cls` is the mean of the last feature map, `patches` are its cells."]
    if networks.text is not None:
        notes.append("The text tower is not in the graph: export to open_clip for it.")
    if pooled:
        notes.append("The attention pooling over patches is not in the graph.")
    return usage, notes
