"""Charts: what is drawn, that it follows the page's theme, and that the same chart gives the same bytes."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from pipeline.reports.figures import Band, Chart, Line, _thinned, draw
from pipeline.reports.page import render

FULL = Chart(
    "k-NN",
    [Line(name, [(x, 0.5 + 0.001 * n) for x in range(0, 6400, 64)], n, dots=n == 1) for n, name in enumerate("ab")],
    levels=[("pixels", 0.5, 2)],
    marks=[(3200, "here")],
    bands=[Band([(0, 0.4, 0.6), (3000, 0.45, 0.5), (6000, 0.3, float("nan"))], 2)],
    percent=True,
    floor=0.0,
)


def lines(svg: str) -> list[str]:
    return [re.sub(r"\s+", " ", path) for path in re.findall(r'class="line"><path d="([^"]*)"', svg)]


def test_every_colour_follows_the_theme_and_nothing_needs_a_font_or_a_document() -> None:
    svg = draw(FULL)
    assert not re.search(r"#[0-9a-f]{3,6}\b|rgba?\(|black|white", re.sub(r'(?:href="#|id=")\w+"', "", svg))
    assert {"--ink", "--soft", "--rule", "--c0", "--c1", "--c2"} == set(re.findall(r"var\((--\w+)\)", svg))
    for absent in ("font-family", "clip", "http", "<style", "<metadata", "DOCTYPE", "xmlns", "url("):
        assert absent not in svg
    assert set(re.findall(r'href="#(\w+)"', svg)) == set(re.findall(r' id="(\w+)"', svg)) != set()


def test_the_background_is_the_page_s() -> None:
    first = re.findall(r"<path [^>]*>", draw(FULL))[:2]
    assert all('style="fill: none"' in path for path in first)


@pytest.mark.slow
def test_the_same_chart_gives_the_same_bytes_in_every_process_and_under_any_style() -> None:
    command = "from tests.reports.test_figures import *; import sys; sys.stdout.buffer.write(draw(FULL).encode())"
    root = Path(__file__).resolve().parents[2]
    other = subprocess.run([sys.executable, "-c", command], cwd=root, capture_output=True, check=True).stdout
    with matplotlib.rc_context({"lines.linewidth": 9, "axes.edgecolor": "red", "svg.hashsalt": "other"}):
        assert draw(FULL).encode() == other
        assert matplotlib.rcParams["svg.hashsalt"] == "other"
    loaded = "import sys, tests.reports.test_figures as t; t.draw(t.FULL); print('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", loaded], cwd=root, capture_output=True, check=True).stdout == b"False\n"


def test_markers_of_different_charts_have_different_ids() -> None:
    ids = [re.findall(r' id="(\w+)"', draw(Chart(name, [Line("a", [(0, 1.0)])]))) for name in "xy"]
    assert len(ids[0]) == len(ids[1]) == 1 and ids[0] != ids[1]


@pytest.mark.slow
def test_pages_without_charts_do_not_load_matplotlib() -> None:
    command = (
        "import sys, pipeline.reports.run_page, pipeline.reports.comparison, pipeline.reports.preview;"
        "sys.exit(any(n.startswith('matplotlib') for n in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", command], check=False).returncode == 0


def test_a_line_has_gaps_where_numbers_are_not_finite() -> None:
    points = [(0, 1.0), (16, math.nan), (32, 2.0), (48, math.inf), (64, 3.0), (80, 1e300), (96, 4.0)]
    svg = draw(Chart("loss", [Line("loss", points)]))
    assert lines(svg)[0].count("M") == 4 and lines(svg)[0].count("L") == 0
    assert "nan" not in svg and "inf" not in svg


@pytest.mark.parametrize("points", [[], [(0, math.nan), (1, -math.inf)]])
def test_a_chart_without_a_finite_value_says_so(points: list[tuple[float, float]]) -> None:
    assert draw(Chart("loss", [Line("loss", points)])) == ""
    assert "nothing was logged" in render("collapse_ablation", title="", rows=[[Chart("loss", [Line("loss", points)])]])


def test_all_of_a_chart_lies_inside_it_and_labels_do_not_overlap() -> None:
    svg = draw(FULL)
    for command in re.findall(r'class="(?:line|level|mark|grid|axis)">(?:<title>\w+</title>)?<path d="([^"]*)"', svg):
        for x, y in re.findall(r"[ML] ([\d.]+) ([\d.]+)", command):
            assert 0 <= float(x) <= 520 and 0 <= float(y) <= 280
    ends = sorted(float(y) for y in re.findall(r'class="name"><text [^>]* y="([\d.]+)"', svg))
    assert len(ends) == 3 and min(np.diff(ends)) >= 13.5
    assert "50.0 %" in svg


def test_positions_for_the_pointer_are_those_of_the_drawn_line() -> None:
    svg = draw(Chart("loss", [Line("loss", [(0, 1.0), (50, 3.0), (100, 2.0)])]))
    drawn = [(float(x), float(y)) for x, y in re.findall(r"[ML] ([\d.]+) ([\d.]+)", lines(svg)[0])]
    listed = [(float(x), float(y)) for x, y in re.findall(r"\[([\d.]+), ([\d.]+), &quot;", svg)]
    assert len(drawn) == 3
    np.testing.assert_allclose(drawn, listed, atol=0.06)


def test_long_lines_are_thinned_to_means_and_keep_their_end() -> None:
    points = [(float(x), float(x % 2)) for x in range(10_001)]
    line = _thinned(Line("loss", points))
    assert len(line.points) <= 302 and line.points[-1] == points[-1]
    assert all(0.4 < y < 0.6 for _, y in line.points[:-2])


def test_a_flat_line_has_an_axis_whose_numbers_differ() -> None:
    svg = draw(Chart("flat", [Line("flat", [(0, 1.0), (100, 1.0 + 1e-7)])]))
    texts = re.findall(r'class="tick"><text [^>]*text-anchor: end[^>]*>([^<]+)<', svg)
    assert len(texts) == len(set(texts)) > 0


def test_what_users_wrote_is_escaped_and_no_formula() -> None:
    names = ['<b>"x"', "<i>$", "a\x1b[2J\ufffe"]
    svg = draw(Chart(names[0], [Line(names[1], [(0, 1.0)]), Line(names[2], [(0, 2.0)])], marks=[(0, "<u>\x9b")]))
    assert not re.search(r"<[biu]>", svg)
    assert "&lt;i&gt;$" in svg and "a\\x1b[2J\ufffd" in svg and "&lt;u&gt;\\x9b" in svg
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f]", svg)
