"""The table of methods: whom it trains, and what it says of them."""

from __future__ import annotations

from pipeline.bench.methods import Row, configs, markdown
from pipeline.config.schema import METHODS


def test_every_method_that_starts_from_nothing_has_a_config_for_scenes() -> None:
    found = configs()
    assert set(METHODS) - set(found) <= {"distill", "detailclip"}  # distill needs a trained judge
    assert found["simclr"] == "simclr/scenes" and found["dinov2"] == "dinov2/scenes_vit_tiny"


def test_a_method_that_learnt_nothing_or_failed_is_said_to() -> None:
    rows = [
        Row("simclr", "simclr/scenes", 10, 1280, 31.4, 0.5, 0.25, 0.1),
        Row("dino", "dino/scenes", 10, 1280, 30.0, 0.2, 0.25, 0.1),
        Row("coca", "coca/scenes", failed="no memory"),
    ]
    text = markdown(rows, {"cores": "2"}, "fovea bench methods", "0.5 minutes")
    assert "| simclr | simclr/scenes | 1280 | 31 | 50.0% | 25.0% | 10.0% |" in text
    assert "dino is not above its untrained network" in text and "simclr is not above" not in text
    assert "coca was not trained: no memory" in text
