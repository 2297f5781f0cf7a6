"""A frozen teacher and a Gram anchor: who is asked, who moves, and that the student comes to agree."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.config.schema import Config
from pipeline.data.augment.settings import MultiCropSettings
from pipeline.data.augment.views import Batch, Masks
from pipeline.errors import ConfigError
from pipeline.methods.base import Step
from pipeline.methods.dinov2.method import DINOv2
from pipeline.methods.dinov2.settings import Dinov2Settings
from pipeline.methods.distill.method import Distill, build
from pipeline.methods.distill.settings import DistillSettings
from pipeline.models.settings import ModelSettings
from pipeline.models.vision import build_tower
from tests.helpers.rank_pool import pool
from tests.helpers.tiny_methods import MODEL, first_steps, interrupted
from tests.methods.test_registry import compare

K, N = 12, 4
STEP = Step(momentum=0.9, teacher_temperature=0.05)
SIZES: dict[str, Any] = {
    "views": MultiCropSettings(global_size=16, local_size=8, local_count=2),
    "prototypes": K,
    "head_hidden": 16,
    "head_bottleneck": 8,
}


def tower(width: int, seed: int = 0, patch: int = 4) -> Any:
    torch.manual_seed(seed)
    return build_tower(ModelSettings(embed_dim=width, depth=1, num_heads=2, patch_size=patch, layer_scale=None), image_size=16)


def distill(**changes: Any) -> Distill:
    return Distill(tower(16), tower(24, seed=1), DistillSettings(teacher_weights="x", **(SIZES | changes)))


def batch(hidden: float = 1.0) -> Batch:
    generator = torch.Generator().manual_seed(0)
    grid = torch.rand(2 * N, 16, generator=generator) < hidden
    counts = grid.sum(1, keepdim=True).clamp(min=1)
    masks = Masks(grid, grid.flatten().nonzero().flatten(), (1.0 / counts).expand(grid.shape)[grid])
    return Batch(
        views={
            "global": [torch.randn(N, 3, 16, 16, generator=generator) for _ in range(2)],
            "local": [torch.randn(N, 3, 8, 8, generator=generator) for _ in range(2)],
        },
        masks={"global": masks},
        labels=torch.full((N,), -1),
        keys=[str(i) for i in range(N)],
        ids=list(range(N)),
        position=0,
    )


def weights(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


@pytest.mark.parametrize("shared", [False, True])
def test_the_student_learns_what_the_frozen_teacher_says_and_only_it_moves(shared: bool) -> None:
    method = distill(shared_heads=shared, koleo_weight=1e-9, dino_weight=1.0)
    method.train()
    assert not method.judge["backbone"].training
    frozen, slow = weights(method.judge), dict(method.teacher.state_dict())
    slow = {name: tensor.clone() for name, tensor in slow.items()}
    trainable = [p for p in method.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=3e-3)
    losses = []
    for _ in range(60):
        loss = torch.stack(list(method(batch(), STEP).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.after_step(STEP)
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(p, frozen[name]) for name, p in method.judge.named_parameters())
    assert any(not torch.equal(tensor, slow[name]) for name, tensor in method.teacher.state_dict().items())


def test_the_student_sees_every_patch_and_answers_for_all() -> None:
    method, one = distill(), batch()
    seen: list[Any] = []
    method.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    method(one, STEP)
    assert [len(inputs) > 1 and inputs[1] is not None for inputs in seen] == [False, False]
    mask = method.views[0].mask
    assert mask is not None and (mask.probability, mask.ratio) == (1.0, (1.0, 1.0))


def test_frozen_networks_are_in_no_group_and_no_network_of_their_own() -> None:
    method = distill()
    names = {name for group in method.parameter_groups() for name in group.names}
    assert not any(name.startswith("judge.") for name in names)
    assert set(method.networks()) == {"backbone", "dino_head", "ibot_head"}
    assert any(name.startswith("judge.backbone.vit.") for name, _ in method.named_parameters())


def test_patches_of_two_sizes_are_refused() -> None:
    large = {"teacher_model": {"embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": 8}, "teacher_weights": "x"}
    settings = DistillSettings.model_validate({**SIZES, **large})
    config = Config.model_validate(
        {"model": {"embed_dim": 16, "depth": 1, "num_heads": 2, "patch_size": 4}, "data": {"shards": "x.tar"}}
    )
    with pytest.raises(ConfigError, match="4 pixels a side and the frozen teacher's 8"):
        build(config, settings)


def anchored(**changes: Any) -> DINOv2:
    return DINOv2(tower(16), Dinov2Settings(**(SIZES | {"gram_weight": 2.0} | changes)))


def test_the_anchor_adds_a_term_that_is_nothing_while_nothing_has_moved() -> None:
    method = anchored().eval()
    terms = method(batch(hidden=0.0), STEP)
    assert float(terms["gram"].detach()) == pytest.approx(0.0, abs=1e-10)
    with torch.no_grad():
        for p in method.backbone.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2)))
    moved = method(batch(hidden=0.0), STEP)["gram"]
    assert float(moved.detach()) > 1e-5 and moved.requires_grad
    assert "gram" not in anchored(gram_weight=0.0)(batch(0.3), STEP)


def test_the_anchor_becomes_the_teacher_so_often_and_no_more() -> None:
    method = anchored(gram_update_every=2, gram_max_updates=2)
    assert method.gram is not None
    moves = []
    for index in range(8):
        before = weights(method.gram)
        with torch.no_grad():
            for p in method.backbone.parameters():
                p.add_(0.1)
        method.after_step(Step(index=index, momentum=0.5))
        moves.append(any(not torch.equal(p, before[name]) for name, p in method.gram.named_parameters()))
        if moves[-1]:
            teacher = dict(method.teacher.modules["backbone"].named_parameters())
            assert all(torch.equal(p, teacher[name]) for name, p in method.gram["backbone"].named_parameters())
    assert moves == [False, True, False, True, False, False, False, False]


def test_patch_tokens_may_have_a_head_of_other_sizes() -> None:
    method = anchored(ibot_prototypes=20, ibot_bottleneck=6, ibot_hidden=10, centering="softmax_center")
    assert method.ibot_head is not None and method.ibot_head.last.direction.shape == (20, 6)
    assert method.ibot_head.mlp[0].out_features == 10 and method.dino_head.last.direction.shape == (K, 8)
    terms = method(batch(0.4), STEP)
    method.after_step(STEP)
    assert all(bool(term.isfinite()) for term in terms.values())
    assert {name: len(center) for name, center in method.extra_state.items()} == {"dino_center": K, "ibot_center": 20}


# ---- several students ------------------------------------------------------------------------------------------------------


def trained(method: Distill, steps: int = 4) -> list[dict[str, float]]:
    """AdamW by the method's own groups, each network clipped by itself, the slow copies moved."""
    groups = method.parameter_groups()
    optimizer = torch.optim.AdamW(
        [{"params": g.params, "weight_decay": 0.1 * g.wd_scale, "lr": 0.01 * g.lr_scale} for g in groups]
    )
    told = []
    for index in range(steps):
        terms = method(replace(batch(), ids=[index * N + n for n in range(N)]), STEP)
        optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        for network in method.networks().values():
            torch.nn.utils.clip_grad_norm_(network.parameters(), 0.5)
        optimizer.step()
        method.after_step(replace(STEP, index=index))
        told.append({name: float(term.detach()) for name, term in terms.items()})
    return told


