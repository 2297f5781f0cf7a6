"""The page of simulated failures states the formula beside the simulation, and its figure is an SVG of all curves."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import Result
from typer.testing import CliRunner

from launch.cli import bench_methods
from launch.cli.bench_methods import app
from pipeline.bench import failures
from pipeline.errors import ConfigError


@pytest.fixture(scope="module")
def points() -> list[failures.Point]:
    return failures.measure(failures.Options(runs=8, days=10.0), nodes=(64, 2048))


def test_the_simulation_agrees_with_the_formula(points: list[failures.Point]) -> None:
    for point in points:
        for (mean, half), formula in ((point.written, point.formula), (point.repaired, point.formula_repaired)):
            assert abs(mean - formula) < 3 * half + 1e-3
        assert point.daly == pytest.approx(point.best, rel=0.01)
    assert points[1].failures == pytest.approx(32 * points[0].failures)


def test_many_nodes_need_another_interval_than_the_default_and_gain_by_snapshots(points: list[failures.Point]) -> None:
    many = points[1]
    assert many.repaired[0] > many.written[0] > many.default[0] + 0.05
    assert many.lost is not None and many.lost_repaired is not None and many.lost_repaired < many.lost


def test_page_and_figure_show_every_number_of_nodes(points: list[failures.Point]) -> None:
    page = failures.markdown(points, failures.Options(), "failures.svg", {"cores": "2"}, "fovea bench failures")
    assert "| 64 |" in page and "| 2048 |" in page and "![Goodput by number of nodes](failures.svg)" in page
    root = ElementTree.fromstring(failures.figure(points))
    lines = [node for node in root.iter() if node.tag.endswith("polyline")]
    assert len(lines) == 4
    for line in lines:
        for pair in line.attrib["points"].split():
            x, y = map(float, pair.split(","))
            assert 0 <= x <= 640 and 0 <= y <= 340
    heights = sorted(float(node.attrib["y"]) for node in root.iter() if node.tag.endswith("text") and "fill" in node.attrib)
    assert all(b - a >= 14 for a, b in pairwise(heights)), "labels cover each other"


def test_the_command_writes_page_figures_and_svg(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["failures", "--runs", "2", "--days", "0.5", "--out", str(tmp_path / "failures")])
    assert done.exit_code == 0, done.output
    assert len(json.loads((tmp_path / "failures.json").read_text())["points"]) == 12
    assert "(failures.svg)" in (tmp_path / "failures.md").read_text() and (tmp_path / "failures.svg").read_text().startswith(
        "<svg"
    )


def test_a_figure_of_runs_that_lose_nothing_can_be_drawn(points: list[failures.Point]) -> None:
    perfect = replace(points[0], formula=1.0, written=(1.0, 0.0), repaired=(1.0, 0.0), default=(1.0, 0.0))
    assert "100 %" in failures.figure([perfect])


def command(folder: Path, *options: str) -> Result:
    return CliRunner().invoke(app, ["failures", "--runs", "2", "--out", str(folder / "failures"), *options])


@pytest.mark.parametrize(
    "options",
    [
        ("--node-mtbf-hours", "0.1"),
        ("--restart", "1e9", "--repairable", "0"),
        ("--pause", "1e9"),
        ("--background", "1e9"),
        ("--snapshot-pause", "1e9", "--repair", "1e9"),
    ],
)
def test_runs_that_do_not_advance_are_named_and_count_as_zero(tmp_path: Path, options: tuple[str, ...]) -> None:
    done = command(tmp_path, *options)
    assert done.exception is None, done.output
    page, points = (tmp_path / "failures.md").read_text(), json.loads((tmp_path / "failures.json").read_text())["points"]
    assert "does not advance" in page and "less than one percent" in page and "inf" not in page
    still = [point for point in points if [0.0, 0.0] in (point["written"], point["repaired"], point["default"])]
    assert still and f"| {still[-1]['nodes']} |" in page
    ElementTree.fromstring((tmp_path / "failures.svg").read_text())


@pytest.mark.parametrize(
    "options",
    [
        ("--pause", "0", "--background", "0"),
        (
            "--days",
            "0.01",
            "--pause",
            "0",
            "--node-mtbf-hours",
            "1e9",
            "--snapshot-pause",
            "0",
            "--restart",
            "0",
            "--background",
            "0",
        ),
    ],
)
def test_pages_of_runs_that_lose_nothing_can_be_drawn(tmp_path: Path, options: tuple[str, ...]) -> None:
    done = command(tmp_path, *options)
    assert done.exception is None, done.output
    page = (tmp_path / "failures.md").read_text()
    assert "does not advance" not in page and "nan" not in page
    ElementTree.fromstring((tmp_path / "failures.svg").read_text())


@pytest.mark.parametrize("number", ["nan", "inf", "-1"])
def test_costs_that_are_no_numbers_are_refused(tmp_path: Path, number: str) -> None:
    for option in ("--pause", "--restart", "--days", "--repairable", "--node-mtbf-hours"):
        assert command(tmp_path, option, number).exit_code == 2, option


def test_snapshots_within_a_step_are_refused(tmp_path: Path) -> None:
    error = command(tmp_path, "--snapshot-every", "0.5").exception
    assert isinstance(error, ConfigError) and "--snapshot-every" in str(error) and "shorter than a step" in str(error)


def test_the_defaults_of_the_command_are_those_of_the_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = []

    def measure(options: failures.Options, **_: object) -> list[failures.Point]:
        seen.append(options)
        return []

    monkeypatch.setattr(failures, "measure", measure)
    monkeypatch.setattr(failures, "figure", lambda _: "<svg/>")
    done = CliRunner().invoke(app, ["failures", "--out", str(tmp_path / "failures")])
    assert done.exception is None and seen == [failures.Options()]
    source = inspect.getsource(bench_methods.failures)
    assert "6300" not in source and "= 300" not in source, "a second source of the same number"
