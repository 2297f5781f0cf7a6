"""Bytes between ranks are those of theory, in every ZeRO stage."""

from __future__ import annotations

import pytest

from pipeline.bench import collectives
from pipeline.errors import ConfigError
from tests.helpers.rank_pool import pool

WIDTH, DEPTH = 64, 4
ELEMENTS = DEPTH * (WIDTH**2 + WIDTH)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_carries_the_bytes_that_theory_says_and_nothing_else(stage: int, accumulation: int) -> None:
    expected = collectives.expected(ELEMENTS, ELEMENTS, stage=stage, accumulation=accumulation)
    for seen in pool(2).run(collectives.count, stage=stage, width=WIDTH, depth=DEPTH, accumulation=accumulation):
        assert {kind: size for kind, size in seen["payload"].items() if kind != "small"} == expected
        assert seen["calls"]["small"] <= 2 and seen["payload"]["small"] < 100


def test_the_page_sets_bytes_beside_theory() -> None:
    results = [collectives.Counted(1, {"all-reduce": 1, "small": 2}, {"all-reduce": 4000, "small": 20}, {"all-reduce": 4000})]
    page = collectives.markdown(results, collectives.Options(ranks=4), {"cores": "2"}, "fovea bench collectives")
    assert "| 1 | all-reduce | 1 | 4,000 | 4,000 | 6,000 |" in page and "| 1 | small | 2 | 20 | - | 15 |" in page
    with pytest.raises(ConfigError, match="must be at least 2"):
        collectives.measure(collectives.Options(ranks=1))