@pytest.mark.parametrize("targets", ["sinkhorn_knopp", "softmax_center"])
def test_students_that_learn_together_are_what_each_would_be_alone(targets: Any) -> None:
    settings = DistillSettings(teacher_weights="x", centering=targets, **SIZES)
    together = Distill(tower(16), tower(24, seed=1), settings, {"wide": tower(32, seed=2), "same": tower(16, seed=3)})
    alone = {
        name: Distill(one, tower(24, seed=1), settings)
        for name, one in {"": tower(16), "wide": tower(32, seed=2), "same": tower(16, seed=3)}.items()
    }
    whole = together.state_dict()
    for name, method in alone.items():
        prefix = f"others.{name}." if name else ""
        state = {key: whole[f"{prefix}{key}" if not key.startswith("judge.") else key] for key in method.state_dict()}
        method.load_state_dict(state)
        method.teacher.reset()
    together.teacher.reset()
    asked: list[int] = []
    together.judge["backbone"].register_forward_hook(lambda *_: asked.append(1))
    told = trained(together)
    assert len(asked) == 4 and len(told[0]) == 12  # one pass of the frozen teacher a step, whoever listens
    slow = dict(together.teacher.named_parameters())
    for name, method in alone.items():
        before = {key: p.clone() for key, p in method.named_parameters()}
        expected = trained(method)
        for ours, theirs in zip(told, expected, strict=True):
            assert {term: ours[f"{name}/{term}" if name else term] for term in theirs} == pytest.approx(theirs, abs=1e-6)
        prefix = f"others.{name}." if name else ""
        for key, p in method.named_parameters():
            if p.requires_grad:
                assert torch.allclose(together.get_parameter(f"{prefix}{key}"), p, atol=1e-6), (name, key)
        for key, p in method.teacher.named_parameters():
            assert torch.allclose(slow[f"{prefix}{key}"], p, atol=1e-6), (name, key)
        assert any(not torch.equal(p, before[key]) for key, p in method.named_parameters())
        assert {f"{name}/{m}" if name else m for m in method.metrics} <= together.metrics.keys()
    assert all(torch.equal(together.extra_state[key], alone["wide"].extra_state[key]) for key in together.extra_state)


