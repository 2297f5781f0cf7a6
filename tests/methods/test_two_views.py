"""What the methods of two views ask for, compare and remember."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from pipeline.data.augment.settings import MultiCropSettings
from pipeline.methods.byol.settings import ByolSettings
from pipeline.methods.dino.settings import DinoSettings
from pipeline.methods.mocov2.method import MoCoV2
from pipeline.methods.mocov2.settings import Mocov2Settings
from pipeline.methods.shared.two_views import Repeller, two_views
from pipeline.methods.shared.two_views_settings import RepelSettings
from pipeline.methods.simclr.settings import SimclrSettings
from pipeline.models.norms import GlobalBatchNorm
from tests.helpers.rank_pool import pool
from tests.helpers.tiny_methods import STEP, advance, batch_at, config, engine_of, make_method


def test_views_are_the_papers() -> None:
    (views,) = two_views(SimclrSettings())
    assert (views.count, views.size, views.crop_scale) == (2, 224, (0.08, 1.0))
    assert [a.blur_probability for a in views.augment] == [0.5] and views.augment[0].blur_kernel == 23
    assert (views.augment[0].brightness, views.augment[0].hue_shift, views.normalize.mean) == (0.8, 0.2, (0.0, 0.0, 0.0))
    (views,) = two_views(ByolSettings())
    assert [(a.blur_probability, a.solarize_probability) for a in views.augment] == [(1.0, 0.0), (0.1, 0.2)]
    (views,) = two_views(Mocov2Settings())
    assert (views.crop_scale, views.augment[0].saturation) == ((0.2, 1.0), 0.4)
    large, small = two_views(DinoSettings())
    assert (large.crop_scale, small.count, small.size, small.crop_scale) == ((0.4, 1.0), 8, 96, (0.05, 0.4))


def test_what_a_section_leaves_out_is_the_methods_own() -> None:
    views = config("mocov2").method.views
    assert (views.global_size, views.global_scale) == (16, (0.2, 1.0))
    assert config("simclr", method={"augment": {"hue_space": "yiq"}}).method.augment.brightness == 0.8
    assert config("simclr", method={"augment": {"hue_space": "yiq"}}).method.augment.hue_space == "yiq"


def test_there_is_nothing_to_repel_without_local_crops() -> None:
    with pytest.raises(ValidationError, match="local_count of 2"):
        ByolSettings(local_repulsion=RepelSettings())
    with pytest.raises(ValidationError, match="local_count must be 0"):
        SimclrSettings(views=MultiCropSettings(local_count=2))


def test_the_judge_learns_from_features_that_do_not_and_they_from_a_judge_that_does_not() -> None:
    torch.manual_seed(0)
    repeller = Repeller(6, RepelSettings(hidden=8))
    local = [torch.randn(5, 6).requires_grad_() for _ in range(2)]
    terms = repeller(local)
    weights = list(repeller.parameters())
    assert torch.autograd.grad(terms["repel"], weights, allow_unused=True, retain_graph=True) == (None,) * len(weights)
    assert all(g is not None and g.abs().sum() > 0 for g in torch.autograd.grad(terms["repel"], local, retain_graph=True))
    assert torch.autograd.grad(terms["judge"], local, allow_unused=True, retain_graph=True) == (None, None)
    assert all(g is not None for g in torch.autograd.grad(terms["judge"], weights))


def test_the_queue_takes_the_newest_pictures_first_and_forgets_the_oldest() -> None:
    made = make_method("mocov2", method={"queue": 11, "local_repulsion": None})
    assert isinstance(made, MoCoV2)
    before, kept = made.extra_state["queue"].clone(), []
    for index in range(2):
        batch = batch_at(made, index)
        made(replace(batch, ids=batch.ids[::-1]), STEP)
        kept.append(made._new[0][1])
        made.after_step(STEP)
    queue = made.extra_state["queue"]
    assert queue.shape == (11, 8)
    torch.testing.assert_close(queue[:8], kept[1])  # the last row has the lowest number, so the first the highest
    torch.testing.assert_close(queue[8:], kept[0][:3])
    assert not torch.equal(queue[8:], before[:3])
    made(batch_at(made, 3), STEP)
    made.on_step_skipped()
    assert made._new == [] and torch.equal(made.extra_state["queue"], queue)


def queue_after(accumulation: int) -> torch.Tensor:
    made = make_method("mocov2", method={"local_repulsion": None})
    engine = engine_of(made, 1, accumulation)
    advance(made, engine, 0, accumulation)
    queue = made.extra_state["queue"].clone()
    engine.close()
    return queue


def test_the_queue_is_the_same_on_any_number_of_ranks() -> None:
    (alone,) = pool(1).run(queue_after, accumulation=2)
    for queue in pool(2).run(queue_after, accumulation=2):
        torch.testing.assert_close(queue, alone, atol=1e-6, rtol=0)


def test_a_batch_norm_in_dinos_head_couples_the_batch_and_the_teachers_pass_does_not_move_its_averages() -> None:
    assert not make_method("dino", method={"local_repulsion": None}).couples_batch
    made = make_method("dino", method={"local_repulsion": None, "head_norm": "batch"}).train()
    assert made.couples_batch and made.teacher is not None
    before = {name: buffer.clone() for name, buffer in made.teacher.named_buffers() if "running" in name}
    first = made(batch_at(made, 0), STEP)["dino"]
    now = dict(made.teacher.named_buffers())
    assert before and all(torch.equal(now[name], buffer) for name, buffer in before.items())
    for name in before:
        now[name].fill_(0.3)  # never read: targets are normalised by their own batch
    assert torch.equal(made(batch_at(made, 0), STEP)["dino"], first)


def _means(method: Any) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in method.named_buffers() if name.endswith("running_mean")}


def _follow(mean: torch.Tensor, batch: torch.Tensor) -> None:
    mean.lerp_(batch.mean(0), 0.1)


@pytest.mark.parametrize("name", ["byol", "dino", "mocov2", "mocov3"])
def test_a_teachers_own_statistics_are_those_of_its_own_passes(name: str) -> None:
    changes = {"head_norm": "batch", "local_repulsion": None}
    made = make_method(name, method={**changes, "teacher_norm_statistics": "own"}).train()
    assert made.teacher is not None
    norms = {
        f"{key}.{inner}": layer
        for key, module in made.teacher.modules.items()
        for inner, layer in module.named_modules()
        if isinstance(layer, GlobalBatchNorm)
    }
    assert norms
    running = {key: layer.running_mean.clone() for key, layer in norms.items()}
    for key, layer in norms.items():
        layer.register_forward_pre_hook(lambda _, inputs, mean=running[key]: _follow(mean, inputs[0]))
    for index in range(2):
        made(batch_at(made, index), STEP)
        made.after_step(STEP)
    now = _means(made.teacher)
    assert len(now) == len(norms)
    for key, mean in running.items():
        torch.testing.assert_close(now[f"{key}.running_mean"], mean)
    assert any(not torch.equal(now[key], mean) for key, mean in _means(made).items() if key in now)
    made.teacher.reset()
    assert all(torch.equal(_means(made.teacher)[key], _means(made)[key]) for key in now)


def test_statistics_of_the_teacher_are_refused_without_a_teacher() -> None:
    with pytest.raises(ValidationError, match="SimCLR has no teacher"):
        SimclrSettings(teacher_norm_statistics="own")


@pytest.mark.parametrize("name", ["byol", "mocov3"])
def test_the_predictor_has_a_learning_rate_of_its_own(name: str) -> None:
    made = make_method(name, method={"predictor_lr_mult": 10.0})
    scales = {parameter: group.lr_scale for group in made.parameter_groups() for parameter in group.names}
    assert {key for key, scale in scales.items() if scale == 10.0} == {key for key in scales if key.startswith("predictor.")}
    assert {scale for key, scale in scales.items() if not key.startswith("predictor.")} == {1.0}


def test_batch_norm_sees_one_view_at_a_time_if_asked_to() -> None:
    alone, together = (make_method("simclr", method={"batch_norm_per_view": each}).train() for each in (True, False))
    batch = batch_at(alone, 0)
    views = batch.views["global"]
    expected = [alone.projector(alone.backbone(view, patches="none").cls) for view in views]
    for ours, theirs in zip(alone.features(batch), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    both = together.projector(together.backbone(torch.cat(views), patches="none").cls)
    torch.testing.assert_close(torch.cat(together.features(batch)), both)
    assert not torch.allclose(torch.cat(expected), both, atol=1e-3)


def test_without_predictor_features_of_byol_become_alike() -> None:
    ranks = {}
    for predictor in (True, False):
        made = make_method("byol", method={"predictor": predictor})
        optimizer = torch.optim.AdamW(made.parameters(), lr=1e-2)
        for index in range(30):
            loss = torch.stack(list(made(batch_at(made, index), STEP).values())).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            made.after_step(STEP)
        ranks[predictor] = (float(loss.detach()), float(made.metrics["feature_rank"]))
    assert ranks[False][0] < 0.1 * ranks[True][0], ranks
