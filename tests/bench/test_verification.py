"""The benchmark of verified steps trains a real small run, in which they alternate with others."""

from __future__ import annotations

from pipeline.bench import verification
from tests.helpers.rank_pool import pool


def test_verified_steps_are_timed_in_a_real_training() -> None:
    options = verification.Options(steps=4, batch=8, workers=0)
    (result,) = pool(1).run(verification.measure, options=options)
    assert len(result.verified) == len(result.plain) == 2 and result.ratio > 0
    page = verification.markdown(result, options, {"cores": "2"}, "fovea bench verification")
    assert "| verified |" in page and "times as long" in page and "train.verify_every=100" in page
