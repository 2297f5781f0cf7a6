"""Whatever is registered as a method keeps what all methods promise. A new one is tested by being registered."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.config.schema import METHODS
from pipeline.models.tokens import Tokens
from tests.helpers.rank_pool import pool
from tests.helpers.tiny_methods import STEP, batch_at, config, first_steps, interrupted, make_method

METHODS = sorted(METHODS)


def staged(stages: dict[str, int], fast: set[tuple[str, int]]) -> list[Any]:
    """ZeRO stages 1 and 3 of all methods: some for every run, each method with one stage besides, and all in full runs."""
    slow = pytest.mark.slow
    return [
        pytest.param(
            name,
            zero,
            id=f"{name}-{zero}",
            marks=[] if (name, zero) in fast else [slow] * (zero == stages[name]) or [slow, pytest.mark.full],
        )
        for name in METHODS
        for zero in (1, 3)
    ]


# Each method has one stage on two ranks against one, and the other from a checkpoint.
ON_TWO_RANKS = {name: (1, 3)[number % 2] for number, name in enumerate(METHODS)}
FROM_A_CHECKPOINT = {name: 4 - zero for name, zero in ON_TWO_RANKS.items()}


@pytest.mark.parametrize("name", METHODS)
def test_it_is_built_from_checked_settings(name: str) -> None:
    made = make_method(name)
    assert config(name).method.reads_text == (made.text is not None)
    trainable = {parameter for parameter, p in made.named_parameters() if p.requires_grad}
    grouped = [parameter for group in made.parameter_groups() for parameter in group.names]
    assert sorted(grouped) == sorted(trainable) and trainable
    assert all(p.ndim > 0 for p in made.parameters())
    assert made.views and all(value.dtype == torch.float32 for value in made.extra_state.values())


@pytest.mark.parametrize("name", METHODS)
def test_every_trainable_weight_has_a_slope_and_nothing_else_has(name: str) -> None:
    made = make_method(name)
    batch = batch_at(made, 0)
    made.before_accumulation([batch], STEP)
    terms = made(batch, STEP)
    assert all(term.ndim == 0 and bool(term.isfinite()) for term in terms.values())
    torch.stack(list(terms.values())).sum().backward()
    for parameter, p in made.named_parameters():
        unused = name == "distill" and parameter == "backbone.mask_token"  # its student sees all
        assert (p.grad is not None) == (p.requires_grad and not unused), parameter
    teachers = made.teacher.state_dict().values() if made.teacher is not None else ()
    assert not any(t.requires_grad for t in [*teachers, *made.extra_state.values(), *made.metrics.values()])


@pytest.mark.parametrize("name", METHODS)
def test_it_exports_a_backbone_that_sees_pictures(name: str) -> None:
    made = make_method(name)
    backbone = made.export()["backbone"].eval()
    size = made.views[0].size
    with torch.no_grad():
        tokens = backbone(torch.randn(2, 3, size, size))
    assert isinstance(tokens, Tokens)
    assert tokens.cls.shape == (2, 16) and tokens.patches.shape[::2] == (2, 16)


@pytest.mark.parametrize("name", METHODS)
def test_twenty_steps_on_one_batch_teach_it(name: str) -> None:
    made = make_method(name)
    batch = batch_at(made, 0)
    optimizer = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], lr=STEP.lr)
    history = []
    for _ in range(20):
        made.before_accumulation([batch], STEP)
        loss = torch.stack(list(made(batch, STEP).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        # What earlier batches left stays: of one batch alone a queue would fill with the very keys that are to be found.
        earlier = dict(made.extra_state)
        made.after_step(STEP)
        made.extra_state = earlier
        history.append(float(loss.detach()))
    assert sum(history[-3:]) / 3 < 0.97 * sum(history[:3]) / 3, history


@cache
def alone(name: str) -> dict[str, Any]:
    """One rank, one batch."""
    result: dict[str, Any] = pool(1).run(first_steps, name=name, zero=0)[0]
    return result


def whole(ranks: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Gradients out of all ranks' pieces."""
    found: dict[str, Tensor] = {}
    for rank in ranks:
        for name, start, shape, piece in rank["gradients"]:
            flat = found.setdefault(name, torch.full((torch.Size(shape).numel(),), torch.nan))
            flat[start : start + len(piece)] = piece
    return found


