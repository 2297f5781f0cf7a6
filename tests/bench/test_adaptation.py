"""The experiment on adaptation: every way is a valid setting of ``fovea adapt``, and the page has means with intervals."""

from __future__ import annotations

import pytest

from pipeline.bench.adaptation import NOTHING, WAYS, AdaptationResult, line, markdown
from pipeline.config.load import load


@pytest.mark.parametrize("way", WAYS)
def test_every_way_is_a_valid_config(way: str) -> None:
    config = load("dinov2/scenes_vit_tiny", ["init_from.source=/nowhere", *WAYS[way]]).config
    assert config.adapt != load("dinov2/scenes_vit_tiny").config.adapt or not WAYS[way]


def test_the_page_has_the_start_and_means_with_intervals_of_students_t() -> None:
    results = [
        AdaptationResult("palette", "all of the tower", seed, new, 0.8, 0.4, 0.9, (0.5, 0.85))
        for seed, new in enumerate((0.50, 0.60, 0.70))
    ]
    results += [AdaptationResult("palette", NOTHING, 0, 0.3, 0.2), AdaptationResult("palette", NOTHING, 1, failed="no memory")]
    text = markdown(results, {"cores": "2"}, "fovea bench adaptation")
    assert "| palette | the start | 40.0 | 90.0 |  |  |" in text
    assert "| palette | all of the tower | 60.0 ± 24.8 | 80.0 ± 0.0 | 50.0 ± 0.0 | 85.0 ± 0.0 |" in text
    assert "| palette | from nothing | 30.0 | 20.0 |  |  |" in text and "seed 1: no memory" in text
    assert line(results[0]) == "palette, all of the tower, seed 0: new 0.500, old 0.800"
