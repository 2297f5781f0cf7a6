"""The benchmark of how costs grow: its exponents, and that an index with more shards opens no more files."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from pipeline.bench.scale import Curve, Options, _probe, exponent, markdown, measure
from pipeline.errors import ConfigError
from pipeline.runtime.interpreter import ROOT


def test_exponents_are_those_of_power_laws() -> None:
    assert exponent({n: 3.0 * n**1.5 for n in (10, 100, 5000)}) == pytest.approx(1.5)
    assert exponent({10: 2.0, 1000: 2.0}) == pytest.approx(0.0)
    assert math.isnan(exponent({5: 1.0}))


def test_a_page_has_both_versions_side_by_side() -> None:
    curve = Curve("a cost", "shards", "bytes", {10: 100.0, 100: 2e6}, {10: 5e6})
    text = markdown([curve], Options(before=Path("x")), {"cores": "2"}, "fovea bench scale")
    assert "| 10 | 5.00 MB | 100 B |" in text and "| 100 | not measured | 2.00 MB |" in text and "exponent" in text


@pytest.mark.slow
def test_every_cost_is_measured_and_a_rank_reads_no_sidecar() -> None:
    curves = {(curve.name, curve.figure): curve for curve in measure(Options.smoke(), log=lambda _: None)}
    assert len(curves) == 14 and all(curve.now and not curve.before for curve in curves.values())
    read = curves["finished index to the first batch, each other rank", "bytes"].now
    assert read[4] < 1.3 * read[2]


def test_a_measurement_that_takes_too_long_is_a_message(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the measurement make of .* did not end within 0\.1 s"):
        _probe(ROOT, "make", {"folder": str(tmp_path), "shards": 1, "rows": 1}, limit=0.1)


def test_a_measurement_that_fails_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the measurement make of .* failed"):
        _probe(ROOT, "make", {"folder": str(tmp_path), "shards": 1, "rows": -1})
