"""The class token's attention, what is kept by it, and the decoder that fills the rest."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.models.attention import kept_and_removed, with_attention
from pipeline.models.decoder import Decoder, patchified, sincos_positions
from pipeline.models.settings import ModelSettings
from pipeline.models.tokens import Tokens, taken
from pipeline.models.vision import VisionTower, build_tower


def tower(registers: int = 0) -> VisionTower:
    torch.manual_seed(0)
    made = build_tower(
        ModelSettings(embed_dim=16, depth=3, num_heads=2, patch_size=4, layer_scale=None, registers=registers), image_size=16
    )
    with torch.no_grad():
        for block in made.vit.blocks:
            block.attn.qkv.weight.mul_(20)  # attention far from uniform
    return made.eval()


def whole_maps(made: VisionTower, images: Tensor) -> Tensor:
    """Attention of all tokens to all, ``[layers, batch, heads, tokens, tokens]``, the long way."""
    maps: list[Tensor] = []
    hooks = []
    for block in made.vit.blocks:

        def look(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            q, k, _ = module.qkv(x).reshape(*x.shape[:2], 3, module.num_heads, -1).permute(2, 0, 3, 1, 4)
            maps.append((q @ k.transpose(-2, -1) * module.head_dim**-0.5).softmax(-1))

        hooks.append(block.attn.register_forward_pre_hook(look))
    made(images)
    for hook in hooks:
        hook.remove()
    return torch.stack(maps)


@pytest.mark.parametrize("layers", ["all", "last"])
@pytest.mark.parametrize("registers", [0, 2])
def test_the_row_is_that_of_the_whole_map(layers: Literal["all", "last"], registers: int) -> None:
    made, images = tower(registers), torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        maps = whole_maps(made, images)
        tokens = with_attention(made, images, layers=layers)
        plain = made(images)
    expected = maps[0 if layers == "all" else -1 :].mean((0, 2))[:, 0, 1 + registers :]
    assert tokens.attention is not None
    torch.testing.assert_close(tokens.attention, expected, atol=1e-6, rtol=0)
    assert float(expected.std()) > 1e-2
    torch.testing.assert_close(tokens.patches, plain.patches)
    assert not any(block.attn.qkv._forward_hooks for block in made.vit.blocks)


def test_reference_cells_are_kept() -> None:
    scores = torch.tensor([[(37 * r) % 196 / 196 for r in range(196)]])
    keep, removed = kept_and_removed(scores, 14, 0.5)
    cells = [2, 3, 5, 8, 11, 15, 17, 18, 20, 21, 23, 24, 26, 27, 28, 30, 32, 36, 39, 41, 42, 43, 45, 47, 48]
    assert sorted({int(p) // 14 // 2 * 7 + int(p) % 14 // 2 for p in keep[0]}) == cells
    assert (keep.shape, removed.shape) == ((1, 100), (1, 96))
    gone = torch.zeros(196, dtype=torch.int64)
    gone[removed[0]] = 1
    assert "".join(map(str, gone[:14].tolist())) == "11110000110011"
    assert sorted(torch.cat([keep, removed], 1)[0].tolist()) == list(range(196))


def test_a_small_grid_by_hand() -> None:
    scores = [[0.10, 0.02, 0.05, 0.01], [0.08, 0.12, 0.03, 0.07], [0.04, 0.06, 0.09, 0.11], [0.01, 0.02, 0.13, 0.06]]
    keep, removed = kept_and_removed(torch.tensor(scores).view(1, 16), 4, 0.25)
    assert keep[0].tolist() == [0, 1, 4, 5, 10, 11, 14, 15]
    assert removed[0].tolist() == [2, 3, 6, 7, 8, 9, 12, 13]
    keep, _ = kept_and_removed(torch.tensor(scores).view(1, 16), 4, 0.25, cells=False, plus_one=False)
    assert keep[0].tolist() == [0, 5, 11, 14]


@pytest.mark.parametrize(
    ("grid", "ratio", "plus_one", "kept"),
    [
        (14, 0.5, True, 100),
        (14, 0.25, True, 52),
        (14, 0.75, True, 148),
        (14, 0.5, False, 96),
        (16, 0.5, True, 132),
        (2, 0.9, True, 0),
    ],
)
def test_counts_on_any_grid(grid: int, ratio: float, plus_one: bool, kept: int) -> None:
    scores = torch.rand(2, grid**2)
    if not kept:
        with pytest.raises(ConfigError):
            kept_and_removed(scores[:, :9], 3, ratio)
        return
    keep, removed = kept_and_removed(scores, grid, ratio, plus_one=plus_one)
    assert keep.shape[1] == kept and removed.shape[1] == grid**2 - kept
    assert bool((keep.diff(dim=1) > 0).all()) and bool((removed.diff(dim=1) > 0).all())


def test_each_sample_keeps_its_own() -> None:
    scores = torch.rand(5, 64)
    keep, _ = kept_and_removed(scores, 8, 0.5)
    for row in range(5):
        assert torch.equal(kept_and_removed(scores[row : row + 1], 8, 0.5)[0][0], keep[row])
    assert len({tuple(row) for row in keep.tolist()}) == 5


def test_pixels_of_a_patch_are_by_row_column_and_colour() -> None:
    c, h, w = torch.meshgrid(torch.arange(3), torch.arange(4), torch.arange(4), indexing="ij")
    pixels = patchified((100 * c + 10 * h + w)[None].float(), 2, standardise=False)
    assert pixels.shape == (1, 4, 12)
    assert pixels[0, 0].tolist() == [0, 100, 200, 1, 101, 201, 10, 110, 210, 11, 111, 211]
    assert [row[:3] for row in pixels[0, 1:3].tolist()] == [[2, 102, 202], [20, 120, 220]]


def test_standardised_pixels_have_unit_variance_and_a_constant_patch_none() -> None:
    images = torch.arange(12.0).view(1, 2, 2, 3).permute(0, 3, 1, 2)
    found = patchified(images, 2)
    assert found[0, 0, 0].item() == pytest.approx(-1.52542548, abs=1e-6)
    assert found[0, 0, -1].item() == pytest.approx(1.52542548, abs=1e-6)
    assert float(found.square().mean()) == pytest.approx(11 / 12, abs=1e-6)
    assert not patchified(torch.full((1, 3, 4, 4), 7.0), 2).any()


def test_the_decoder_puts_every_patch_in_its_place() -> None:
    torch.manual_seed(0)
    decoder = Decoder(16, grid=4, patch=2, heads=4)
    decoder.blocks = torch.nn.ModuleList()
    decoder.norm = torch.nn.Identity()  # type: ignore[assignment]
    decoder.embed = torch.nn.Identity()  # type: ignore[assignment]
    keep, removed = kept_and_removed(torch.rand(2, 16), 4, 0.5)
    values = torch.randn(2, 16, 16)
    tokens = Tokens(cls=torch.zeros(2, 16), registers=torch.zeros(2, 0, 16), patches=taken(values, keep), kept=keep)
    patches, pixels = decoder(tokens, removed, everywhere=True)
    positions = sincos_positions(4, 16)
    torch.testing.assert_close(taken(patches, keep), taken(values + positions, keep))
    torch.testing.assert_close(taken(patches, removed), taken((decoder.mask_token + positions).expand(2, -1, -1), removed))
    assert pixels.shape == (2, removed.shape[1], 12)


@pytest.mark.parametrize("depth", [1, 2])
def test_what_nobody_reads_changes_nothing_that_is_read(depth: int) -> None:
    torch.manual_seed(0)
    decoder = Decoder(16, grid=4, patch=2, depth=depth, heads=4).double()
    keep, removed = kept_and_removed(torch.rand(2, 16), 4, 0.5)
    seen = torch.randn(2, 1 + keep.shape[1], 16, dtype=torch.float64)
    tokens = Tokens(cls=seen[:, 0], registers=seen[:, :0], patches=seen[:, 1:], kept=keep)
    found = []
    for everywhere in (False, True):
        decoder.zero_grad()
        patches, pixels = decoder(tokens, removed, everywhere=everywhere)
        patches = taken(patches, removed) if everywhere else patches
        (patches.square().sum() + pixels.square().sum()).backward()
        found.append((patches, pixels, *(p.grad.clone() for p in decoder.parameters() if p.grad is not None)))
    for fewer, all_ in zip(*found, strict=True):
        torch.testing.assert_close(fewer, all_, rtol=1e-12, atol=1e-12)


def test_decoder_settings_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match="not divisible by 3 heads"):
        Decoder(16, grid=4, patch=2, heads=3)


def test_positions_are_those_of_a_grid() -> None:
    found = sincos_positions(3, 8)
    assert found.shape == (9, 8)
    torch.testing.assert_close(found[0], torch.tensor([0.0, 0.0, 1.0, 1.0] * 2))
    angles = torch.tensor([2.0, 0.02])  # row 1, column 2
    torch.testing.assert_close(found[5, :4], torch.cat([angles.sin(), angles.cos()]))
    torch.testing.assert_close(found[5, 4:], torch.cat([(angles / 2).sin(), (angles / 2).cos()]))
