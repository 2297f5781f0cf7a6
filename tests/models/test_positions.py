"""Learned positions on another grid: the values of both references, and what a tower does with them."""

from __future__ import annotations

import pytest
import torch

from pipeline.models.positions import Resampling, resample_positions
from pipeline.models.settings import ModelSettings
from pipeline.models.vision import VisionTower, build_tower

VECTORS: dict[Resampling, dict[tuple[int, int], float]] = {
    "offset": {(0, 0): 5.847847, (0, 1): 8.156428, (1, 0): 28.933674, (3, 3): 81.554672, (6, 6): 156.268631},
    "plain": {(0, 0): 6.034164, (0, 1): 8.385749, (1, 0): 29.550011, (3, 3): 82.500015, (6, 6): 158.965851},
    "antialias": {(0, 0): 7.657401, (0, 1): 9.841044, (1, 0): 29.493845, (3, 3): 82.499992, (6, 6): 157.342560},
}


def tower(how: Resampling, registers: int = 0) -> VisionTower:
    torch.manual_seed(0)
    model = ModelSettings(embed_dim=16, depth=1, num_heads=2, patch_size=4, registers=registers, pos_embed_interpolation=how)
    return build_tower(model, image_size=16).eval()


@pytest.mark.parametrize("how", VECTORS)
def test_sixteen_to_seven_gives_the_values_of_the_reference(how: Resampling) -> None:
    i, j = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    positions = torch.cat([torch.full((1, 1, 1), -5.0), (10 * i + j).reshape(1, 256, 1)], dim=1)
    new = resample_positions(positions, (7, 7), (16, 16), prefix=1, how=how)
    assert new.shape == (1, 50, 1) and float(new[0, 0, 0]) == -5.0
    grid = new[0, 1:, 0].reshape(7, 7)
    assert {place: float(grid[place]) for place in VECTORS[how]} == pytest.approx(VECTORS[how], abs=2e-4)


@pytest.mark.parametrize("how", VECTORS)
def test_the_same_grid_gives_the_positions_themselves(how: Resampling) -> None:
    positions = torch.randn(1, 12, 3)
    assert resample_positions(positions, (3, 4), (3, 4), how=how) is positions


@pytest.mark.parametrize("registers", [0, 2])
def test_a_tower_resamples_as_it_is_told(registers: int) -> None:
    small, own = torch.randn(1, 3, 8, 12), torch.randn(1, 3, 16, 16)
    towers = {how: tower(how, registers) for how in VECTORS}
    with torch.no_grad():
        features = {how: t(small).patches for how, t in towers.items()}
        assert torch.equal(towers["antialias"](own).patches, towers["offset"](own).patches)
    assert not torch.allclose(features["antialias"], features["offset"], atol=1e-4)
    assert not torch.allclose(features["plain"], features["offset"], atol=1e-4)
    # A tower whose positions were resampled beforehand, once, says the same.
    for how, t in towers.items():
        ready = build_tower(
            ModelSettings(embed_dim=16, depth=1, num_heads=2, patch_size=4, registers=registers), image_size=16
        ).eval()
        ready.load_state_dict(t.state_dict())
        prefix = 0 if registers else 1
        ready.vit.patch_embed.grid_size = (2, 3)
        ready.vit.pos_embed.data = resample_positions(t.vit.pos_embed.data, (2, 3), (4, 4), prefix=prefix, how=how)
        with torch.no_grad():
            assert torch.equal(ready(small).patches, features[how])
