"""The last block computes only what is read: the same numbers and gradients, with less work."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pipeline.models.settings import ModelSettings
from pipeline.models.tokens import Tokens
from pipeline.models.vision import VisionTower, build_tower

TINY: dict[str, Any] = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 4, "layer_scale": 0.5}
SIDE, PATCHES = 16, 16
READ = torch.tensor([3, 0, 17, 30, 31, 47])  # of 3 pictures: some of each, in any order


def tiny(**changes: Any) -> VisionTower:
    torch.manual_seed(0)
    tower = build_tower(ModelSettings(**(TINY | changes)), image_size=SIDE)
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return tower.double()


def pictures() -> Tensor:
    return torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def learnt(tower: VisionTower, cls: Tensor, patches: Tensor) -> list[Tensor]:
    """Gradients of all weights of a loss that looks at both."""
    (cls.pow(3).sum() + patches.pow(3).sum()).backward()
    return [torch.zeros(()) if p.grad is None else p.grad for p in tower.parameters()]


@pytest.mark.parametrize("patches", [READ, "none"], ids=["some", "none"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"registers": 2, "ffn": "swiglu"},
        {"layer_scale": None, "drop_path": 0.4, "batched_drop_path": False},
        {"drop_path": 0.4, "batched_drop_path": True},
        {"drop_path": 0.4, "batched_drop_path": True, "pos_embed": "rope", "registers": 2},
        {"pos_embed": "rope"},
        {"untie_local_norm": True},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())) or "plain",
)
def test_what_is_read_and_all_gradients_are_those_of_the_whole_block(changes: dict[str, Any], patches: Any) -> None:
    found = []
    for some in (False, True):
        tower = tiny(**changes).train()
        torch.manual_seed(7)  # which samples a branch leaves out
        tokens: Tokens = tower(pictures(), patches=patches if some else "all")
        assert tokens.patches.shape == ((READ.numel() if patches is READ else 0, 16) if some else (3, PATCHES, 16))
        kept = tokens.patches if some else tokens.patches.flatten(0, 1)[READ if patches is READ else READ[:0]]
        found.append((tokens.cls.detach(), kept.detach(), *learnt(tower, tokens.cls, kept)))
    for whole, part in zip(*found, strict=True):
        torch.testing.assert_close(part, whole, atol=1e-10, rtol=1e-9)


def test_dropped_patches_and_recomputation_go_together_with_it() -> None:
    keep = torch.tensor([[0, 3, 5, 9], [1, 2, 3, 4], [15, 7, 8, 2]])
    found = []
    for recompute, patches in ((False, "all"), (False, READ[:2]), (True, READ[:2])):
        tower = tiny(drop_path=0.4).train()
        tower.checkpointing = recompute
        torch.manual_seed(7)
        tokens = tower(pictures(), keep=keep, patches=patches)
        assert tokens.kept is keep
        other = tower(pictures(), patches="none").cls  # what comes between must not be what is read when the first is made anew
        kept = tokens.patches.flatten(0, 1)[READ[:2]] if isinstance(patches, str) else tokens.patches
        found.append([tokens.cls, kept, *learnt(tower, tokens.cls + other, kept)])
    for whole, *parts in zip(*found, strict=True):
        for part in parts:
            torch.testing.assert_close(part, whole, atol=1e-10, rtol=1e-9)


@pytest.mark.slow
def test_a_block_of_another_kind_computes_all_and_gives_the_same() -> None:
    tower = tiny(timm_name="vit_base_patch16_224", embed_dim=None, depth=None, num_heads=None, patch_size=None)
    whole = tower(pictures()[:1]).cls
    tower.vit.reads_some = False
    assert torch.equal(tower(pictures()[:1], patches="none").cls, whole)


@pytest.mark.parametrize("positions", ["learned", "rope"])
def test_most_of_the_last_block_is_left_out(positions: str) -> None:
    tower, counts = tiny(depth=1, pos_embed=positions).float().eval(), []
    for patches in ("all", "none"):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            tower(pictures().float(), patches=patches)
        counts.append(counter.get_total_flops())
    unread = 3 * PATCHES * (2 * 16**2 + 16 * 16**2)  # the projection and the feed-forward layer of each patch
    assert counts[0] - counts[1] == unread


@pytest.mark.slow
def test_it_is_one_graph_for_the_compiler() -> None:
    tower = tiny(depth=1, drop_path=0.4).train()
    torch.manual_seed(7)
    whole = tower(pictures(), patches=READ)
    tower.vit.blocks[0].compile(backend="aot_eager", fullgraph=True)
    torch.manual_seed(7)
    compiled = tower(pictures(), patches=READ)
    torch.testing.assert_close(compiled.cls, whole.cls)
    torch.testing.assert_close(compiled.patches, whole.patches)
    assert tower(pictures(), patches="none").cls.isfinite().all()
