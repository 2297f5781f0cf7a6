"""The comparison of terms that discourage a column: what each does at two learning rates, and the page."""

from __future__ import annotations

import pytest

from pipeline.bench.guidance import GuidanceResult, line, markdown, one


def test_the_page_has_a_line_for_each_term_weight_and_rate_with_intervals() -> None:
    results = [
        GuidanceResult(by, weight, 1e-3, seed, 0.9 - 0.1 * weight, 0.8, 0.01 * seed)
        for by, weight in (("means", 0.0), ("means", 1.0), ("reversal", 1.0))
        for seed in (0, 1)
    ]
    text = markdown(results, {"cores": "2"}, "fovea bench guidance")
    rows = [row for row in text.splitlines() if row.startswith("| ")][2:]
    assert [row.split(" | ")[0] for row in rows] == ["| none", "| means", "| reversal"]
    assert "| none | 0 | 0.001 | 90.0 ± 0.0 |" in text and "`fovea bench guidance`" in text
    assert line(results[0]) == "means, weight 0, rate 0.001, seed 0: site 0.900, class 0.800, distance 0.000"


@pytest.mark.slow
def test_means_discourage_at_rates_at_which_reversal_does_not() -> None:
    def site(by: str, weight: float, rate: float) -> GuidanceResult:
        return one(by, weight, rate, seed=0, steps=300)

    for rate in (1e-3, 1e-2):
        off, on = site("means", 0.0, rate), site("means", 3.0, rate)
        assert on.site < off.site - 0.2 and on.label > off.label - 0.05, (off, on)
    assert site("reversal", 1.0, 1e-2).site > site("means", 1.0, 1e-2).site + 0.1
