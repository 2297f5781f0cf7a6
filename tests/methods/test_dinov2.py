"""DINOv2 as a whole: what meets what, what is trained, and that it learns."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline import losses
from pipeline.data.augment.masks import block_masks, mask_counts
from pipeline.data.augment.settings import AugmentSettings, MultiCropSettings
from pipeline.data.augment.views import Batch, Masks
from pipeline.errors import ConfigError
from pipeline.methods.base import Step
from pipeline.methods.dinov2.method import DINOv2, dinov2_views
from pipeline.methods.dinov2.settings import Dinov2Settings
from pipeline.models.settings import ModelSettings
from pipeline.models.tokens import Tokens
from pipeline.models.vision import build_tower
from tests.losses.test_prototypes import Largest

BATCH, LOCALS, K = 6, 3, 24
SMALL = Dinov2Settings(
    views=MultiCropSettings(global_size=16, local_size=8, local_count=LOCALS), prototypes=K, head_hidden=16, head_bottleneck=8
)
STEP = Step(momentum=0.9, teacher_temperature=0.05)


def make_method(**changes: Any) -> DINOv2:
    torch.manual_seed(0)
    model = ModelSettings(embed_dim=16, depth=2, num_heads=2, patch_size=4, layer_scale=None, registers=1)
    return DINOv2(build_tower(model, image_size=16), SMALL.model_copy(update=changes))


def masks(grid: Tensor) -> Masks:
    counts = grid.sum(1, keepdim=True).clamp(min=1)
    return Masks(grid, grid.flatten().nonzero().flatten(), (1.0 / counts).expand(grid.shape)[grid])


def batch(n: int = BATCH, crops: int = LOCALS, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    spec = dinov2_views(SMALL, patch=4)[0].mask
    assert spec is not None
    grid = block_masks(mask_counts(2 * n, 16, spec, seed), 4, 4, np.arange(2 * n, dtype=np.uint64), seed, 1)
    scenes = torch.randn(n, 3, 16, 16, generator=generator)

    def noisy(images: Tensor) -> Tensor:
        return images + 0.2 * torch.randn(images.shape, generator=generator)

    return Batch(
        views={"global": [noisy(scenes) for _ in range(2)], "local": [noisy(scenes[..., 4:12, 4:12]) for _ in range(crops)]},
        masks={"global": masks(torch.from_numpy(grid))},
        labels=torch.full((n,), -1),
        keys=[str(i) for i in range(n)],
        ids=list(range(n)),
        position=0,
    )


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("targets", ["sinkhorn_knopp", "softmax_center"])
def test_terms_are_finite_named_scalars_and_metrics_stay_apart(shared: bool, targets: str) -> None:
    method = make_method(shared_heads=shared, centering=targets)
    terms = method(batch(), STEP)
    assert list(terms) == ["dino_local", "dino_global", "ibot", "koleo"]
    assert all(term.ndim == 0 and term.dtype == torch.float32 and torch.isfinite(term) for term in terms.values())
    assert all(term.requires_grad for term in terms.values())
    assert not any(metric.requires_grad for metric in method.metrics.values())
    assert all(
        0.0 <= float(method.metrics[name]) <= 1.0 + 1e-5
        for name in ("target_entropy", "prototype_entropy", "teacher_student_top1_agreement")
    )


@pytest.mark.parametrize("shared", [False, True])
def test_gradient_reaches_every_trainable_parameter_and_no_other(shared: bool) -> None:
    method = make_method(shared_heads=shared)
    sum(method(batch(), STEP).values()).backward()
    assert [name for name, p in method.named_parameters() if p.grad is None] == []
    assert all(p.grad is None for _, p in method.teacher.named_parameters())
    grouped = [p for group in method.parameter_groups() for p in group.params]
    assert len(grouped) == len({id(p) for p in grouped}) == len(list(method.parameters()))
    assert set(method.networks()) == {"backbone", "dino_head"} | (set() if shared else {"ibot_head"})


def test_each_network_runs_as_often_as_the_paper_says() -> None:
    method = make_method()
    calls: list[tuple[str, int]] = []

    def count(name: str) -> Callable[..., None]:
        return lambda module, args: calls.append((name, len(args[0])))

    for name, module in method.networks().items():
        module.register_forward_pre_hook(count(f"student {name}"))
    for name, module in method.teacher.modules.items():
        part = module if name == "backbone" else module.mlp
        part.register_forward_pre_hook(count(f"teacher {name}"))
    data = batch()
    method(data, STEP)
    hidden = len(data.masks["global"].index)
    assert calls == [
        ("teacher backbone", 2 * BATCH),
        ("teacher dino_head", 2 * BATCH),
        ("teacher ibot_head", hidden),
        ("student backbone", 2 * BATCH),
        ("student backbone", LOCALS * BATCH),
        ("student dino_head", (2 + LOCALS) * BATCH),
        ("student ibot_head", hidden),
    ]


def test_the_teacher_sees_whole_crops_and_the_student_masked_ones() -> None:
    method = make_method()
    seen: dict[str, Any] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda module, args: None if name in seen else seen.update({name: args[1:]})

    method.backbone.register_forward_pre_hook(note("student"))
    method.teacher.modules["backbone"].register_forward_pre_hook(note("teacher"))
    data = batch()
    method(data, STEP)
    assert seen["teacher"] == ()
    assert seen["student"][0] is data.masks["global"].grid


def test_uniform_outputs_cost_ln_k() -> None:
    method = make_method(koleo_weight=0.0)
    with torch.no_grad():
        for head in (*list(method.networks().values())[1:], *list(method.teacher.modules.values())[1:]):
            head.last.gain.zero_()
    data = batch()
    terms = method(data, STEP)
    masked = float((data.masks["global"].grid.any(1)).float().mean())
    assert float(terms["dino_local"] + terms["dino_global"]) == pytest.approx(math.log(K), abs=1e-5)
    assert float(terms["dino_local"]) == pytest.approx(math.log(K) * LOCALS / (1 + LOCALS), abs=1e-5)
    assert float(terms["ibot"]) == pytest.approx(math.log(K) * masked, abs=1e-5)
    assert float(method.metrics["dino_loss_vs_log_k"]) == pytest.approx(0.0, abs=1e-5)
    assert float(method.metrics["target_entropy"]) == pytest.approx(1.0, abs=1e-5)


def in_plain_words(method: DINOv2, data: Batch) -> dict[str, Tensor]:
    """The method with all logits in memory at once."""
    s, nets, hidden = method.settings, method.teacher.modules, data.masks["global"]
    with torch.no_grad():
        told = nets["backbone"](torch.cat(data.views["global"]))
        said = [nets["dino_head"](told.cls), nets.get("ibot_head", nets["dino_head"])(told.patches.flatten(0, 1)[hidden.index])]
        if s.centering == "sinkhorn_knopp":
            dino, ibot = (losses.sinkhorn(logits, STEP.teacher_temperature) for logits in said)
        else:
            centers = (method.extra_state["dino_center"], method.extra_state["ibot_center"])
            dino, ibot = (
                losses.centered_targets(logits, center, STEP.teacher_temperature)
                for logits, center in zip(said, centers, strict=True)
            )
    seen = method.backbone(torch.cat(data.views["global"]), hidden.grid)
    small = method.dino_head(method.backbone(torch.cat(data.views["local"])).cls).unflatten(0, (LOCALS, -1))
    large = method.dino_head(seen.cls).unflatten(0, (2, -1))
    patches = (method.ibot_head or method.dino_head)(seen.patches.flatten(0, 1)[hidden.index])
    local, glob = losses.multi_crop(large, small, dino.unflatten(0, (2, -1)))
    return {
        "dino_local": local,
        "dino_global": glob,
        "ibot": losses.masked_patches(patches, ibot, hidden.weight, len(seen.cls)),
        "koleo": 0.1 * (losses.koleo(seen.cls[:BATCH]) + losses.koleo(seen.cls[BATCH:])),
    }


@pytest.mark.parametrize("norm", ["weight_norm", "plain"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("targets", ["sinkhorn_knopp", "softmax_center"])
def test_logits_in_pieces_are_the_formulas_with_all_logits(targets: str, shared: bool, norm: str) -> None:
    method = make_method(centering=targets, shared_heads=shared, head_norm=norm, prototype_chunk_size=5)
    with torch.no_grad():
        for p in method.parameters():
            p.add_(0.05 * torch.randn_like(p))
    method.extra_state = {name: torch.randn_like(center) for name, center in method.extra_state.items()}
    data, weights = batch(), list(method.parameters())
    found, expected = method(data, STEP), in_plain_words(method, data)
    assert list(found) == list(expected)
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=2e-6, atol=1e-6)
        slopes = (torch.autograd.grad(terms[name], weights, retain_graph=True, allow_unused=True) for terms in (found, expected))
        for weight, *both in zip(weights, *slopes, strict=True):
            one, other = (torch.zeros_like(weight) if x is None else x for x in both)
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_no_tensor_holds_the_logits_of_all_tokens() -> None:
    method, data = make_method(prototypes=2048, prototype_chunk_size=3), batch()
    weights = {p.numel() for p in method.parameters()}
    with Largest() as largest:
        torch.stack(list(method(data, STEP).values())).sum().backward()
    assert max(weights) <= largest.numbers <= max(3 * 2048, max(weights))
    assert largest.numbers < 2 * BATCH * 2048


@pytest.mark.parametrize("targets", ["sinkhorn_knopp", "softmax_center"])
def test_under_bf16_autocast_terms_are_fp32_and_near_those_of_fp32(targets: str) -> None:
    method, data = make_method(centering=targets), batch()
    plain = method(data, STEP)
    with torch.autocast("cpu", torch.bfloat16):
        method.before_accumulation([data], STEP)
        assert method._pending_targets[0].dino.unit.dtype == torch.bfloat16
        assert method._pending_targets[0].dino.potential.dtype == torch.float32
        low = method(data, STEP)
    for name, term in low.items():
        assert term.dtype == torch.float32
        torch.testing.assert_close(term, plain[name], rtol=0.05, atol=0.02)
    torch.stack(list(low.values())).sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in method.parameters())


def test_what_was_prepared_is_used_once_and_only_for_its_own_batch() -> None:
    method, first, second = make_method(), batch(seed=1), batch(seed=2)
    alone = float(method(second, STEP)["dino_global"].detach())
    method.before_accumulation([first, second], STEP)
    method(first, STEP)
    together = float(method(second, STEP)["dino_global"].detach())
    assert together != alone
    assert float(method(second, STEP)["dino_global"].detach()) == alone
    method.before_accumulation([first, second], STEP)
    method.on_step_skipped()
    assert float(method(second, STEP)["dino_global"].detach()) == alone


def test_metrics_are_means_over_the_steps_micro_batches() -> None:
    method, parts = make_method(), [batch(seed=1), batch(seed=2)]
    method.before_accumulation(parts, STEP)
    each = []
    for part in parts:
        method(part, STEP)
        each.append({name: float(value) for name, value in method.metrics.items()})
    method.before_accumulation(parts[::-1], STEP)
    method(parts[1], STEP)
    second = {name: float(value) for name, value in method.metrics.items()}
    for name in ("target_entropy", "teacher_student_top1_agreement", "dino_loss_vs_log_k", "mask_ratio"):
        assert each[1][name] == pytest.approx((each[0][name] + second[name]) / 2, abs=1e-5)
    assert each[1]["prototype_entropy"] > max(
        each[0]["prototype_entropy"], second["prototype_entropy"]
    )  # more samples reach more of them
    assert each[0]["feature_rank"] == each[1]["feature_rank"] > 1.0
    assert each[0]["mask_ratio"] == pytest.approx(float(parts[0].masks["global"].grid.float().mean()))


def test_a_group_that_no_micro_batch_holds_is_refused_with_the_mend() -> None:
    with pytest.raises(ConfigError, match="6 features are not divisible into groups of 4") as told:
        make_method(koleo_group_size=4)(batch(), STEP)
    assert "method.koleo_group_size" in str(told.value) and "divisor of the 6 samples" in str(told.value)


def test_weights_scale_their_own_term_only() -> None:
    plain = make_method()(batch(), STEP)
    heavy = make_method(dino_weight=2.0, ibot_weight=3.0, koleo_weight=0.4)(batch(), STEP)
    factors = {"dino_local": 2.0, "dino_global": 2.0, "ibot": 3.0, "koleo": 4.0}
    for name, factor in factors.items():
        torch.testing.assert_close(heavy[name], plain[name] * factor)


def test_only_hidden_patches_are_read_and_each_gets_a_gradient_from_ibot() -> None:
    method = make_method()
    kept: list[Tensor] = []

    def keep(module: torch.nn.Module, args: Any, out: Tokens) -> None:
        out.patches.retain_grad()
        kept.append(out.patches)

    method.backbone.register_forward_hook(keep)
    data = batch()
    method(data, STEP)["ibot"].backward()
    assert kept[0].grad is not None and len(kept[0]) == int(data.masks["global"].grid.sum()) > 0
    assert (kept[0].grad.abs().sum(-1) > 0).all()


def test_permuting_the_images_leaves_every_term() -> None:
    method, data = make_method(), batch()
    order = torch.randperm(BATCH, generator=torch.Generator().manual_seed(3))
    grid = data.masks["global"].grid.unflatten(0, (2, BATCH))[:, order].flatten(0, 1)
    views = {name: [view[order] for view in kind] for name, kind in data.views.items()}
    shuffled = replace(data, views=views, masks={"global": masks(grid)})
    for one, other in zip(method(data, STEP).values(), method(shuffled, STEP).values(), strict=True):
        torch.testing.assert_close(one, other)


def test_without_masks_or_local_crops_it_still_runs() -> None:
    method = make_method()
    data = replace(batch(crops=0), masks={"global": masks(torch.zeros(2 * BATCH, 16, dtype=torch.bool))})
    terms = method(data, STEP)
    sum(terms.values()).backward()
    assert float(terms["ibot"]) == float(terms["dino_local"]) == 0.0


@pytest.mark.parametrize("targets", ["sinkhorn_knopp", "softmax_center"])
def test_twenty_steps_on_one_batch_teach_the_student(targets: str) -> None:
    method, data = make_method(centering=targets), batch()
    start = copy.deepcopy(method.state_dict())
    optimizer = torch.optim.AdamW(method.parameters(), lr=3e-3)
    step = replace(STEP, momentum=0.99)
    for _ in range(20):
        loss = torch.stack(list(method(data, step).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.after_step(step)
    with torch.no_grad():
        trained = method(data, step)
        method.load_state_dict(start)
        untrained = method(data, step)
    assert all(float(trained[name]) < float(untrained[name]) for name in trained)
    assert sum(map(float, trained.values())) < 0.8 * sum(map(float, untrained.values()))


def test_centres_move_after_the_step_and_only_then() -> None:
    method, data = make_method(centering="softmax_center"), batch()
    tokens = method.teacher.modules["backbone"](torch.cat(data.views["global"]))
    said = method.teacher.modules["dino_head"](tokens.cls).mean(0)
    method(data, STEP)
    assert not method.extra_state["dino_center"].any()
    method.after_step(STEP)
    torch.testing.assert_close(method.extra_state["dino_center"], 0.1 * said)
    method.after_step(STEP)
    torch.testing.assert_close(method.extra_state["dino_center"], 0.1 * said)


def test_the_teacher_follows_under_the_students_names() -> None:
    method = make_method()
    student = dict(method.named_parameters())
    assert [name for name, _ in method.teacher.named_parameters()] == list(student)
    before = {name: tensor.clone() for name, tensor in method.teacher.named_parameters()}
    with torch.no_grad():
        for parameter in student.values():
            parameter.add_(1.0)
    method.after_step(STEP)
    for name, tensor in method.teacher.named_parameters():
        torch.testing.assert_close(tensor, before[name] + 0.1)
    assert method.export()["backbone"] is method.teacher.modules["backbone"]


@pytest.mark.parametrize(("changes", "expected"), [({}, (0.0, 0.9, 0.5)), ({"blur_probability": (1.0, 0.1)}, (1.0, 0.1, 0.5))])
def test_views_are_those_of_the_paper(changes: Any, expected: tuple[float, float, float]) -> None:
    large, small = dinov2_views(Dinov2Settings(augment=AugmentSettings(**changes)), patch=14)
    assert (large.name, large.count, large.size, large.crop_scale) == ("global", 2, 224, (0.32, 1.0))
    assert (small.name, small.count, small.size, small.crop_scale) == ("local", 8, 98, (0.05, 0.32))
    first, second, local = *large.augment, *small.augment
    assert (first.blur_probability, second.blur_probability, local.blur_probability) == expected
    assert (first.solarize_probability, second.solarize_probability, local.solarize_probability) == (0.0, 0.2, 0.0)
    for augment in (first, second, local):
        assert (augment.flip_probability, augment.jitter_probability, augment.gray_probability) == (0.5, 0.8, 0.2)
        assert (augment.brightness, augment.contrast, augment.saturation, augment.hue_shift) == (0.4, 0.4, 0.2, 0.1)
    assert large.mask is not None
    assert (large.mask.patch, large.mask.probability, large.mask.ratio) == (14, 0.5, (0.1, 0.5))
    assert small.mask is None


def test_without_local_crops_none_are_asked_for() -> None:
    views = dinov2_views(Dinov2Settings(views=MultiCropSettings(local_count=0)), patch=14)
    assert [view.name for view in views] == ["global"]
