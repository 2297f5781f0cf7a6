"""Exports of ResNets: loaded by the library they are for, with the run's own features; refused where there is no such format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.models.resnet import ResNetTower
from pipeline.weights.export.networks import read
from pipeline.weights.export.write import write
from tests.helpers.exported import checkpoint, settings

METHOD = {"name": "byol", "views": {"global_size": 32}, "head_hidden": 8, "head_out": 4}
NO_TRANSFORMER = {"embed_dim": None, "depth": None, "num_heads": None, "patch_size": None}
NARROW = {"resnet_width": 8, "resnet_blocks": [1, 1, 1, 1]}
KINDS: dict[str, dict[str, Any]] = {
    "narrow": {"timm_name": "resnet18", **NARROW},
    "deep stem": {"timm_name": "resnet10t", **NARROW},
    "small stem": {"timm_name": "resnet18", "stem": "small_pooled", "channels_last": True, **NARROW},
}
EXACT = 1e-4  # features are some hundreds


def images(size: int = 32) -> Tensor:
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))


def exported(folder: Path, kind: str, to: str) -> tuple[Path, ResNetTower]:
    saved, method = checkpoint(folder, settings(METHOD, **NO_TRANSFORMER, **KINDS[kind]))
    tower = method.export()["backbone"]
    assert isinstance(tower, ResNetTower)
    return write(read(saved), to, folder / "out"), tower.eval()


@pytest.mark.parametrize("kind", ["narrow", "deep stem"])
def test_timm_loads_a_narrow_resnet_and_gives_the_same_features(kind: str, tmp_path: Path) -> None:
    import timm

    folder, tower = exported(tmp_path, kind, "timm")
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.inference_mode():
        torch.testing.assert_close(model(images(64)), tower(images(64)).cls, atol=EXACT, rtol=1e-5)
    data = timm.data.resolve_data_config(model=model)
    assert tuple(data["input_size"]) == (3, 32, 32) and tuple(data["mean"]) == (0.485, 0.456, 0.406)
    text = (folder / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    assert "forward_features" not in code and "features = model(" in code


@pytest.mark.parametrize("kind", KINDS)
def test_safetensors_hold_the_tensors_of_timms_model(kind: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder, tower = exported(tmp_path, kind, "safetensors")
    state = {name.removeprefix("backbone.net."): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    assert state.keys() == tower.net.state_dict().keys()
    assert all(torch.equal(state[name], tensor.float()) for name, tensor in tower.net.state_dict().items())
    assert "`backbone.net.` holds" in (folder / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["deep stem", "small stem"])
def test_onnx_runtime_gives_the_same_features(kind: str, tmp_path: Path) -> None:
    import onnxruntime

    folder, tower = exported(tmp_path, kind, "onnx")
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    cls, patches = session.run(None, {"images": images().numpy()})
    with torch.inference_mode():
        tokens = tower(images())
    torch.testing.assert_close(torch.from_numpy(cls), tokens.cls, atol=EXACT, rtol=1e-5)
    torch.testing.assert_close(torch.from_numpy(patches), tokens.patches, atol=EXACT, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "to", "message"),
    [
        ("narrow", "huggingface", "the format is for vision transformers"),
        ("small stem", "timm", "timm has no ResNet with a small stem"),
    ],
)
def test_a_format_without_such_networks_is_refused_with_another(kind: str, to: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        exported(tmp_path, kind, to)
    assert not (tmp_path / "out").exists()
