"""The text tower: open_clip's features, the end mark, the scale's bounds."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pipeline.data.augment.views import TextSpec
from pipeline.data.loader.text import Tokenizer
from pipeline.errors import CheckpointError, ConfigError
from pipeline.methods.clip.settings import TEXT_SIZES
from pipeline.models.text import LogitScale, TextTower, from_open_clip, to_open_clip
from pipeline.models.text_weights import load_text

WIDTH, CONTEXT = 32, 8


def small(**changes: object) -> TextTower:
    torch.manual_seed(0)
    sizes: dict[str, object] = {"width": WIDTH, "depth": 2, "heads": 4, "embed": 12, "context": CONTEXT, **changes}
    return TextTower(**sizes)  # type: ignore[arg-type]


def test_sizes_are_those_of_open_clip() -> None:
    spec = importlib.util.find_spec("open_clip")
    assert spec is not None and spec.origin is not None
    for name, ours in TEXT_SIZES.items():
        theirs = json.loads((Path(spec.origin).parent / "model_configs" / f"{name}.json").read_text())
        text = theirs["text_cfg"]
        assert (ours.embed, ours.width, ours.depth, ours.heads) == (
            *(theirs["embed_dim"], text["width"], text["layers"]),
            text["heads"],
        ), name


@pytest.mark.slow
@pytest.mark.parametrize("quick_gelu", [False, True])
def test_features_are_open_clips_for_its_weights_cut_captions_included(quick_gelu: bool) -> None:
    import open_clip

    sizes = TEXT_SIZES["ViT-B-32"]
    torch.manual_seed(0)
    theirs = open_clip.CustomTextCLIP(
        sizes.embed,
        vision_cfg={"layers": 1, "width": 64, "patch_size": 32, "image_size": 32},
        text_cfg={"context_length": 77, "vocab_size": 49408, "width": sizes.width, "heads": sizes.heads, "layers": sizes.depth},
        quick_gelu=quick_gelu,
    ).eval()
    ours = TextTower(width=sizes.width, depth=sizes.depth, heads=sizes.heads, embed=sizes.embed, quick_gelu=quick_gelu)
    ours.load_state_dict(from_open_clip(theirs.state_dict()))
    captions = ["a diagram", "a photo of a dog", "photograph " * 100, ""]
    tokens = torch.from_numpy(Tokenizer(TextSpec())(captions))
    assert tokens[2, -3:].tolist() == [8853, 8853, 49407]
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs.encode_text(tokens), atol=1e-5, rtol=0)


def test_weights_go_to_open_clips_layout_and_back() -> None:
    tower = small()
    state = tower.state_dict()
    custom = to_open_clip(state)
    assert "text.transformer.resblocks.1.attn.in_proj_weight" in custom
    plain = {name.removeprefix("text."): tensor for name, tensor in custom.items()}
    for layout in (custom, plain):
        back = from_open_clip(layout)
        assert back.keys() == state.keys()
        assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


def test_a_tower_is_filled_from_a_file_of_either_layout_and_refuses_another(tmp_path: Path) -> None:
    first = small()
    with torch.no_grad():
        first.positions += 1
    save_file(to_open_clip(first.state_dict()), tmp_path / "open_clip.safetensors")
    save_file({f"text_tower.{name}": t for name, t in first.state_dict().items()}, tmp_path / "own.safetensors")
    for file in ("open_clip", "own"):
        second = small()
        load_text(second, tmp_path / f"{file}.safetensors")
        assert torch.equal(second.positions, first.positions)
        assert torch.equal(second.blocks[1].get_parameter("fc2.weight"), first.blocks[1].get_parameter("fc2.weight"))
    with pytest.raises(CheckpointError, match="do not match"):
        load_text(small(embed=9), tmp_path / "own.safetensors")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_text(small(), tmp_path / "absent.safetensors")


def test_initial_deviations_are_clips() -> None:
    tower = TextTower(width=512, depth=12, heads=8, embed=512, vocabulary=3000)
    block = tower.blocks[3]
    for tensor, std in (
        (tower.tokens.weight, 0.02),
        (tower.positions, 0.01),
        (tower.projection.weight, 0.0442),
        (block.get_parameter("qkv.weight"), 0.0442),
        (block.get_parameter("proj.weight"), 0.00902),
        (block.get_parameter("fc1.weight"), 0.03125),
        (block.get_parameter("fc2.weight"), 0.00902),
    ):
        assert float(tensor.std()) == pytest.approx(std, rel=0.02)


def test_what_stands_behind_the_end_mark_is_not_read() -> None:
    tower = small()
    tokens = torch.tensor([[49406, 320, 1929, 49407, 0, 0, 0, 0], [49406, 320, 1929, 49407, 5, 49407, 7, 49406]])
    with torch.no_grad():
        torch.testing.assert_close(tower(tokens)[0], tower(tokens)[1])
        other = tokens.clone()
        other[0, 2] = 1930
        assert (tower(other)[0] - tower(tokens)[0]).abs().max() > 1e-3


def test_a_text_without_end_mark_is_read_at_its_last_place_and_not_at_its_first() -> None:
    tower = small()
    tokens = torch.tensor([[49406, 1, 2, 3, 4, 5, 6, 7], [49406, 9, 8, 7, 6, 5, 4, 3]])
    with torch.no_grad():
        assert (tower(tokens)[0] - tower(tokens)[1]).abs().max() > 1e-3


def test_plain_products_of_bf16_on_a_cpu_are_the_fused_attention() -> None:
    tower = small()
    tokens = torch.randint(1, 400, (3, CONTEXT))
    with torch.no_grad():
        exact = tower(tokens)
        with torch.autocast("cpu", torch.bfloat16):
            rough = tower(tokens)
    torch.testing.assert_close(rough.float(), exact, atol=0.05 * float(exact.abs().max()), rtol=0)
    both_ways = small(causal=False)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert (both_ways(tokens) - rough).abs().max() > 0.05


def test_forgetting_activations_changes_no_gradient() -> None:
    gradients = []
    for forget in (False, True):
        tower = small()
        tower.checkpointing = forget
        tower(torch.randint(1, 400, (3, CONTEXT), generator=torch.Generator().manual_seed(0))).square().sum().backward()
        gradients.append({name: p.grad for name, p in tower.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_learning_rates_fall_from_block_to_block() -> None:
    tower = small()
    scales = {id(p): scale for p, scale in tower.lr_scales(0.5, 2.0)}
    assert scales[id(tower.positions)] == 2 * 0.5**3
    assert scales[id(tower.blocks[0].get_parameter("fc1.bias"))] == 2 * 0.5**2
    assert scales[id(tower.blocks[1].get_parameter("fc1.bias"))] == 2 * 0.5
    assert scales[id(tower.projection.weight)] == scales[id(tower.norm.bias)] == 2.0
    assert len(scales) == len(list(tower.parameters()))


def test_the_scale_starts_where_it_should_and_never_leaves_its_bounds() -> None:
    scale = LogitScale(1 / 0.07, bias=-10.0)
    assert scale.log_scale.shape == (1,) and scale.bias is not None and scale.bias.shape == (1,)
    assert float(scale.log_scale) == pytest.approx(2.6592600)
    assert float(scale()[0]) == pytest.approx(1 / 0.07)
    for value, expected in ((9.0, 100.0), (-3.0, 1.0), (math.log(100.0), 100.0)):
        with torch.no_grad():
            scale.log_scale.fill_(value)
        assert float(scale()[0]) == pytest.approx(expected)
    with pytest.raises(ConfigError):
        LogitScale(200.0)


@pytest.mark.parametrize(
    ("value", "slope", "passes"), [(5.0, 1.0, True), (5.0, -1.0, False), (-1.0, 1.0, False), (-1.0, -1.0, True)]
)
def test_beyond_a_bound_only_the_way_back_is_open(value: float, slope: float, passes: bool) -> None:
    scale = LogitScale(10.0)
    with torch.no_grad():
        scale.log_scale.fill_(value)
    (slope * scale()[0]).sum().backward()
    assert scale.log_scale.grad is not None
    assert bool(scale.log_scale.grad.any()) == passes


def test_a_scale_that_went_too_far_comes_back() -> None:
    scale = LogitScale(50.0)
    with torch.no_grad():
        scale.log_scale.fill_(6.0)
    optimizer = torch.optim.SGD(nn.ModuleList([scale]).parameters(), lr=0.01)
    for _ in range(5):
        optimizer.zero_grad()
        scale()[0].sum().backward()
        optimizer.step()
    assert float(scale()[0]) < 100.0
