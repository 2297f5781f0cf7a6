"""The page of what configs learn: mean and interval by samples, and the baselines."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.reports.learning import chart, write
from tests.bench.test_reproduction import NAME, entry


def test_the_curve_is_the_mean_of_the_seeds_with_students_interval_where_all_have_a_value() -> None:
    plain = entry([0.4, 0.5, 0.6])
    curves = [((128, 0.3), (256, 0.4)), ((128, 0.4), (256, 0.5)), ((128, 0.5), (256, 0.6), (300, 0.9))]
    seeds = [result.model_copy(update={"curve": curve}) for result, curve in zip(plain.seeds, curves, strict=True)]
    content = chart(NAME, plain.model_copy(update={"seeds": tuple(seeds)}))
    assert [x for x, _ in content.lines[0].points] == [128, 256]
    assert [y for _, y in content.lines[0].points] == pytest.approx([0.4, 0.5])
    half = 4.303 * 0.1 / 3**0.5
    assert [list(point) for point in content.bands[0].points] == [
        pytest.approx([128, 0.4 - half, 0.4 + half]),
        pytest.approx([256, 0.5 - half, 0.5 + half]),
    ]
    assert [(text, round(value, 9)) for text, value, _ in content.levels] == [("untrained", 0.3), ("raw pixels", 0.2)]


def test_the_page_lists_every_record_and_draws_those_with_curves(tmp_path: Path) -> None:
    old, new = entry([0.4, 0.5]), entry([0.4, 0.6])
    new = new.model_copy(update={"seeds": tuple(result.model_copy(update={"curve": ((1, 0.5),)}) for result in new.seeds)})
    text = write([("old<b>", old), ("new", new)], tmp_path / "page.html").read_text()
    assert "old&lt;b&gt;" in text and "45.0 ± 63.5 %" in text
    assert text.count("<svg") == 1 and 'class="band"' in text
