"""LeJEPA: its two terms against the paper's listing, micro-batches against one batch, and that it does not collapse."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from pipeline.losses import random_directions
from pipeline.methods.lejepa.method import LeJEPA
from pipeline.methods.lejepa.settings import LejepaSettings
from tests.helpers.tiny_methods import SAMPLES, STEP, batch_at, make_method
from tests.losses.test_sigreg import formula


def test_both_terms_are_those_of_the_papers_listing() -> None:
    made = make_method("lejepa")
    assert isinstance(made, LeJEPA)
    batch = batch_at(made, 0)
    terms = made(batch, STEP)
    with torch.no_grad():
        features = torch.stack(made.features(batch)).double()
    assert features.shape == (4, SAMPLES, 8)
    centres = features[:2].mean(0)
    assert terms["predict"].item() == pytest.approx(0.95 * (centres - features).square().mean().item(), rel=1e-5)
    directions = random_directions(8, 32, 0x516 + STEP.index, torch.device("cpu")).double()
    assert terms["sigreg"].item() == pytest.approx(0.05 * formula(features, directions, 17, 5.0).item(), rel=1e-5)


def test_directions_change_from_step_to_step() -> None:
    made = make_method("lejepa")
    assert isinstance(made, LeJEPA)
    features = [view.detach() for view in made.features(batch_at(made, 0))]
    values = [made.sigreg(features, type(STEP)(index=index)).item() for index in (0, 0, 1)]
    assert values[0] == values[1] != values[2]


def test_micro_batches_are_tested_for_normality_as_one_batch() -> None:
    gradients, values = [], []
    for parts in (1, 4):
        made = make_method("lejepa", method={"head_norm": "layer"})
        size = SAMPLES // parts
        batches = [batch_at(made, 0, slice(low, low + size)) for low in range(0, SAMPLES, size)]
        made.before_accumulation(batches, STEP)
        terms = [made(batch, STEP) for batch in batches]
        torch.stack([sum(one.values()) / parts for one in terms]).sum().backward()  # type: ignore[misc]
        gradients.append({name: p.grad for name, p in made.named_parameters() if p.grad is not None})
        values.append({key: sum(float(one[key].detach()) for one in terms) / parts for key in terms[0]})
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-3, atol=1e-6), name
    assert not make_method("lejepa", method={"head_norm": "layer"}).couples_batch
    assert make_method("lejepa", method={"head_norm": "layer", "grad_cache": False}).couples_batch
    assert make_method("lejepa").couples_batch


def test_settings_that_have_no_effect_are_refused() -> None:
    with pytest.raises(ValidationError, match="must be odd"):
        LejepaSettings(knots=16)
    with pytest.raises(ValidationError, match="LeJEPA has no teacher"):
        LejepaSettings(teacher_norm_statistics="own")