@pytest.mark.parametrize(("name", "zero"), staged(ON_TWO_RANKS, {("dinov2", 3), ("clip", 3)}))
def test_two_ranks_are_one(name: str, zero: int) -> None:
    compare(pool(2).run(first_steps, name=name, zero=zero), alone(name))


def compare(ranks: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    for term, value in expected["terms"].items():
        assert float(sum(rank["terms"][term] for rank in ranks)) / len(ranks) == pytest.approx(float(value), rel=2e-5, abs=2e-6)
    found, slopes = whole(ranks), whole([expected])
    assert found.keys() == slopes.keys()
    largest = max(float(slope.abs().max()) for slope in slopes.values())
    for parameter, slope in slopes.items():
        near = max(1e-4 * float(slope.abs().max()), 1e-5 * largest)  # what a batch norm takes off again has a slope of rounding
        torch.testing.assert_close(found[parameter], slope, atol=near, rtol=0, msg=lambda m, n=parameter: f"{n}: {m}")
    for rank in ranks:
        assert rank["state"].keys() == expected["state"].keys()
        for key, value in expected["state"].items():
            torch.testing.assert_close(rank["state"][key], value, atol=2e-4, rtol=1e-4, msg=lambda m, n=key: f"{n}: {m}")


@pytest.mark.parametrize("name", METHODS)
def test_micro_batches_are_one_batch_unless_the_method_says_otherwise(name: str) -> None:
    changes = {"method": {"head_norm": "layer"}} if name in ("byol", "lejepa", "mocov3", "simclr") else {}
    changes = {"method": {"local_repulsion": None}} if name in ("dino", "mocov2") else changes
    made = make_method(name, **changes)
    if made.couples_batch and name not in ("clip", "coca", "detailclip"):  # which compare all pairs, and prepare for it
        pytest.fail(f"{name} has no form that accumulates exactly")
    expected = pool(1).run(first_steps, name=name, zero=0, steps=1, **changes)[0]
    compare(pool(1).run(first_steps, name=name, zero=0, accumulation=4, steps=1, **changes), expected)


@pytest.mark.parametrize(("name", "zero"), staged(FROM_A_CHECKPOINT, {("dinov2", 1), ("byol", 1), ("detailclip", 1)}))
def test_going_on_from_a_checkpoint_is_as_if_nothing_had_happened(name: str, zero: int, tmp_path: Path) -> None:
    given = {"name": name, "zero": zero, "directory": str(tmp_path)}
    through = pool(2).run(interrupted, **given, load_at=None, save_at=2, until=3, seed=0)
    again = pool(2).run(interrupted, **given, load_at=2, save_at=None, until=3, seed=1)
    for ours, theirs in zip(again, through, strict=True):
        assert ours.keys() == theirs.keys()
        assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == []


RESNET = {"model": {"timm_name": "resnet18", "stem": "small"}}
NORMED = {"method": {"head_norm": "batch", "local_repulsion": None}}
OWN = {"method": {**NORMED["method"], "teacher_norm_statistics": "own"}}


@pytest.mark.parametrize(
    ("name", "changes"),
    [pytest.param("simclr", RESNET, marks=pytest.mark.slow), ("dino", NORMED), ("mocov2", NORMED), ("dino", OWN)],
)
def test_batch_norm_is_one_on_two_ranks_and_goes_on_from_a_checkpoint(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    (expected,) = pool(1).run(first_steps, name=name, zero=0, steps=1, **changes)
    ranks = pool(2).run(first_steps, name=name, zero=3, steps=1, **changes)
    for term, value in expected["terms"].items():
        assert sum(float(rank["terms"][term]) for rank in ranks) / 2 == pytest.approx(float(value), rel=1e-4, abs=1e-5)
    averages = [key for key in expected["state"] if key.startswith("buffer")]
    assert averages
    for rank in ranks:
        for key in averages:
            torch.testing.assert_close(
                rank["state"][key], expected["state"][key], atol=2e-4, rtol=1e-3, msg=lambda m, n=key: f"{n}: {m}"
            )
    given = {"name": name, "zero": 1, "directory": str(tmp_path), **changes}
    through = pool(2).run(interrupted, **given, load_at=None, save_at=1, until=2, seed=0)
    again = pool(2).run(interrupted, **given, load_at=1, save_at=None, until=2, seed=1)
    for ours, theirs in zip(again, through, strict=True):
        assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == []
