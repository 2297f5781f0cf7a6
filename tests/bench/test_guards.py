"""Guards of what is not the model: loop and resume. Bounds are generous: a busy machine must not turn them red."""

from __future__ import annotations

import pytest

from pipeline.bench import loop, resume
from pipeline.bench.plain import Size
from tests.pool import pool


def test_the_loop_adds_little_to_a_step() -> None:
    options = loop.Options(steps=20, size=Size(width=16, depth=2))
    (result,) = pool(1).run(loop.measure, options=options)
    assert len(result.trainer) == len(result.engine) == len(result.bare) == 20
    assert min(result.bare) > 0
    assert result.loop < 20 * loop.AIM
    page = loop.markdown(result, options, {"cores": "2"}, "fovea bench loop")
    assert "| trainer |" in page and "The loop adds" in page


def test_resuming_reads_what_the_formula_says_and_takes_about_a_fresh_start() -> None:
    options = resume.Options(Size(width=256, depth=8), rounds=2)
    (result,) = pool(1).run(resume.measure, options=options)
    assert result.stored == pytest.approx(resume.BYTES * result.parameters, rel=0.02)
    assert 0.3 < result.ratio < 5
    assert "by formula" in resume.markdown(result, options, {"cores": "2"}, "fovea bench resume")
