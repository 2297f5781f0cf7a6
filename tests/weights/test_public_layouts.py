"""Weights from elsewhere: public layouts come out exactly, and whatever does not fit is named."""

from __future__ import annotations

import re
from typing import Any

import pytest
import timm
import torch
from timm.models.eva import checkpoint_filter_fn as eva_filter
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor

from pipeline.errors import CheckpointError
from pipeline.models.settings import ModelSettings
from pipeline.models.vision import VisionTower, build_tower
from pipeline.weights.public_layouts import fit, unwrapped

TINY: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 4}


def tower(size: int = 16, **changes: Any) -> VisionTower:
    torch.manual_seed(0)
    return build_tower(ModelSettings(**(TINY | changes)), image_size=size).eval()


def public(of: VisionTower, grid: int, *, chunks: bool = False) -> dict[str, Tensor]:
    """A state dict as DINOv2's public files have it, for the architecture of a tower, with random weights."""
    generator = torch.Generator().manual_seed(1)
    state: dict[str, Tensor] = {}
    for name, tensor in of.vit.state_dict().items():
        shape: tuple[int, ...] = tuple(tensor.shape)
        new = name.replace("reg_token", "register_tokens")
        if of.vit.blocks[0].mlp.fc1.out_features != of.vit.blocks[0].mlp.fc2.in_features:  # SwiGLU
            new = new.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3")
        if name == "pos_embed":
            shape = (1, 1 + grid * grid, shape[2])
        if chunks:
            new = re.sub(r"^blocks\.(\d+)\.", r"blocks.0.\1.", new)
        state[new] = torch.randn(shape, generator=generator) * 0.2
    state["mask_token"] = torch.randn(1, of.width, generator=generator)
    return state


def filled(target: VisionTower, state: dict[str, Tensor]) -> tuple[VisionTower, tuple[str, ...]]:
    fitted = fit(unwrapped(state)[0], target, where="here")
    missing, unexpected = target.load_state_dict(fitted.weights, strict=False)
    assert not unexpected and set(missing) <= {"mask_token", *(name for name, _ in target.named_buffers())}
    return target, fitted.notes


@pytest.mark.parametrize("changes", [{}, {"registers": 4}, {"ffn": "swiglu"}, {"ffn": "swiglu", "registers": 1}], ids=str)
@pytest.mark.parametrize("chunks", [False, True])
def test_public_weights_give_what_timm_makes_of_them(changes: dict[str, Any], chunks: bool) -> None:
    state = public(tower(**changes), 4, chunks=chunks)
    ours, _ = filled(tower(**changes), state)
    other = timm.create_model(ours.timm_name, **ours.timm_args).eval()
    plain = {re.sub(r"^blocks\.0\.(\d+)\.", r"blocks.\1.", name): t for name, t in state.items()} if chunks else dict(state)
    other.load_state_dict(checkpoint_filter_fn(plain, other), strict=True)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        tokens = ours(images)
        assert torch.equal(torch.cat([tokens.cls[:, None], tokens.registers, tokens.patches], 1), other.forward_features(images))
    assert torch.equal(ours.mask_token.flatten(), state["mask_token"].flatten())


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_dinov3s_layout_gives_what_timm_makes_of_it(ffn: str) -> None:
    source = tower(pos_embed="rope", registers=4, ffn=ffn)
    generator = torch.Generator().manual_seed(1)
    state: dict[str, Tensor] = {"mask_token": torch.randn(1, 32), "rope_embed.periods": torch.ones(4)}
    for name, tensor in source.vit.state_dict().items():
        new = name.replace("reg_token", "storage_tokens").replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")
        if ffn == "swiglu":
            new = new.replace("fc1_g", "w1").replace("fc1_x", "w2").replace("fc2", "w3")
        if name.endswith("v_bias"):
            continue
        shape = (96,) if name.endswith("q_bias") else tuple(tensor.shape)
        state[new.replace("q_bias", "qkv.bias")] = torch.randn(shape, generator=generator) * 0.2
    state["blocks.0.attn.qkv.bias_mask"] = torch.ones(96)
    ours, _ = filled(tower(pos_embed="rope", registers=4, ffn=ffn), state)
    other = timm.create_model(ours.timm_name, **ours.timm_args).eval()
    other.load_state_dict(eva_filter(dict(state), other), strict=True)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        tokens = ours(images)
        assert torch.equal(torch.cat([tokens.cls[:, None], tokens.registers, tokens.patches], 1), other.forward_features(images))
    assert torch.equal(ours.mask_token.flatten(), state["mask_token"].flatten())


