"""Stochastic depth: counts of the reference, unbiased, and work that is really saved."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.models.depth import kept_rows, set_stochastic_depth
from pipeline.models.settings import ModelSettings
from pipeline.models.vision import VisionTower, build_tower

TINY: dict[str, Any] = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 4, "layer_scale": 0.5}


def tiny(**changes: Any) -> VisionTower:
    torch.manual_seed(0)
    return build_tower(ModelSettings(**(TINY | changes)), image_size=8)


@pytest.mark.parametrize(
    ("batch", "rate", "kept"),
    [(128, 0.3, 89), (64, 0.3, 44), (512, 0.3, 358), (24, 0.4, 14), (96, 0.4, 57), (10, 0.3, 7), (1, 0.4, 1)],
)
def test_so_many_samples_are_kept_as_in_the_reference(batch: int, rate: float, kept: int) -> None:
    assert kept_rows(batch, rate) == kept


def test_all_blocks_have_one_rate_and_no_name_changes() -> None:
    tower = tiny(drop_path=0.25, batched_drop_path=False)
    assert [block.drop_path1.drop_prob for block in tower.vit.blocks] == [0.25, 0.25]
    assert [block.dropped for block in tiny(drop_path=0.25).vit.blocks] == [0.25, 0.25]
    assert tower.state_dict().keys() == tiny().state_dict().keys() == tiny(drop_path=0.25).state_dict().keys()


@pytest.mark.parametrize("positions", ["learned", "rope"])
def test_a_branch_sees_the_kept_samples_only_and_its_mean_is_the_whole_branch(
    positions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tower = tiny(drop_path=0.4, depth=1, pos_embed=positions).train()
    block, x = tower.vit.blocks[0], torch.randn(4, 3, 16)
    with torch.no_grad():
        for name, p in block.named_parameters():
            p.copy_(0.0 if name.startswith("mlp.fc2") else torch.randn(p.shape) * 0.3)  # only the first branch speaks
    seen: list[int] = []
    block.attn.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    with torch.no_grad():
        whole = block.eval()(x)
        block.train()
        outputs = []
        for rows in itertools.permutations(range(4)):
            monkeypatch.setattr(torch, "randperm", lambda n, rows=rows, **_: torch.tensor(rows))
            outputs.append(block(x))
            left_out = [n for n in range(4) if n not in rows[:2]]
            assert torch.equal(outputs[-1][left_out], x[left_out])
    assert seen == [4, *(2,) * 24]
    torch.testing.assert_close(torch.stack(outputs).mean(0), whole, atol=1e-5, rtol=1e-5)


def test_gradients_reach_the_kept_samples_and_every_weight() -> None:
    tower = tiny(drop_path=0.5).train()
    images = torch.randn(4, 3, 8, 8, requires_grad=True)
    tower(images).patches.square().mean().backward()
    missing = [name for name, p in tower.named_parameters() if p.grad is None]
    assert missing == ["mask_token"] and bool((images.grad.flatten(1).abs().sum(1) > 0).all())  # type: ignore[union-attr]


def test_what_is_left_out_follows_the_seed_and_survives_recomputation() -> None:
    def gradient(seed: int, recompute: bool) -> Tensor:
        tower = tiny(drop_path=0.5).train()
        tower.checkpointing = recompute
        torch.manual_seed(seed)
        tower(images).cls.square().sum().backward()
        grad = tower.vit.blocks[0].attn.qkv.weight.grad
        assert isinstance(grad, Tensor)
        return grad

    images = torch.randn(4, 3, 8, 8)
    assert torch.equal(gradient(1, False), gradient(1, True))
    assert not torch.equal(gradient(1, False), gradient(2, False))


def test_evaluation_leaves_nothing_out_and_half_precision_streams_stay_fp32() -> None:
    images = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(tiny(drop_path=0.5).eval()(images).cls, tiny().eval()(images).cls)
    with torch.autocast("cpu", torch.bfloat16):
        assert bool(tiny(drop_path=0.5).train()(images).cls.isfinite().all())


def test_blocks_that_are_built_otherwise_are_refused() -> None:
    model = ModelSettings(timm_name="vit_base_patch14_dinov2", drop_path=0.1)
    with torch.device("meta"):
        tower = build_tower(model.model_copy(update={"drop_path": 0.0}), image_size=28)
    with pytest.raises(ConfigError, match="Set it to false"):
        set_stochastic_depth(tower.vit.blocks[0], 0.1, True)


@pytest.mark.slow
@pytest.mark.parametrize("positions", ["learned", "rope"])
def test_a_block_with_a_subset_is_one_graph_for_the_compiler(positions: str) -> None:
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    results = []
    for compiled in (False, True):
        tower = tiny(drop_path=0.5, depth=1, pos_embed=positions).train()
        if compiled:
            tower.vit.blocks[0].compile(backend="aot_eager", fullgraph=True)
        torch.manual_seed(1)
        results.append(tower(images).cls.detach())
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-4)
