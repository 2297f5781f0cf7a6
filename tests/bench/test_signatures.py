"""The benchmark of signatures trains a real small run, and its page states both costs."""

from __future__ import annotations

from pipeline.bench import signatures
from tests.helpers.rank_pool import pool


def test_signatures_are_timed_in_a_real_training() -> None:
    options = signatures.Options(steps=4, batch=8, every=4, workers=0)
    (result,) = pool(1).run(signatures.measure, options=options)
    assert len(result.step) == len(result.signature) == 3
    assert 0 < result.share < 1 and result.size > 7 * 100
    page = signatures.markdown(result, options, {"cores": "2"}, "fovea bench signatures")
    assert "| signature |" in page and "% of its step" in page
