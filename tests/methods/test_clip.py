"""CLIP as a whole: what is compared, what is trained, what is drawn, and that it learns."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from pipeline.config.load import InvalidConfig, load
from pipeline.data.augment.settings import ViewSettings
from pipeline.data.augment.views import OPENAI_MEAN, OPENAI_STD
from pipeline.errors import DataError
from pipeline.methods.base import Step
from pipeline.methods.clip.method import CLIP
from pipeline.methods.clip.settings import ClipSettings
from pipeline.methods.shared.contrastive import random_keep
from pipeline.methods.shared.crops import one_view
from pipeline.models.groups import ParameterGroup
from pipeline.models.settings import ModelSettings
from pipeline.models.vision import build_tower
from tests.helpers.method_pairs import CONTEXT, MODEL, SAMPLES, SIDE, TEXT, captions, clip, pairs_at

STEP = Step()


@pytest.mark.parametrize("changes", [{}, {"loss": "sigmoid"}, {"image_pool": "attention"}])
def test_gradient_reaches_every_trainable_parameter_and_each_is_in_one_group(changes: dict[str, Any]) -> None:
    method = clip(**changes)
    terms = method(pairs_at(0), STEP)
    assert list(terms) == ["contrastive"]
    terms["contrastive"].backward()
    trainable = {name: p for name, p in method.named_parameters() if p.requires_grad}
    assert [name for name, p in trainable.items() if p.grad is None] == []
    assert set(method.named_parameters()) and "backbone.mask_token" not in trainable
    grouped = [name for group in method.parameter_groups() for name in group.names]
    assert sorted(grouped) == sorted(trainable)
    assert {"backbone", "image_projection", "text"} <= set(method.export())


def test_scale_and_bias_start_where_the_papers_say() -> None:
    assert float(clip().logits()[0].detach()) == pytest.approx(1 / 0.07)
    scale, bias = clip(loss="sigmoid").logits()
    assert bias is not None
    assert (float(scale.detach()), float(bias.detach())) == pytest.approx((10.0, -10.0))


def test_features_are_unit_vectors_and_chance_is_the_logarithm_of_the_batch() -> None:
    method = clip()
    for features in method.features(pairs_at(0)):
        assert features.dtype == torch.float32
        torch.testing.assert_close(features.norm(dim=1), torch.ones(SAMPLES))
    with torch.no_grad():
        method.text_tower.projection.weight.zero_()
    assert float(method(pairs_at(0), STEP)["contrastive"].detach()) == pytest.approx(math.log(SAMPLES), abs=1e-5)


def test_one_crop_of_nearly_the_whole_picture_with_clips_colours_is_asked_for() -> None:
    (view,) = one_view(ClipSettings())
    assert (view.name, view.count, view.size, view.crop_scale) == ("image", 1, 224, (0.9, 1.0))
    assert (view.augment[0].flip_probability, view.augment[0].jitter_probability) == (0.0, 0.0)
    assert (view.normalize.mean, view.normalize.std) == (OPENAI_MEAN, OPENAI_STD)
    method = clip()
    assert method.text is not None and (method.text.tokenizer, method.text.context) == ("ViT-B-32", 6)


def _group(groups: list[ParameterGroup], name: str) -> ParameterGroup:
    return next(group for group in groups if name in group.names)


def test_rates_and_decay_of_each_part() -> None:
    groups = clip(layerwise_lr_decay=0.5, text_layerwise_lr_decay=0.25, text_lr_mult=0.1, loss="sigmoid").parameter_groups()
    expected = {
        "backbone.vit.pos_embed": (0.5**3, 0.0),
        "backbone.vit.cls_token": (0.5**3, 0.0),
        "backbone.vit.patch_embed.proj.weight": (0.5**3, 1.0),
        "backbone.vit.blocks.1.attn.qkv.weight": (0.5, 1.0),
        "backbone.vit.blocks.1.attn.qkv.bias": (0.5, 0.0),
        "image_projection.weight": (1.0, 1.0),
        "text_tower.positions": (0.1 * 0.25**3, 0.0),
        "text_tower.tokens.weight": (0.1 * 0.25**3, 1.0),
        "text_tower.blocks.0.fc1.weight": (0.1 * 0.25**2, 1.0),
        "text_tower.projection.weight": (0.1, 1.0),
        "logits.log_scale": (1.0, 0.0),
        "logits.bias": (1.0, 0.0),
    }
    for name, (lr, wd) in expected.items():
        group = _group(groups, name)
        assert (group.lr_scale, group.wd_scale) == pytest.approx((lr, wd)), name
    decayed = clip(no_weight_decay=()).parameter_groups()
    assert _group(decayed, "backbone.vit.pos_embed").wd_scale == _group(decayed, "text_tower.positions").wd_scale == 1.0


@pytest.mark.parametrize(("tower", "prefix"), [("image", "backbone."), ("text", "text_tower.")])
def test_a_frozen_tower_stands_still_and_the_other_learns(tower: str, prefix: str) -> None:
    method = clip(freeze=(tower,))
    method(pairs_at(0), STEP)["contrastive"].backward()
    for name, parameter in method.named_parameters():
        if name != "backbone.mask_token":
            assert (parameter.grad is None) == name.startswith(prefix), name


def test_patch_dropout_is_each_samples_own_and_the_same_on_any_rank() -> None:
    ids = [5, (3 << 32) | 7, 2**62 + 9, 11]
    whole = random_keep(torch.tensor(ids), 640, 196, 0.5)
    assert whole.shape == (4, 98)
    assert bool((whole.diff(dim=1) > 0).all()) and int(whole.min()) >= 0 and int(whole.max()) < 196
    assert torch.equal(random_keep(torch.tensor(ids[2:]), 640, 196, 0.5), whole[2:])
    assert not torch.equal(random_keep(torch.tensor(ids), 704, 196, 0.5), whole)
    assert len({tuple(row) for row in whole.tolist()}) == 4
    assert random_keep(torch.tensor(ids), 0, 4, 0.99).shape == (4, 1)
    counts = torch.bincount(random_keep(torch.tensor(list(range(2000))), 64, 16, 0.75).flatten(), minlength=16)
    assert float(counts.float().std()) < 40  # 500 each, binomial deviation 19


def test_patches_are_left_out_in_training_only_and_the_class_token_stays() -> None:
    method = clip(patch_dropout=0.5, model=MODEL)
    seen: list[int] = []
    method.backbone.vit.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    method(pairs_at(0), STEP)
    method.eval()
    method(pairs_at(0), STEP)
    assert seen == [1 + 2, 1 + 4]


@pytest.mark.parametrize("shape", [(4, 16), (16, 4)])
def test_half_of_the_patches_of_a_rectangle_are_left_out(shape: tuple[int, int]) -> None:
    method, batch = clip(patch_dropout=0.5, model=MODEL), pairs_at(0)
    patch, samples = method.backbone.patch, len(batch.ids)
    size = (shape[0] * patch // 4, shape[1] * patch // 4)
    seen: list[int] = []
    method.backbone.vit.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    method(replace(batch, views={"image": [torch.randn(samples, 3, *size)]}), STEP)
    assert seen == [1 + 2]


def test_what_is_drawn_in_a_micro_batch_is_drawn_alike_when_it_comes_again() -> None:
    method = clip(model=ModelSettings(**{**MODEL.model_dump(), "drop_path": 0.5}), patch_dropout=0.5)
    parts = [pairs_at(0, slice(0, 4)), pairs_at(0, slice(4, 8))]
    with torch.no_grad():
        method.before_accumulation(parts, STEP)
    both = []
    for part in parts:
        torch.manual_seed(part.seed)
        both.append(method(part, STEP)["contrastive"])
    assert both[0].item() == pytest.approx(both[1].item(), abs=1e-6)
    (torch.stack(both).mean()).backward()
    found = {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}
    method.zero_grad()
    kept = []
    for part in parts:
        torch.manual_seed(part.seed)
        kept.append(method.features(part))
    scale, bias = method.logits()
    method.compare([torch.cat(both) for both in zip(*kept, strict=True)], scale, bias).backward()
    for name, p in method.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(found[name], p.grad, atol=2e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_short_captions_without_their_padding_give_the_same_features_and_gradients() -> None:
    found = []
    for length in (CONTEXT, CONTEXT - 1):
        method, batch = clip(), pairs_at(0)
        assert batch.tokens is not None and method.text is not None and method.text.trim
        parts = [replace(pairs_at(0, rows), tokens=batch.tokens[rows, :length]) for rows in (slice(0, 4), slice(4, 8))]
        with torch.no_grad():
            method.before_accumulation(parts, STEP)
        torch.stack([method(part, STEP)["contrastive"] for part in parts]).mean().backward()
        gradients = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
        found.append((torch.cat([method.features(part)[1].detach() for part in parts]), gradients))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-6, rtol=0)
    assert found[0][1].keys() == found[1][1].keys()
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(gradient, found[1][1][name], atol=1e-6, rtol=1e-5)


def test_captions_are_never_trimmed_for_a_tower_that_looks_at_their_padding() -> None:
    both_ways = CLIP(
        build_tower(MODEL, image_size=SIDE),
        ClipSettings(views=ViewSettings(global_size=SIDE), text=TEXT.model_copy(update={"causal": False}), embed_dim=12),
    )
    assert both_ways.text is not None and not both_ways.text.trim
    tokens = captions(SAMPLES)
    with torch.no_grad():
        assert (both_ways.text_tower(tokens) - both_ways.text_tower(tokens[:, :-1])).abs().max() > 1e-4


def test_a_batch_without_captions_is_refused() -> None:
    with pytest.raises(DataError, match="captions"):
        clip()(replace(pairs_at(0), tokens=None), STEP)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_a_hundred_steps_on_one_batch_teach_it_and_clip_finds_every_pair(loss: str) -> None:
    method: CLIP = clip(loss=loss)
    data = pairs_at(0)
    optimizer = torch.optim.AdamW(method.parameters(), lr=3e-3)
    losses = []
    for _ in range(100):
        term = method(data, STEP)["contrastive"]
        optimizer.zero_grad()
        term.backward()
        optimizer.step()
        losses.append(float(term.detach()))
    images, texts = method.features(data)
    assert losses[-1] < 0.5 * losses[0]
    assert loss == "sigmoid" or torch.equal((images @ texts.T).argmax(1), torch.arange(SAMPLES))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["method.gather_with_grad=false"], "unknown key 'method.gather_with_grad'"),
        (["method.local_loss=false"], "unknown key 'method.local_loss'"),
        (["method.freeze=[image, text]"], "must leave one tower to train"),
        (["method.augment.local_blur_probability=0.2"], "the method has no local crops"),
        (["method.augment.blur_probability=[0.1, 0.2]"], "must be one number: the method has one view"),
        (["method.views.local_count=2"], "unknown key 'method.views.local_count'"),
        (["method.views.global_size=225"], "is not divisible by the patch side 32; 224 or 256 would"),
        (["method.text.architecture=ViT-B-33"], "ViT-B-32"),
        (["method.text={architecture: null, width: 64}"], "width, depth and num_heads are all required"),
        (["method.text.num_heads=7"], "is not divisible by 7 heads"),
    ],
)
def test_settings_that_train_wrongly_or_not_at_all_are_refused(words: list[str], told: str) -> None:
    with pytest.raises(InvalidConfig, match=re.escape(told)):
        load("clip/vit_b32_cc12m", words)


def test_an_odd_grid_has_no_cells() -> None:
    with pytest.raises(InvalidConfig, match=r"method\.mask_unit"):
        load("detailclip/vit_b16_25ep", ["method.views.global_size=240"])
    assert load("detailclip/vit_b16_25ep", ["method.views.global_size=240", "method.mask_unit=patch"])
