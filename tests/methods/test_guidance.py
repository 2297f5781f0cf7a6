"""Guidance by metadata: which methods have it, its terms over ranks, stages and micro-batches, its state, its effect."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline import losses
from pipeline.checkpoint.files import read
from pipeline.checkpoint.reader import read_student
from pipeline.config.schema import METHODS
from pipeline.data.augment.views import Batch
from pipeline.data.pack.synthetic import render
from pipeline.errors import ConfigError
from pipeline.methods.base import Step
from tests.helpers.rank_pool import pool
from tests.helpers.tiny_methods import STEP, batch_at, first_steps, interrupted, make_method

SITE = {"name": "site", "direction": "discourage", "values": ["a", "b", 3], "weight": 2.0}
ORGAN = {"name": "organ, part", "direction": "encourage", "values": ["x", "y"], "weight": 0.5}
GUIDED: dict[str, Any] = {"guidance": {"columns": [SITE, ORGAN]}}
REVERSED: dict[str, Any] = {"guidance": {"columns": [SITE, ORGAN], "discourage_by": "reversal"}}
ABLE = ("byol", "dino", "dinov2", "lejepa", "mocov2", "mocov3", "simclr")
CLOSE = 2e-5


@pytest.mark.parametrize("name", ABLE)
def test_a_method_adds_its_terms_from_the_global_crops_of_its_student(name: str) -> None:
    """The class tokens are those that the student computes itself: there is no other forward pass."""
    plain, guided = make_method(name), make_method(name, **GUIDED)
    guided.load_state_dict(plain.state_dict(), strict=False)
    passes: list[tuple[int, bool]] = []
    for method in (plain, guided):
        method.backbone.register_forward_hook(lambda _, inputs, __: passes.append((len(inputs[0]), torch.is_grad_enabled())))
    batch = batch_at(guided, 0)
    for method in (plain, guided):
        torch.manual_seed(0)
        method.before_accumulation([batch], STEP)
    passes.clear()
    torch.manual_seed(0)
    before = plain(batch, STEP)
    own = list(passes)
    passes.clear()
    torch.manual_seed(0)
    after = guided(batch, STEP)
    assert passes == own
    added = {key: after.pop(key) for key in ("discourage_site", "encourage_organ__part")}
    assert after.keys() == before.keys()
    assert float(guided.metrics["site_missing"]) == pytest.approx(1 / 8)
    for term in added.values():
        trained = {n: p for n, p in guided.named_parameters() if p.requires_grad}
        gradients = torch.autograd.grad(term, list(trained.values()), retain_graph=True, allow_unused=True)
        reached = {n for n, gradient in zip(trained, gradients, strict=True) if gradient is not None and gradient.any()}
        assert any(n.startswith("backbone.vit.blocks.0") for n in reached)
        assert not any("head" in n or "projector" in n for n in reached)


@pytest.mark.parametrize("name", sorted(set(METHODS) - {*ABLE, "toy"}))
def test_other_methods_refuse_columns_before_anything_is_built(name: str) -> None:
    with pytest.raises(ConfigError, match=f"does not apply to {name}.*dinov2"):
        make_method(name, **GUIDED)


def test_a_resnet_is_refused() -> None:
    with pytest.raises(ConfigError, match="is for vision transformers"):
        make_method("simclr", model={"timm_name": "resnet18"}, **GUIDED)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({"values": ["a"]}, "at least 2"),
        ({"values": ["3", 3]}, "twice"),
        ({"values": ["a", None]}, "None"),
        ({"values": ["a", ["b"]]}, "give strings"),
        ({"weight": 0}, "greater than 0"),
        ({"direction": "ignore"}, "encourage"),
        ({"name": ""}, "at least 1"),
    ],
)
def test_columns_that_say_nothing_are_refused(column: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_method("dinov2", guidance={"columns": [SITE | column]})


def test_two_columns_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="same name"):
        make_method("dinov2", guidance={"columns": [SITE, {**ORGAN, "name": "site"}]})


def test_without_columns_a_method_has_nothing_of_it() -> None:
    method = make_method("dinov2")
    assert method.guidance is None and not any("guidance" in n for n in [*method.extra_state, *dict(method.named_parameters())])
    assert not method._forward_hooks and not method.backbone._forward_hooks


def test_the_term_is_that_of_the_unit_class_tokens_about_the_running_sums() -> None:
    method = make_method("dino", **GUIDED)
    batch = batch_at(method, 0)
    tokens = F.normalize(method.backbone(torch.cat(batch.views["global"]), patches="none").cls, dim=1)
    sums = method.extra_state["guidance_site"].clone()
    expected = 2.0 * losses.dependence(tokens, batch.columns["site"].repeat(2), sums)
    terms = method(batch, STEP)
    torch.testing.assert_close(terms["discourage_site"], expected)
    method.after_step(STEP)
    new = 0.9 * sums + losses.value_sums(tokens.detach(), batch.columns["site"].repeat(2), 3)
    torch.testing.assert_close(method.extra_state["guidance_site"], new)


def test_a_skipped_step_leaves_no_trace_in_the_running_sums() -> None:
    for name in ABLE:
        method = make_method(name, **GUIDED)
        before = method.extra_state["guidance_site"].clone()
        method(batch_at(method, 0), STEP)
        method.on_step_skipped()
        assert method.guidance is not None and not method.guidance.moved(method.extra_state), name
        method.before_accumulation([batch_at(method, 1)], STEP)
        method(batch_at(method, 1), STEP)
        method.after_step(Step(index=1), torch.tensor(False))  # as on a GPU, where the host does not know it yet
        assert torch.equal(method.extra_state["guidance_site"], before), name


def _results(world: int, zero: Literal[0, 1, 2, 3], accumulation: int, changes: dict[str, Any], name: str = "dinov2") -> Any:
    ranks = pool(world).run(first_steps, name=name, zero=zero, accumulation=accumulation, **changes)
    terms = {n: torch.stack([rank["terms"][n] for rank in ranks]).mean() for n in ranks[0]["terms"]}
    return terms, ranks[0]["state"]


@pytest.mark.parametrize("changes", [GUIDED, REVERSED], ids=["means", "reversal"])
@pytest.mark.parametrize(
    ("world", "zero", "accumulation"),
    [
        (2, 0, 1),
        (1, 0, 4),
        (2, 3, 2),
        pytest.param(2, 1, 1, marks=pytest.mark.slow),
        pytest.param(2, 2, 2, marks=pytest.mark.slow),
    ],
)
def test_ranks_stages_and_micro_batches_do_not_change_the_steps(
    world: int, zero: Literal[0, 1, 2, 3], accumulation: int, changes: dict[str, Any]
) -> None:
    terms, state = _results(world, zero, accumulation, changes)
    expected_terms, expected = _results(1, 0, 1, changes)
    assert {"discourage_site", "encourage_organ__part"} <= expected_terms.keys()
    for key, term in expected_terms.items():
        torch.testing.assert_close(terms[key], term, atol=CLOSE, rtol=CLOSE, msg=key)
    assert state.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(state[key].flatten(), tensor.flatten(), atol=CLOSE, rtol=CLOSE, msg=key)


@pytest.mark.parametrize(("before", "after"), [((2, 3), (2, 3)), ((2, 0), (1, 1))], ids=str)
def test_a_resumed_run_is_the_same(
    before: tuple[int, Literal[0, 1, 2, 3]], after: tuple[int, Literal[0, 1, 2, 3]], tmp_path: Path
) -> None:
    """Bit for bit with the same ranks and stage, within rounding with others; the checkpoint holds probe and sums."""
    common: dict[str, Any] = {"name": "dinov2", "directory": str(tmp_path), "seed": 0, **GUIDED}
    straight = pool(before[0]).run(interrupted, zero=before[1], load_at=None, until=4, save_at=2, **common)[0]
    resumed = pool(after[0]).run(interrupted, zero=after[1], load_at=2, until=4, save_at=None, **{**common, "seed": 9})[0]
    written: dict[str, Tensor] = dict(read_student(read(tmp_path / "step_000000002")))
    assert written["guidance.probes.organ__part.weight"].any()
    assert "memory guidance_site" in straight
    for name, tensor in straight.items():
        if before == after:
            assert torch.equal(resumed[name], tensor), name
        elif not name.startswith("moment"):
            torch.testing.assert_close(resumed[name], tensor, atol=CLOSE, rtol=CLOSE)


@pytest.mark.parametrize(("before", "after"), [(GUIDED, {}), ({}, GUIDED), (GUIDED, GUIDED)], ids=["ends", "begins", "stays"])
def test_a_run_with_other_columns_continues_from_the_heads_of_another(
    before: dict[str, Any], after: dict[str, Any], tmp_path: Path
) -> None:
    """Probes belong to the columns of a run, and are new in the next one."""
    from pipeline.weights.init_from import _matched, find
    from pipeline.weights.settings import InitSettings

    options: dict[str, Any] = {"name": "dinov2", "directory": str(tmp_path), "seed": 0, "load_at": None, "until": 1, "save_at": 1}
    pool(1).run(interrupted, zero=0, **options, **before)
    method = make_method("dinov2", **after)
    source = find(str(tmp_path / "step_000000001"))
    weights, _ = _matched(method, source, InitSettings(source=str(tmp_path), heads=True), shapes_only=True)
    expected = {n for n, p in method.named_parameters() if p.requires_grad and not n.startswith("guidance.")}
    assert weights.keys() == expected


def _scenes(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scenes of 32 pixels in which each of three sites casts a colour: float ``[count, 3, 32, 32]``, their classes and sites."""
    classes = [render(0, index, 32).label for index in range(count)]
    images = torch.stack([torch.from_numpy(render(0, index, 32).image).permute(2, 0, 1) for index in range(count)]) / 255
    sites = torch.randint(0, 3, (count,), generator=torch.Generator().manual_seed(1))
    casts = torch.tensor([[1.0, 0.7, 0.5], [0.6, 1.0, 0.7], [0.6, 0.6, 1.0]])
    return images * casts[sites][:, :, None, None] - 0.4, torch.tensor(classes), sites