TWO: dict[str, Any] = {"method": {"students": [{**MODEL, "name": "wide", "embed_dim": 32}]}}


@pytest.mark.parametrize("zero", [1, 3])
def test_two_students_on_two_ranks_are_those_of_one_rank(zero: int) -> None:
    expected = pool(1).run(first_steps, name="distill", zero=0, **TWO)[0]
    assert {name.partition("/")[0] for name in expected["terms"] if "/" in name} == {"wide"}
    compare(pool(2).run(first_steps, name="distill", zero=zero, **TWO), expected)


@pytest.mark.slow
def test_two_students_go_on_from_a_checkpoint_as_if_nothing_had_happened(tmp_path: Path) -> None:
    given = {"name": "distill", "zero": 3, "directory": str(tmp_path), **TWO}
    through = pool(2).run(interrupted, **given, load_at=None, save_at=1, until=2, seed=0)
    again = pool(2).run(interrupted, **given, load_at=1, save_at=None, until=2, seed=1)
    for ours, theirs in zip(again, through, strict=True):
        assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == []


def test_students_of_one_name_of_another_patch_or_with_an_anchor_are_refused() -> None:
    one = {"name": "b", "embed_dim": 8, "depth": 1, "num_heads": 2, "patch_size": 4}
    for wrong, words in (
        ({"students": [one, one]}, "one name"),
        ({"students": [one], "gram_weight": 1.0}, "Gram anchor"),
        ({"students": [one], "target_batch": "micro"}, "computed once for all"),
    ):
        with pytest.raises(ValueError, match=words):
            DistillSettings(teacher_weights="x", **(SIZES | wrong))
    with pytest.raises(ValueError, match="name"):
        DistillSettings(teacher_weights="x", **(SIZES | {"students": [one | {"name": "a.b"}]}))
    shape = ModelSettings(embed_dim=16, depth=1, num_heads=2, patch_size=4)
    settings = DistillSettings(teacher_model=shape, teacher_weights="x", **(SIZES | {"students": [one | {"patch_size": 8}]}))
    config = Config.model_validate({"model": shape, "data": {"shards": "x.tar"}}).replace(method=settings)
    with pytest.raises(ConfigError, match=r"students \(b\)"):
        build(config, settings)
