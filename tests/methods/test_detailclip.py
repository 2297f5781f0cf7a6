"""DetailCLIP as a whole: who sees what, which pairs meet, what is trained, and that it learns."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from pipeline import losses
from pipeline.config.load import load
from pipeline.data.augment.settings import ViewSettings
from pipeline.errors import ConfigError
from pipeline.estimate.flops import counted
from pipeline.methods.base import Step
from pipeline.methods.detailclip.method import DetailCLIP, build, detailclip_views
from pipeline.methods.detailclip.settings import DetailClipSettings
from pipeline.models.settings import ModelSettings
from pipeline.models.vision import build_tower
from tests.helpers.method_pairs import SAMPLES, TEXT, engine_of, pairs_at
from tests.helpers.rank_pool import pool

STEP = Step(momentum=0.9, teacher_temperature=0.07)
K = 24
MODEL = ModelSettings(
    embed_dim=16, depth=2, num_heads=2, patch_size=2, layer_scale=None
)  # 4 x 4 patches of 8 pixels, 2 x 2 cells


def make_method(**changes: Any) -> DetailCLIP:
    torch.manual_seed(0)
    settings = DetailClipSettings(
        views=ViewSettings(global_size=8),
        text=TEXT,
        embed_dim=12,
        prototypes=K,
        head_hidden=16,
        head_bottleneck=8,
        decoder_heads=2,
        keep_ratio=0.25,
        **changes,
    )
    return DetailCLIP(build_tower(MODEL, image_size=8), settings)


def batch(index: int = 0, rows: slice = slice(None)) -> Any:
    data = pairs_at(index, rows, ("global", "other"))
    return replace(data, views={"global": [data.views["global"][0], data.views["other"][0]]})


def run(method: DetailCLIP, data: Any, step: Step = STEP) -> dict[str, Tensor]:
    with torch.no_grad():
        method.before_accumulation([data], step)
    return method(data, step)


def test_terms_at_random_are_those_of_chance_and_reach_everything_that_is_trained() -> None:
    method = make_method()
    terms = run(method, batch())
    assert list(terms) == ["clip", "cls", "patch", "rec"]
    torch.stack(list(terms.values())).sum().backward()  # in fp32, without autocast
    frozen = {"backbone.mask_token", "head.last.gain"} | {f"backbone.vit.patch_embed.proj.{kind}" for kind in ("weight", "bias")}
    for name, p in method.named_parameters():
        assert (p.grad is not None) == p.requires_grad == (name not in frozen), name
    assert float(terms["rec"].detach()) == pytest.approx(1.3, abs=0.5)
    grouped = [name for group in method.parameter_groups() for name in group.names]
    assert sorted(grouped) == sorted(name for name, p in method.named_parameters() if p.requires_grad)


def test_blind_networks_cost_the_logarithm_of_the_prototypes() -> None:
    method = make_method()
    with torch.no_grad():
        for head in (method.head, method.teacher.modules["head"]):
            head.last.direction.copy_(torch.ones(K, 8))
    terms = run(method, batch())
    assert float(terms["cls"].detach()) == pytest.approx(math.log(K), abs=1e-4)
    assert float(terms["patch"].detach()) == pytest.approx(math.log(K), abs=1e-4)


@pytest.mark.parametrize("positions", ["removed", "all"])
@pytest.mark.parametrize("pairing", ["cross", "same", "both"])
def test_terms_are_those_of_the_plain_formulas(pairing: str, positions: str) -> None:
    method = make_method(cls_pairing=pairing, patch_positions=positions)
    method.extra_state = {name: torch.randn(K, generator=torch.Generator().manual_seed(5)) for name in method.extra_state}
    data = batch()
    with torch.no_grad():
        method.before_accumulation([data], STEP)
        known = method._pending_targets[0]
        terms = method(data, STEP)
        slow, images = method.teacher.modules, torch.cat(data.views["global"])
        seen = slow["backbone"](images)
        z_cls = slow["head"](seen.cls).unflatten(0, (2, -1))
        targets = losses.centered_targets(z_cls, method.extra_state["cls_center"], 0.04)
        patch_targets = losses.centered_targets(slow["head"](seen.patches), method.extra_state["patch_center"], 0.07)
        tokens = method.backbone(images, keep=known.keep)
        decoded, _ = method.decoder(tokens, known.removed, everywhere=True)
        student = method.head(tokens.cls).unflatten(0, (2, -1))
        against = {"cross": targets.flip(0), "same": targets, "both": (targets + targets.flip(0)) / 2}[pairing]
        cls = losses.cross_entropy(student, against, 0.1).mean()
        every = losses.cross_entropy(method.head(decoded), patch_targets, 0.1)
        told = (
            torch.zeros(len(every), 16).scatter_(1, known.removed, 1.0) if positions == "removed" else torch.ones(len(every), 16)
        )
        patch = ((every * told).sum(1) / told.sum(1)).mean()
    torch.testing.assert_close(terms["cls"], cls, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(terms["patch"], patch, atol=1e-5, rtol=1e-5)
    assert float(terms["patch"]) != pytest.approx(float(terms["cls"]), abs=1e-3)


def test_the_teacher_sees_all_and_the_student_what_the_teacher_looks_at() -> None:
    method, data = make_method(), batch()
    seen: dict[str, Any] = {}
    method.backbone.vit.blocks[0].register_forward_pre_hook(lambda module, args: seen.update(student=args[0].shape))
    method.teacher.modules["backbone"].vit.blocks[0].register_forward_pre_hook(
        lambda module, args: seen.update(teacher=args[0].shape)
    )
    run(method, data)
    assert seen == {"student": (2 * SAMPLES, 1 + 8, 16), "teacher": (2 * SAMPLES, 1 + 16, 16)}
    method.eval()
    assert method.encode_images(data.views["global"][0]).shape == (SAMPLES, 12)
    assert seen["teacher"] == (SAMPLES, 1 + 16, 16)


def test_only_removed_patches_are_decoded_to_be_told() -> None:
    method, data = make_method(), batch()
    kept: list[Tensor] = []

    def keep(module: torch.nn.Module, args: Any, out: tuple[Tensor, Tensor]) -> None:
        out[0].retain_grad()
        kept.append(out[0])

    method.decoder.register_forward_hook(keep)
    terms = run(method, data)
    terms["patch"].backward()
    assert kept[0].shape[:2] == (2 * SAMPLES, 8) and kept[0].grad is not None
    assert bool((kept[0].grad.abs().sum(-1) > 0).all())


def test_centres_move_after_the_step_by_the_means_of_all_rows() -> None:
    method, data = make_method(), batch()
    slow = method.teacher.modules
    with torch.no_grad():
        tokens = slow["backbone"](torch.cat(data.views["global"]))
        cls, patches = slow["head"](tokens.cls).mean(0), slow["head"](tokens.patches).flatten(0, 1).mean(0)
    run(method, data)
    assert not method.extra_state["cls_center"].any()
    method.on_step_skipped()
    method.after_step(STEP)
    assert not method.extra_state["cls_center"].any()
    run(method, data)
    method.after_step(STEP)
    torch.testing.assert_close(method.extra_state["cls_center"], 0.1 * cls, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(method.extra_state["patch_center"], 0.1 * patches, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("text_teacher", [False, True])
def test_what_is_judged_is_slow_in_both_towers_or_in_none(text_teacher: bool) -> None:
    method = make_method(text_teacher=text_teacher)
    towers = method.export()
    slow = {id(module) for module in method.teacher.modules.values()}
    assert {id(module) in slow for module in towers.values()} == {text_teacher}
    assert towers["text"] is (method.teacher.modules["text_tower"] if text_teacher else method.text_tower)


def test_views_are_those_of_the_released_code() -> None:
    (view,) = detailclip_views(DetailClipSettings())
    (augment,) = view.augment
    assert (view.name, view.count, view.size, view.crop_scale) == ("global", 2, 224, (0.14, 1.0))
    assert (
        augment.flip_probability,
        augment.jitter_probability,
        augment.gray_probability,
        augment.blur_probability,
        augment.solarize_probability,
    ) == (0.0, 0.8, 0.2, 0.1, 0.2)
    assert (augment.brightness, augment.contrast, augment.saturation, augment.hue_shift) == (0.4, 0.4, 0.2, 0.1)
    assert view.mask is None


def test_the_released_sizes() -> None:
    with torch.device("meta"):
        tower = build_tower(ModelSettings(timm_name="vit_base_patch16_224"), image_size=224)
        method = DetailCLIP(tower, DetailClipSettings(text={"architecture": "ViT-B-16", "activation": "quick_gelu"}))

    def count(module: torch.nn.Module) -> float:
        return round(sum(p.numel() for p in module.parameters()) / 1e6, 2)

    assert (count(tower.vit), count(method.head) - 0.01) == (85.80, pytest.approx(8.40, abs=0.02))
    assert (count(method.decoder.blocks), count(method.decoder.embed)) == (7.09, 0.59)


def _trained(zero: Literal[0, 1, 2, 3], accumulation: int, steps: int = 2) -> dict[str, Any]:
    method = make_method()
    share = SAMPLES // dist.get_world_size()
    micro, begin = share // accumulation, dist.get_rank() * share
    engine = engine_of(method, zero, micro, accumulation)
    seen = []
    for index in range(steps):
        step = Step(index=index, lr=1e-2, last_layer_lr=1e-2, weight_decay=0.1, momentum=0.9, teacher_temperature=0.07)
        parts = [batch(index, slice(low, low + micro)) for low in range(begin, begin + share, micro)]
        engine.before_accumulation(parts, step)
        each = [engine.forward_backward(part, step) for part in parts]
        mean = torch.stack([torch.stack(list(terms.values())) for terms in each]).mean(0)
        assert engine.step(step, mean.isfinite().all())[0]
        method.after_step(step)
        seen.append(mean)
    with engine.gathered(teacher=True):
        weights = {name: p.detach().clone() for name, p in method.named_parameters()}
        weights |= {f"teacher {name}": p.clone() for name, p in method.teacher.named_parameters()}
    engine.close()
    return {"terms": torch.stack(seen), "weights": weights | method.extra_state}


@pytest.mark.slow
def test_ranks_and_micro_batches_train_like_one_large_batch() -> None:
    (whole,) = pool(1).run(_trained, zero=0, accumulation=1)
    for ranks, zero, accumulation in ((1, 0, 4), (2, 2, 2), (2, 3, 2)):
        found = pool(ranks).run(_trained, zero=zero, accumulation=accumulation)
        mean = torch.stack([rank["terms"] for rank in found]).mean(0)
        torch.testing.assert_close(mean, whole["terms"], atol=5e-5, rtol=0)
        for rank in found:
            for name, weight in whole["weights"].items():
                torch.testing.assert_close(rank["weights"][name], weight, atol=2e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_forty_steps_on_one_batch_lower_every_term_while_the_teacher_stands() -> None:
    method, data = make_method(), batch()
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=3e-3)
    seen = []
    for _ in range(40):
        terms = run(method, data)
        optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        optimizer.step()
        method.on_step_skipped()
        seen.append({name: float(term.detach()) for name, term in terms.items()})
    assert all(seen[-1][name] < seen[0][name] for name in seen[0])
    assert sum(seen[-1].values()) < 0.8 * sum(seen[0].values())


def test_a_teacher_may_see_smaller_views_and_answers_on_the_students_grid() -> None:
    whole, same, small = (run(make_method(teacher_size=side), batch()) for side in (None, 8, 4))
    assert all(torch.equal(whole[name], same[name]) for name in whole)
    assert all(not torch.equal(whole[name], small[name]) for name in ("cls", "patch"))
    seen: list[torch.Size] = []
    method = make_method(teacher_size=4)
    assert method.teacher is not None
    method.teacher.modules["backbone"].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    torch.stack(list(run(method, batch()).values())).sum().backward()
    assert seen == [(2 * SAMPLES, 3, 4, 4)]


@pytest.mark.parametrize("side", [12, 9])
def test_a_teacher_that_cannot_see_so_many_pixels_is_refused(side: int) -> None:
    settings = make_method(teacher_size=side).settings
    config = load("detailclip/scenes").config.model_copy(update={"model": MODEL})
    with pytest.raises(ConfigError, match=f"cannot see {side} pixels") as told:
        build(config, settings)
    assert told.value.where == "method.teacher_size"


@pytest.mark.slow
def test_the_quick_method_costs_at_most_1_6_times_clip() -> None:
    clip, quick = (counted(load(name).config) for name in ("clip/vit_b16_yfcc15m", "detailclip/vit_b16_quick"))
    assert quick <= 1.6 * clip


def test_rectangles_are_refused_where_the_method_is_built() -> None:
    """``fovea config check`` refuses them before; the number of masked patches is a square's."""
    settings = DetailClipSettings(views=ViewSettings(global_size=(8, 16)), text=TEXT, embed_dim=12, prototypes=K)
    with pytest.raises(ConfigError, match=r"method.views.global_size: 8 x 16 pixels \(height x width\) must be square"):
        DetailCLIP(build_tower(MODEL, image_size=(8, 16)), settings)