def test_a_training_checkpoint_of_the_reference_is_unwrapped_and_what_is_left_out_is_said() -> None:
    state = public(tower(), 4)
    wrapped = {
        "teacher": {f"module.backbone.{name}": t for name, t in state.items()} | {"module.dino_head.mlp.0.weight": torch.ones(1)}
    }
    inner, notes = unwrapped(wrapped)
    assert inner.keys() == state.keys() and notes[1:] == ["left out beside the backbone: dino_head"]
    assert all(word in notes[0] for word in ("teacher", "module.", "backbone."))


@pytest.mark.parametrize("layout", ["official", "timm", "ours, merged", "ours, apart"])
def test_a_class_position_of_its_own_takes_every_layout(layout: str) -> None:
    apart, merged = tower(registers=4, cls_pos_embed=True), tower(registers=4)
    source = tower(registers=4, cls_pos_embed=layout == "ours, apart")
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.normal_(std=0.1)
    state = public(source, 1) if layout == "official" else source.vit.state_dict() if layout == "timm" else source.state_dict()
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        ours, others = (filled(one, state)[0](images) for one in (apart, merged))
        for a, b in zip(ours[:3], others[:3], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-6)
    if layout in ("official", "ours, apart"):
        assert bool(apart.class_position.any())  # type: ignore[union-attr]


def test_timms_own_weights_load_and_the_mask_token_starts_at_zero() -> None:
    source = tower(registers=2)
    state = timm.create_model(source.timm_name, **(source.timm_args | {"num_classes": 3})).state_dict()
    ours, notes = filled(tower(registers=2), state)
    assert all(torch.equal(ours.vit.state_dict()[name], state[name]) for name in ours.vit.state_dict())
    assert any("mask token" in note for note in notes) and sum("classifier" in note for note in notes) == 1


@pytest.mark.parametrize("how", ["antialias", "offset"])
@pytest.mark.parametrize("registers", [0, 3])
def test_another_grid_is_resampled_as_the_tower_would_and_said(how: str, registers: int) -> None:
    changes = {"registers": registers, "pos_embed_interpolation": how}
    source = tower(24, **changes)
    with torch.no_grad():
        for p in source.parameters():
            p.copy_(torch.randn_like(p) * 0.2)
    ours, notes = filled(tower(16, **changes), dict(source.state_dict()))
    assert notes == (f"positions are resampled from 6 x 6 to 4 x 4 patches (model.pos_embed_interpolation={how})",)
    images = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(ours(images).patches, source(images).patches)


def test_whether_it_fits_is_seen_without_any_content() -> None:
    state = {name: t.to("meta") for name, t in public(tower(24, registers=2), 6).items()}
    with torch.device("meta"):
        target = tower(16, registers=2)
    fitted = fit(state, target, where="here")
    assert fitted.weights["vit.pos_embed"].shape == (1, 16, 32) and len(fitted.notes) == 2


def test_a_norm_for_local_crops_starts_as_a_copy_and_is_left_out_where_none_is_wanted() -> None:
    state = public(tower(), 4)
    with_norm, notes = filled(tower(untie_local_norm=True), state)
    assert with_norm.local_norm is not None and torch.equal(with_norm.local_norm.weight, state["norm.weight"])
    assert any("copy of the final norm" in note for note in notes)
    assert filled(tower(), dict(with_norm.state_dict()))[1] == ("the source's norm for local crops is left out",)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"registers": 1}, r"1 missing: vit\.reg_token"),
        ({"depth": 3}, r"14 missing: vit\.blocks\.2\.norm1\.weight, .*…"),
        ({"depth": 1}, r"14 unexpected: vit\.blocks\.1\."),
        ({"layer_scale": None}, r"4 unexpected: vit\.blocks\.0\.ls1\.gamma"),
        ({"embed_dim": 64}, r"of another shape: mask_token \[1, 1, 32\] there, \[1, 1, 64\] here"),
        ({"patch_size": 8}, r"vit\.patch_embed\.proj\.weight \[32, 3, 4, 4\] there, \[32, 3, 8, 8\] here"),
        ({"ffn": "swiglu"}, r"vit\.blocks\.0\.mlp\.fc1\.weight"),
        ({"pos_embed": "rope"}, r"3 unexpected: vit\.pos_embed, vit\.blocks\.0\.attn\.qkv\.bias"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        fit(public(tower(), 4), tower(**changes), where="here")


def test_a_wrong_remap_cannot_pass_with_a_few_tensors() -> None:
    state = {f"encoder.{name}": tensor for name, tensor in public(tower(), 4).items()}
    with pytest.raises(CheckpointError, match=r"missing: vit\.cls_token"):
        fit(unwrapped(state)[0], tower(), where="here")
    with pytest.raises(CheckpointError, match="missing"):
        fit({}, tower(), where="here")
