"""Linear layers in 8-bit floats: near the plain ones, exactly what their rounded factors give, and off unless asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.methods.registry import build_method
from pipeline.models.fp8 import E4M3, rounded, scaled_product, use_fp8
from pipeline.models.settings import ModelSettings
from pipeline.models.vision import build_tower
from pipeline.training.build import prepare_towers
from tests.helpers.matrix import fast_only
from tests.helpers.tiny_methods import STEP, batch_at, config


def factors(*shape: int, seed: int = 0) -> Tensor:
    """Numbers whose rows have very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * 10.0 ** torch.linspace(-3, 3, shape[0])[:, None]


def test_a_product_is_that_of_the_rounded_factors_in_bf16() -> None:
    a, b = factors(24, 32), factors(48, 32, seed=1)
    (left, left_scale), (right, right_scale) = rounded(a), rounded(b)
    assert left.dtype == E4M3 and torch.equal(left.float().abs().amax(1), torch.full((24,), 448.0))
    exact = (left.double() * left_scale) @ (right.double() * right_scale).T
    torch.testing.assert_close(scaled_product(a, b).double(), exact, rtol=2**-8, atol=1e-30)
    assert float((scaled_product(a, b).double() - a.double() @ b.double().T).norm() / exact.norm()) < 0.05
    assert scaled_product(a[:0], b).shape == (0, 48) and not scaled_product(torch.zeros(2, 32), b).any()


def test_a_layer_is_near_the_plain_one_and_its_weights_gradient_is_a_bf16_product() -> None:
    torch.manual_seed(0)
    plain = nn.Linear(32, 48)
    layers = nn.Sequential(nn.Linear(32, 48))
    layers[0].load_state_dict(plain.state_dict())
    assert use_fp8(layers) == ["0"] and layers.state_dict().keys() == {"0.weight", "0.bias"}
    x = torch.randn(3, 5, 32)
    found = []
    for layer in (plain, layers):
        given = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(given)
        y.float().square().sum().backward()
        found.append((y, given.grad, layer.get_parameter("weight" if layer is plain else "0.weight").grad))
    for rough, fine in zip(found[1], found[0], strict=True):
        apart = float((rough - fine).detach().float().norm() / fine.detach().float().norm())
        assert 1e-3 < apart < 0.06
    slopes, given = 2 * found[1][0].float().bfloat16().flatten(0, 1), x.bfloat16().flatten(0, 1)
    torch.testing.assert_close(found[1][2], (slopes.t() @ given).float())
    assert torch.equal(layers(x), plain(x)), "outside of autocast, as in evaluation, it is the plain layer"


def test_layers_of_other_sizes_and_the_last_projection_stay() -> None:
    tower = build_tower(ModelSettings(embed_dim=48, depth=2, num_heads=2, patch_size=4, mlp_ratio=1.5), image_size=8)
    assert use_fp8(tower.vit.blocks) == ["0.attn.qkv", "0.attn.proj", "1.attn.qkv"], "72 is no multiple of 16"


def test_a_rotary_tower_computes_its_queries_keys_and_values_so_too() -> None:
    tower = build_tower(ModelSettings(embed_dim=64, depth=1, num_heads=2, patch_size=4, pos_embed="rope"), image_size=8)
    assert use_fp8(tower.vit.blocks) == ["0.attn.qkv", "0.mlp.fc1", "0.mlp.fc2"]
    calls = []
    tower.vit.blocks[0].attn.qkv.register_forward_hook(lambda *_: calls.append(1))
    images = torch.randn(2, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        rough = tower(images).cls
    assert calls == [1]
    torch.testing.assert_close(rough.float(), tower(images).cls, rtol=0.2, atol=0.2)


@pytest.mark.parametrize(("mode", "student", "teacher"), [("off", 0, 0), ("teacher", 0, 7), ("all", 7, 7)])
def test_it_is_for_the_towers_that_the_settings_name(mode: str, student: int, teacher: int) -> None:
    settings = config("dinov2", train={"global_batch_size": 8, "precision": "bf16", "fp8": mode})
    method = build_method(settings)
    prepare_towers(method, settings)

    def taught(module: Any) -> int:
        return sum(isinstance(m, nn.Linear) and "forward" in vars(m) for m in module.backbone.vit.blocks.modules()) - 1

    assert method.teacher is not None
    assert (taught(method), taught(nn.ModuleDict(dict(method.teacher.modules)))) == (student, teacher)


@pytest.mark.parametrize("name", fast_only(["dinov2", "clip"], ["dinov2"]))
def test_a_method_learns_with_it_as_it_does_without(name: str) -> None:
    ends = []
    for mode in ("off", "all"):
        settings = config(name, train={"global_batch_size": 8, "precision": "bf16", "fp8": mode})
        torch.manual_seed(0)
        method = build_method(settings)
        prepare_towers(method, settings)
        optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=3e-3)
        data = batch_at(method, 0)
        for _ in range(15):
            torch.manual_seed(1)
            with torch.autocast("cpu", torch.bfloat16):
                method.before_accumulation([data], STEP)
                terms = method(data, STEP)
            loss = torch.stack([term.float() for term in terms.values()]).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        ends.append(float(loss))
    assert ends[0] != ends[1] and ends[1] == pytest.approx(ends[0], rel=0.1)


def test_it_wants_bf16() -> None:
    with pytest.raises(ConfigError, match=r"train\.fp8"):
        config("dinov2", train={"global_batch_size": 8, "precision": "fp32", "fp8": "all"})
