"""Towers of other channels: built, started from RGB weights by each rule, exported and loaded again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.config.schema import Config
from pipeline.config.validate import check
from pipeline.errors import CheckpointError, ConfigError
from pipeline.models.resnet import build_trunk
from pipeline.models.settings import ModelSettings
from pipeline.models.vision import VisionTower, build_tower
from pipeline.weights import init_from
from pipeline.weights.export.networks import read
from pipeline.weights.export.write import write
from pipeline.weights.input_channels import inflated
from pipeline.weights.public_layouts import fit
from tests.helpers.exported import CLIP, DINO, MODEL, checkpoint, settings

CHANNELS: dict[str, Any] = {
    "count": 5,
    "names": ["blue", "green", "red", "nir", "swir"],
    "dtype": "uint16",
    "rgb": ["red", "green", "blue"],
    "mean": [0.1, 0.2, 0.3, 0.4, 0.5],
    "std": [0.5, 0.4, 0.3, 0.2, 0.1],
}


def with_channels(
    method: dict[str, Any], *, channels: dict[str, Any] | None = None, init: dict[str, Any] | None = None, **model: Any
) -> Config:
    return Config.model_validate(
        {
            "run": {"name": "toy"},
            "method": method,
            "model": {**MODEL, **model},
            "data": {"shards": ["nowhere.tar"], "channels": CHANNELS | (channels or {})},
            "init_from": init or {},
        }
    )


@pytest.mark.parametrize(
    "model", [{}, {"stem": "conv"}, {"pos_embed": "rope"}, {"pre_norm": True}, {"ffn": "swiglu", "embed_dim": 48}]
)
@pytest.mark.parametrize("count", [1, 2, 5, 16])
def test_towers_have_a_patch_embedding_for_each_number_of_channels(model: dict[str, Any], count: int) -> None:
    tower = build_tower(ModelSettings(**{**MODEL, **model}, in_channels=count), image_size=32)
    tokens = tower(torch.zeros(2, count, 32, 32))
    assert tokens.patches.shape[:2] == (2, 16) and tower.in_channels == count
    rgb = build_tower(ModelSettings(**{**MODEL, **model}), image_size=32)
    assert "in_chans" not in rgb.timm_args and rgb.in_channels == 3


@pytest.mark.parametrize("stem", ["patch", "small", "small_pooled"])
def test_resnets_too(stem: str) -> None:
    tower = build_trunk(ModelSettings(timm_name="resnet18", stem=stem, in_channels=4), image_size=32)  # type: ignore[arg-type]
    assert tower(torch.zeros(2, 4, 64, 64)).cls.shape == (2, 512)


@pytest.mark.parametrize(("rule", "count"), [("mean", 5), ("repeat", 5), ("repeat", 2), ("mean", 1)])
def test_an_image_whose_channels_are_alike_is_seen_as_before(rule: str, count: int) -> None:
    weight = torch.randn(8, 3, 4, 4)
    if count < 3 and rule == "repeat":
        weight = weight.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    gray = torch.randn(2, 1, 4, 4)
    before = torch.nn.functional.conv2d(gray.expand(-1, 3, -1, -1), weight)
    more = inflated(weight, count, rule, where="")
    assert more.shape == (8, count, 4, 4)
    if rule == "mean" or count % 3 == 0 or count < 3:
        torch.testing.assert_close(torch.nn.functional.conv2d(gray.expand(-1, count, -1, -1), more), before)
    else:
        assert torch.equal(more[:, 3], more[:, 0]) and torch.allclose(more[:, 1] * count / 3, weight[:, 1])


def test_a_list_gives_each_channel_its_colour() -> None:
    weight = torch.randn(8, 3, 4, 4)
    more = inflated(weight, 5, ("blue", "green", "red", "mean", "zero"), where="")
    assert torch.equal(more[:, :3], weight.flip(1)) and torch.equal(more[:, 3], weight.mean(1)) and not more[:, 4].any()
    with pytest.raises(CheckpointError, match="names 2 colours for 5 channels"):
        inflated(weight, 5, ("blue", "green"), where="there")


@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_weights_for_rgb_start_a_run_of_other_channels(tmp_path: Path, stem: str) -> None:
    rgb = build_tower(ModelSettings(**MODEL, stem=stem), image_size=32)  # type: ignore[arg-type]
    with torch.no_grad():
        for p in rgb.parameters():
            p += torch.randn_like(p) * 0.1
    torch.save(rgb.vit.state_dict(), tmp_path / "rgb.pth")
    rule = ["blue", "green", "red", "zero", "zero"]
    config = with_channels(DINO, init={"source": str(tmp_path / "rgb.pth"), "input_channels": rule}, stem=stem)
    init_from.check(config)
    from pipeline.methods.registry import build_method

    method = build_method(config)
    start = init_from.begin(method, config)
    assert start is not None and any("5 channels instead of RGB: they begin as blue, green, red" in note for note in start.notes)
    tower = method.get_submodule("backbone")
    assert isinstance(tower, VisionTower)
    images = torch.randn(2, 5, 32, 32)
    rgb.eval(), tower.eval()
    with torch.no_grad():
        torch.testing.assert_close(tower(images).cls, rgb(images[:, :3].flip(1)).cls)


def test_weights_of_other_channels_do_not_start_a_run_of_rgb() -> None:
    other = build_tower(ModelSettings(**MODEL, in_channels=5), image_size=32)
    with pytest.raises(CheckpointError, match="of another shape"):
        fit(other.vit.state_dict(), build_tower(ModelSettings(**MODEL), image_size=32), where="there")
    fit(other.vit.state_dict(), build_tower(ModelSettings(**MODEL, in_channels=5), image_size=32), where="there")


@pytest.mark.parametrize("model", [{}, {"pos_embed": "rope"}])
def test_timm_loads_the_export(tmp_path: Path, model: dict[str, Any]) -> None:
    import timm

    saved, method = checkpoint(tmp_path, with_channels(DINO, **model))
    folder = write(read(saved), "timm", tmp_path / "out")
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.randn(3, 5, 32, 32)
    with torch.inference_mode():
        ours = method.export()["backbone"](images)
        theirs = loaded.forward_features(images)
    torch.testing.assert_close(theirs[:, 0], ours.cls, atol=2e-6, rtol=1e-5)
    config = json.loads((folder / "config.json").read_text())
    assert config["model_args"]["in_chans"] == 5 and config["pretrained_cfg"]["input_size"] == [5, 32, 32]
    assert config["pretrained_cfg"]["mean"] == CHANNELS["mean"] and config["fovea"]["channels"] == CHANNELS["names"]
    card = (folder / "README.md").read_text()
    assert "| channels | 5: blue, green, red, nir, swir |" in card and "values divided by 65535" in card
    assert "0.1, 0.2, 0.3, 0.4, 0.5" in card


def test_onnx_runs_the_export(tmp_path: Path) -> None:
    import onnxruntime

    saved, method = checkpoint(tmp_path, with_channels(DINO))
    folder = write(read(saved), "onnx", tmp_path / "out")
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    images = torch.randn(3, 5, 32, 32)
    cls, _ = session.run(None, {"images": images.numpy()})
    with torch.inference_mode():
        assert np.allclose(cls, method.export()["backbone"](images).cls.numpy(), atol=1e-4)
    about = json.loads((folder / "preprocessor.json").read_text())
    assert about["channels"] == CHANNELS["names"] and about["dtype"] == "uint16" and about["std"] == CHANNELS["std"]


def test_safetensors_start_another_run(tmp_path: Path) -> None:
    saved, _ = checkpoint(tmp_path, with_channels(DINO))
    folder = write(read(saved), "safetensors", tmp_path / "out")
    init_from.check(with_channels(DINO, init={"source": str(folder / "model.safetensors")}))
    assert json.loads((folder / "config.json").read_text())["fovea"]["channels"]["names"] == CHANNELS["names"]


@pytest.mark.parametrize(("format_", "method"), [("huggingface", DINO), ("open_clip", CLIP)])
def test_formats_for_rgb_images_refuse_others(tmp_path: Path, format_: str, method: dict[str, Any]) -> None:
    saved, _ = checkpoint(tmp_path, with_channels(method))
    with pytest.raises(ConfigError, match="5 channels"):
        write(read(saved), format_, tmp_path / "out")


def test_exports_of_rgb_say_nothing_of_channels(tmp_path: Path) -> None:
    saved, _ = checkpoint(tmp_path, settings(DINO))
    folder = write(read(saved), "timm", tmp_path / "out")
    assert "fovea" not in json.loads((folder / "config.json").read_text())
    assert "channels" not in read(saved).preprocessing.document()


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"channels": {"mean": None, "std": None}}, "data.channels.mean"),
        ({"in_channels": 3}, "model.in_channels"),
        ({"init": {"source": "x.pth", "input_channels": ["red"]}}, "init_from.input_channels"),
    ],
)
def test_settings_that_do_not_fit_are_named(change: dict[str, Any], key: str) -> None:
    assert check(with_channels(DINO)) == []
    assert [where for where, _ in check(with_channels(DINO, **change))] == [key]


def test_augmentation_of_channels_needs_channels() -> None:
    for name in ("gain", "offset", "noise", "channel_dropout"):
        config = settings({**DINO, "augment": {name: 0.2}})
        assert [key for key, _ in check(config)] == [f"method.augment.{name}"]


def test_a_missing_library_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "tifffile" else real(name, *rest))
    ((key, text),) = check(with_channels(DINO))
    assert key == "data.channels" and "pip install 'fovea[scientific]'" in text
