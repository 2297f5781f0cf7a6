"""Low-rank adapters: nothing changes at first, merging changes nothing, and little is trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.models.lora import LoRALinear, add_lora, is_factor, merge_lora, merged_state
from pipeline.models.settings import ModelSettings
from pipeline.models.vision import VisionTower, build_tower

SIZES: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 4}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "SwiGLU, registers": {"ffn": "swiglu", "registers": 2},
    "rotary": {"pos_embed": "rope", "registers": 2},
    "rotary SwiGLU": {"pos_embed": "rope", "ffn": "swiglu"},
    "CLIP": {"pre_norm": True, "activation": "quick_gelu", "layer_scale": None},
    "SigLIP": {"pooling": "attention"},
    "stochastic depth": {"drop_path": 0.3},
}
BOTH = ("attention", "mlp")


def tower(**changes: Any) -> VisionTower:
    torch.manual_seed(0)
    made = build_tower(ModelSettings(**(SIZES | changes)), image_size=16)
    with torch.no_grad():
        for p in made.parameters():
            p += 0.2 * torch.randn_like(p)
    return made


def everything(made: VisionTower, *, train: bool = False) -> Tensor:
    """Tokens of images with and without masks, all or some of them."""
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    mask = torch.rand(4, 16, generator=torch.Generator().manual_seed(2)) < 0.5
    made.train(train)
    torch.manual_seed(3)
    all_of, some = made(images, mask), made(images, patches=torch.tensor([0, 5, 40]))
    return torch.cat([all_of.cls, all_of.patches.flatten(0, 1), some.cls, some.patches])


def moved(made: VisionTower) -> VisionTower:
    with torch.no_grad():
        for module in made.modules():
            if isinstance(module, LoRALinear):
                module.lora_up.normal_(std=0.3)
    return made


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_at_first_the_features_are_the_same_bit_for_bit(kind: str, train: bool) -> None:
    plain, adapted = tower(**KINDS[kind]), tower(**KINDS[kind])
    add_lora(adapted, BOTH, rank=4, alpha=8.0)
    assert torch.equal(everything(plain, train=train), everything(adapted, train=train))
    names = {name for name, _ in adapted.named_parameters() if not is_factor(name)}
    assert names == {name for name, _ in plain.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_merged_the_features_are_the_same_within_rounding(kind: str) -> None:
    adapted = tower(**KINDS[kind])
    add_lora(adapted, BOTH, rank=4, alpha=8.0)
    before, at_first = everything(moved(adapted)).detach(), everything(tower(**KINDS[kind])).detach()
    state = merged_state(dict(adapted.state_dict()), 2.0)
    merge_lora(adapted)
    assert not any(is_factor(name) for name, _ in adapted.named_parameters())
    after = everything(adapted).detach()
    assert float((after - before).norm()) < 1e-6 * float(before.norm())
    assert float((after - at_first).norm()) > 1e-2 * float(before.norm())
    assert state.keys() == adapted.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in adapted.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_all_factors_and_nothing_else(kind: str) -> None:
    adapted = tower(**KINDS[kind])
    add_lora(adapted, BOTH, rank=4, alpha=8.0)
    everything(moved(adapted)).square().sum().backward()
    for name, parameter in adapted.named_parameters():
        trained = is_factor(name) or name == "mask_token"
        assert parameter.requires_grad == trained and (parameter.grad is not None and bool(parameter.grad.any())) == trained, name


def test_targets_and_the_first_factor_can_be_left_out() -> None:
    adapted = tower()
    add_lora(adapted, ("attention",), rank=4, alpha=8.0, train_down=False)
    assert isinstance(adapted.vit.blocks[0].attn.qkv, LoRALinear) and not isinstance(adapted.vit.blocks[0].mlp.fc1, LoRALinear)
    trained = {name.rpartition(".")[2] for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained == {"lora_up", "mask_token"}


def test_a_rank_as_wide_as_the_projection_is_refused() -> None:
    with pytest.raises(ConfigError, match="not below the width"):
        add_lora(tower(), BOTH, rank=32, alpha=1.0)


@pytest.mark.parametrize(("width", "depth", "heads"), [(384, 12, 6), (768, 12, 12), (1024, 24, 16)])
def test_the_default_trains_at_most_a_twentieth(width: int, depth: int, heads: int) -> None:
    with torch.device("meta"):
        made = build_tower(ModelSettings(embed_dim=width, depth=depth, num_heads=heads, patch_size=14), image_size=224)
        full = sum(p.numel() for p in made.parameters())
        add_lora(made, BOTH, rank=8, alpha=16.0)
    assert 0 < sum(p.numel() for p in made.parameters() if p.requires_grad) <= 0.05 * full