def _trained(weight: float, images: Tensor, sites: Tensor) -> Tensor:
    """Trains SimCLR with crops that keep colours; returns class tokens of all images ``[count, width]``."""
    column = {**SITE, "values": [0, 1, 2], "weight": weight}
    changes: dict[str, Any] = {"guidance": {"columns": [column]}} if weight else {}
    model = {"embed_dim": 48, "depth": 2, "num_heads": 3, "patch_size": 8, "layer_scale": None}
    method = make_method("simclr", method={"views": {"global_size": 32}, "head_norm": "none"}, model=model, **changes)
    method.extra_state = {} if method.guidance is None else method.guidance.initial_state()
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=2e-3)
    generator = torch.Generator().manual_seed(2)
    for index in range(120):
        rows = torch.randint(0, len(images) // 2, (48,), generator=generator)
        views = []
        for _ in range(2):
            shift = torch.randint(-6, 7, (2,), generator=generator).tolist()
            view = images[rows].roll(shift, (2, 3))
            views.append(view.flip(3) if torch.rand((), generator=generator) < 0.5 else view)
        columns = {"site": sites[rows]} if weight else {}
        batch = Batch({"global": views}, torch.full((48,), -1), [""] * 48, rows.tolist(), 0, columns=columns)
        optimizer.zero_grad()
        torch.stack(list(method(batch, Step(index=index)).values())).sum().backward()
        optimizer.step()
        method.after_step(Step(index=index))
    with torch.no_grad():
        return F.normalize(method.backbone(images, patches="none").cls, dim=1)


def _probe(features: Tensor, labels: Tensor) -> float:
    """Accuracy on the second half of a ridge regression on the first, with a penalty of the mean variance of a feature."""
    half = len(features) // 2
    inputs, targets = (features - features[:half].mean(0)).double(), F.one_hot(labels).double()
    squares = inputs[:half].T @ inputs[:half]
    fitted = torch.linalg.solve(
        squares + squares.diagonal().mean() * torch.eye(len(squares)), inputs[:half].T @ (targets[:half] - targets[:half].mean(0))
    )
    return float(((inputs[half:] @ fitted + targets[:half].mean(0)).argmax(1) == labels[half:]).double().mean())


def _knn(features: Tensor, labels: Tensor) -> float:
    half = len(features) // 2
    nearest = (features[half:] @ features[:half].T).topk(10).indices
    return float((F.one_hot(labels[:half][nearest]).sum(1).argmax(1) == labels[half:]).double().mean())


@pytest.mark.slow
def test_discouraged_the_site_is_harder_to_read_from_class_tokens_and_the_class_is_not() -> None:
    """Without a penalty, a probe of noiseless features finds the site in directions of little variance too (99 %)."""
    images, classes, sites = _scenes(1200)
    without, with_ = (_trained(weight, images, sites) for weight in (0.0, 3.0))
    ratios = [float(losses.correlation_ratio(losses.value_sums(features, sites, 3))) for features in (without, with_)]
    assert ratios[1] < 0.2 * ratios[0], ratios
    probes = [_probe(features, sites) for features in (without, with_)]
    assert probes[1] < probes[0] - 0.04, probes
    assert _knn(with_, sites) < _knn(without, sites)
    assert _knn(with_, classes) > _knn(without, classes) - 0.05
