"""Towers for rectangular images: their positions from square weights and from their own, and their exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor

from pipeline.config.sizes import Size
from pipeline.data.augment.plan import centred_boxes
from pipeline.errors import ConfigError
from pipeline.models.positions import resample_positions
from pipeline.models.settings import ModelSettings
from pipeline.models.vision import VisionTower, build_tower
from pipeline.weights import pretrained
from pipeline.weights.export.networks import read as networks
from pipeline.weights.export.write import write as export
from pipeline.weights.public_layouts import fit
from tests.helpers.exported import DINO, checkpoint, settings

WIDE = {**DINO, "views": {"global_size": [16, 48], "local_count": 0}}
CPU = torch.device("cpu")


def tower(size: Size, **more: Any) -> VisionTower:
    torch.manual_seed(0)
    built = build_tower(ModelSettings(embed_dim=32, depth=1, num_heads=2, patch_size=8, **more), image_size=size)
    return built.eval()


def positions(one: VisionTower) -> Tensor:
    return one.vit.pos_embed.detach()  # type: ignore[no-any-return]


@pytest.mark.parametrize("more", [{}, {"registers": 2}, {"pos_embed": "rope"}])
def test_a_rectangular_tower_sees_images_of_any_shape(more: dict[str, Any]) -> None:
    one = tower((16, 48), **more)
    for shape, patches in (((16, 48), 12), ((48, 16), 12), ((32, 32), 16)):
        assert one(torch.zeros(2, 3, *shape)).patches.shape == (2, patches, 32)


@pytest.mark.parametrize(("size", "grid"), [((16, 48), (2, 6)), ((16, 128), (2, 16))])
def test_square_weights_are_resampled_to_the_grid(size: Size, grid: tuple[int, int]) -> None:
    """Also where the square has as many positions as the rectangle, 4 x 4 and 2 x 8."""
    source, one = tower(32), tower(size)
    fitted = fit(source.vit.state_dict(), one, where="x").weights["vit.pos_embed"]
    assert torch.equal(fitted, resample_positions(positions(source), grid, (4, 4), prefix=1))
    same = fit(tower(32).vit.state_dict(), tower((16, 64)), where="x").weights["vit.pos_embed"]
    assert torch.equal(same, resample_positions(positions(source), (2, 8), (4, 4), prefix=1))


def test_rectangular_weights_are_kept_where_their_grid_is_known() -> None:
    source = tower((16, 64))
    state = source.vit.state_dict()
    assert torch.equal(fit(state, tower((16, 64)), where="x", grid=(2, 8)).weights["vit.pos_embed"], positions(source))
    square = fit(state, tower(32), where="x", grid=(2, 8)).weights["vit.pos_embed"]
    assert torch.equal(square, resample_positions(positions(source), (4, 4), (2, 8), prefix=1))


def test_init_from_a_rectangular_run_keeps_its_positions(tmp_path: Path) -> None:
    from pipeline.methods.registry import build_method
    from pipeline.weights.init_from import begin

    own = {**WIDE, "views": {"global_size": [16, 64], "local_count": 0}}
    saved, method = checkpoint(tmp_path / "run", settings(own))
    config = settings(own)
    config = config.replace(init_from=config.init_from.model_copy(update={"source": str(saved.path), "network": "student"}))
    started = build_method(config)
    begin(started, config, record=False)
    assert torch.equal(positions(started.get_submodule("backbone")), positions(method.get_submodule("backbone")))


@pytest.mark.parametrize("size", [None, (32, 64), 32])
def test_timms_own_model_computes_the_same(tmp_path: Path, size: Size | None) -> None:
    saved, _ = checkpoint(tmp_path / "run", settings(WIDE))
    source = networks(saved, size=size)
    folder = export(source, "timm", tmp_path / "timm")
    shape = (16, 48) if size is None else (size, size) if isinstance(size, int) else size
    about = json.loads((folder / "config.json").read_text())
    assert about["pretrained_cfg"]["input_size"] == [3, *shape]
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert tuple(model.patch_embed.grid_size) == (shape[0] // 8, shape[1] // 8)
    images = torch.randn(2, 3, *shape)
    with torch.inference_mode():
        ours, theirs = source.tower(images), model.forward_features(images)
        loaded = pretrained.load(str(folder), model=None, device=CPU)
        again = loaded.subject.tokens(images)
    assert torch.allclose(ours.patches, theirs[:, 1:], atol=1e-5) and torch.allclose(again.cls, ours.cls, atol=1e-5)
    assert loaded.size == (size or (16, 48))
    if size is None:
        assert "16 x 48 pixels (height x width), the largest centered part" in (folder / "README.md").read_text()


def test_timms_transform_cuts_the_box_of_evaluations(tmp_path: Path) -> None:
    saved, _ = checkpoint(tmp_path / "run", settings(WIDE))
    folder = export(networks(saved), "timm", tmp_path / "timm")
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    y, x = np.mgrid[0:160, 0:240]
    picture = np.stack([y, x, 0 * x], axis=2).astype(np.uint8)
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (model.pretrained_cfg["mean"], model.pretrained_cfg["std"]))
    seen = (transform(Image.fromarray(picture)) * std + mean) * 255
    assert seen.shape == (3, 16, 48)
    top, left, height, width = centred_boxes(np.array([[160, 240]]), (16, 48), 1.0, 0.5)[0].tolist()
    rows = top + (np.arange(16) + 0.5) * height / 16 - 0.5
    columns = left + (np.arange(48) + 0.5) * width / 48 - 0.5
    assert np.abs(seen[0].numpy() - rows[:, None]).max() < 2 and np.abs(seen[1, :, 2:-2].numpy() - columns[None, 2:-2]).max() < 2


@pytest.mark.parametrize("layout", ["huggingface"])
def test_formats_of_square_images_refuse_and_name_others(tmp_path: Path, layout: str) -> None:
    saved, _ = checkpoint(tmp_path / "run", settings(WIDE))
    with pytest.raises(ConfigError, match="the format is for square images, and these have 16 x 48 pixels"):
        export(networks(saved), layout, tmp_path / "out")
    with pytest.raises(ConfigError, match="images of 20 x 48 pixels are not divisible into patches of 8"):
        networks(saved, size=(20, 48))
