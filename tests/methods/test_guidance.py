"""Guidance by metadata: which methods have it, its terms over ranks, stages and micro-batches, its state, what it does."""

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
        gradients = torch.autograd.grad(term, list(guided.parameters()), retain_graph=True, allow_unused=True)
        reached = {n for (n, _), g in zip(guided.named_parameters(), gradients, strict=True) if g is not None and g.any()}
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


@pytest.mark.parametrize("by", ["means", "reversal"])
def test_discouraged_features_lose_the_site_and_keep_the_class(by: str) -> None:
    """A linear network of inputs of which one direction is the site and another the class, trained with the terms alone."""
    from pipeline.methods.shared.guidance import Guidance
    from pipeline.methods.shared.guidance_settings import GuidanceSettings

    generator = torch.Generator().manual_seed(0)
    numbers, classes = torch.randint(0, 3, (512,), generator=generator), torch.randint(0, 2, (512,), generator=generator)
    inputs = 0.3 * torch.randn(512, 12, generator=generator)
    inputs[:, :3] += 2 * F.one_hot(numbers, 3)
    inputs[:, 3:5] += F.one_hot(classes, 2)
    torch.manual_seed(1)
    network = torch.nn.Linear(12, 8)
    settings = GuidanceSettings.model_validate({"columns": [SITE, ORGAN], "discourage_by": by})
    guidance = Guidance(settings, 8)
    state = guidance.initial_state()
    optimizer = torch.optim.AdamW([*network.parameters(), *guidance.parameters()], lr=1e-2)

    def ratio(of: Tensor) -> float:
        features = F.normalize(network(inputs), dim=1).detach()
        return float(losses.correlation_ratio(losses.value_sums(features, of, int(of.max()) + 1)))

    site, organ = ratio(numbers), ratio(classes)
    for step in range(150):
        rows = torch.arange(64) + 64 * (step % 8)
        terms, _ = guidance(network(inputs[rows]), {"site": numbers[rows], "organ, part": classes[rows]}, state)
        optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        optimizer.step()
        state |= guidance.moved(state)
    assert ratio(numbers) < 0.2 * site and ratio(classes) > organ
