"""Line charts drawn by matplotlib, as SVG elements for the pages.

The elements carry no fonts, links, clip paths or colours of their own: texts inherit the page's font, and every colour is one of
the page's CSS variables, so that a chart follows the light and the dark theme. The same chart gives the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from pipeline.untrusted import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_POINTS = 300
"""Points drawn of a line; longer lines are averaged."""
# Colours while drawing, and the CSS variables that replace them in the SVG.
_INK, _SOFT, _RULE, _SERIES = "#1c2126", "#5d6872", "#dde2e7", ("#0072b2", "#b84f00", "#007f5c")
_VARIABLES = {_INK: "var(--ink)", _SOFT: "var(--soft)", _RULE: "var(--rule)"} | {
    colour: f"var(--c{index})" for index, colour in enumerate(_SERIES)
}
_CLASSES = ("title", "grid", "axis", "line", "level", "mark", "name", "tick", "soft", "band")
_FONT_PX = 12
_MAX_VALUE = 1e200  # larger values are left out like infinite ones: an axis cannot span them


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        name: label; shown at the line's end if the chart has several.
        points: pairs of x and y; gaps where y is not finite or above 1e200.
        colour: index of a page colour, 0 to 2.
        dots: show every point.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    dots: bool = False


@dataclass(frozen=True)
class Band:
    """An area between two curves, such as an interval.

    Attributes:
        points: x, lower and upper y.
        colour: index of a page colour, 0 to 2.
    """

    points: Sequence[tuple[float, float, float]]
    colour: int = 0


@dataclass(frozen=True)
class Chart:
    """A line chart over samples seen.

    Attributes:
        title: what is shown, with the unit.
        lines: the curves.
        levels: constant levels: name, value and colour of dashed lines.
        marks: x and text of vertical lines.
        bands: areas behind the curves; points that are not finite are left out.
        percent: y is a share, shown in percent.
        floor, ceiling: limits of the y axis; default, slightly beyond the values.
        width, height: pixels.
    """

    title: str
    lines: Sequence[Line]
    levels: Sequence[tuple[str, float, int]] = ()
    marks: Sequence[tuple[float, str]] = ()
    bands: Sequence[Band] = ()
    percent: bool = False
    floor: float | None = None
    ceiling: float | None = None
    width: int = 520
    height: int = 280


def short(value: float) -> str:
    """Format a number briefly: 12.8k, 0.25, 3e-06."""
    size = abs(value)
    if size >= 1000:
        power, letter = next((p, n) for p, n in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if size >= p)
        return f"{value / power:.3g}{letter}"
    return f"{value:.3g}"


def draw(chart: Chart) -> str:
    """Render a chart as an ``svg`` element, or as an empty string if it has no finite value.

    The element's ``data-plot`` and ``data-lines`` hold the positions and texts that the page's script shows under the pointer.
    """
    import matplotlib
    from matplotlib.figure import Figure

    lines = [_thinned(line) for line in chart.lines]
    finite = [point for line in lines for point in _visible(line)]
    if not finite:
        return ""
    own: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": _digest(chart), "font.size": _FONT_PX, "path.simplify": False}
    # A user's matplotlibrc must not change the page. Fonts without a glyph only matter to measurements.
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(own)
        figure = Figure(figsize=(chart.width / 72, chart.height / 72), dpi=72)  # one unit of the SVG is one pixel
        spots = _fill(figure, chart, lines, finite)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inlined(buffer.getvalue(), chart, spots)


def _digest(chart: Chart) -> str:
    """Salt of the ids in the SVG: those of different charts on a page differ, those of the same chart do not."""
    return hashlib.sha256(repr(chart).encode("utf-8", "backslashreplace")).hexdigest()


@dataclass(frozen=True)
class _Spots:
    """Positions in pixels that the page's script reads: the plot's left, right, top and bottom, and each line's points."""

    plot: tuple[float, float, float, float]
    lines: list[dict[str, Any]]


def _fill(figure: Figure, chart: Chart, lines: Sequence[Line], finite: Sequence[tuple[float, float]]) -> _Spots:
    labelled = bool(chart.levels) or len(lines) > 1
    left, right, top, bottom = 46, chart.width - (124 if labelled else 14), 26, chart.height - 34
    width, height = chart.width, chart.height
    axes = figure.add_axes((left / width, 1 - bottom / height, (right - left) / width, (bottom - top) / height))
    last_x = max([x for x, _ in finite] + [x for x, _ in chart.marks])
    edges = [y for band in chart.bands for _, *both in _area(band) for y in both]
    low, high = _limits(chart, [y for _, y in finite] + [value for _, value, _ in chart.levels] + edges)
    axes.set_xlim(0, last_x or 1)
    axes.set_ylim(low, high)
    _axes(axes, chart)

    def position(x: float, y: float) -> tuple[float, float]:
        across, up = axes.transData.transform((x, y))
        return round(float(across), 1), round(height - float(up), 1)

    def write(x: float, y: float, text: str, kind: str, colour: str, **style: Any) -> None:
        figure.text(x / width, 1 - y / height, _clean(text), color=colour, gid=kind, parse_math=False, **style)

    def with_unit(y: float) -> str:
        return f"{100 * y:.1f} %" if chart.percent else f"{y:.4g}"

    write(0, 13, chart.title, "title", _INK, fontsize=13, fontweight="bold")
    write(right, bottom + 30, "samples seen", "soft", _SOFT, ha="right")
    for number, (x, _) in enumerate(chart.marks):
        axes.axvline(x, color=_SOFT, linewidth=1, linestyle=(0, (2, 3)), gid=f"mark-{number}")
        across, _ = position(x, low)
        before = across > (left + right) / 2
        if width > 400:
            write(across - 5 if before else across + 5, top + 9, "resumed", "soft", _SOFT, ha="right" if before else "left")
    ends = []
    for name, value, colour in chart.levels:
        axes.axhline(value, color=_SERIES[colour], linewidth=1.5, linestyle=(0, (3.5, 3)), gid="level")
        ends.append((position(0, value)[1], f"{name} {with_unit(value)}", colour))
    for band in chart.bands:
        if area := _area(band):
            outline = [(x, y) for x, y, _ in area] + [(x, y) for x, _, y in reversed(area)]
            axes.fill(*zip(*outline, strict=True), facecolor=_SERIES[band.colour], alpha=0.18, linewidth=0, gid="band")
    for line in lines:
        values = [y if abs(y) <= _MAX_VALUE else math.nan for _, y in line.points]
        style: dict[str, Any] = {"linewidth": 2, "marker": "o" if line.dots or len(line.points) == 1 else None, "markersize": 5}
        axes.plot([x for x, _ in line.points], values, color=_SERIES[line.colour], solid_capstyle="round", gid="line", **style)
        if labelled and (visible := _visible(line)):
            ends.append((position(*visible[-1])[1], f"{line.name} {with_unit(visible[-1][1])}", line.colour))
    for y, text, index in _apart(ends):
        write(right + 6, y + 4, text, "name", _SERIES[index], fontweight="bold")
    return _Spots((left, right, top, bottom), [_spots(line, position, with_unit) for line in lines])


def _limits(chart: Chart, values: Sequence[float]) -> tuple[float, float]:
    least, most = min(values), max(values)
    margin = max(0.06 * (most - least), 1e-3 * max(abs(least), abs(most)), 1e-12)
    low = min(chart.floor, least) if chart.floor is not None else least - margin
    high = max(chart.ceiling, most) if chart.ceiling is not None else most + margin
    return low, high


def _axes(axes: Axes, chart: Chart) -> None:
    from matplotlib.ticker import MaxNLocator

    steps = [1, 2, 2.5, 5, 10]
    (_, last_x), (low, high) = axes.get_xlim(), axes.get_ylim()
    wide, high_enough = chart.width > 400, chart.height > 200
    across = [x for x in MaxNLocator(5 if wide else 3, steps=steps).tick_values(0, last_x) if 0 <= x <= last_x]
    up = [y for y in MaxNLocator(4 if high_enough else 3, steps=steps).tick_values(low, high) if low <= y <= high]
    axes.set_xticks(across, [short(x) for x in across], gid="tick")
    axes.set_yticks(up, _labels(up, chart.percent), gid="tick")
    axes.tick_params(length=0, labelcolor=_SOFT, labelsize=_FONT_PX, pad=6)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=_RULE, linewidth=1, gid="grid")
    for side, spine in axes.spines.items():
        spine.set(visible=side == "bottom", color=_SOFT, linewidth=1, gid="axis")


def _labels(values: Sequence[float], percent: bool) -> list[str]:
    """Labels with just enough digits that neighbours differ."""
    if percent:
        values = [100 * value for value in values]
    texts = [short(value) for value in values]
    for digits in range(4, 12):
        if len(set(texts)) == len(texts):
            break
        texts = [f"{value:.{digits}g}" for value in values]
    return [f"{text} %" for text in texts] if percent else texts


def _thinned(line: Line) -> Line:
    """Reduce a line to a few hundred points by averaging neighbours; the last point is kept as it is."""
    points = list(line.points)
    if len(points) <= MAX_POINTS:
        return line
    width = -(-len(points) // MAX_POINTS)
    groups = [points[at : at + width] for at in range(0, len(points) - 1, width)]
    means = [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]
    return Line(line.name, [*means, points[-1]], line.colour, line.dots)


def _area(band: Band) -> list[tuple[float, float, float]]:
    return [(x, low, high) for x, low, high in band.points if abs(low) <= _MAX_VALUE and abs(high) <= _MAX_VALUE]


def _visible(line: Line) -> list[tuple[float, float]]:
    return [(x, y) for x, y in line.points if abs(y) <= _MAX_VALUE]


def _spots(
    line: Line, position: Callable[[float, float], tuple[float, float]], with_unit: Callable[[float], str]
) -> dict[str, Any]:
    points = [(*position(x, y), f"{x:,.0f}".replace(",", "\u202f"), with_unit(y)) for x, y in _visible(line)]
    return {"name": _clean(line.name), "colour": line.colour, "points": points}


def _apart(ends: list[tuple[float, str, int]], least: float = 14.0) -> list[tuple[float, str, int]]:
    """Shift labels vertically until they do not overlap."""
    ends = sorted(ends)
    heights = [y for y, _, _ in ends]
    for _ in range(100):
        for i in range(len(heights) - 1):
            overlap = least - (heights[i + 1] - heights[i])
            if overlap > 0:
                heights[i], heights[i + 1] = heights[i] - overlap / 2, heights[i + 1] + overlap / 2
    return [(round(y, 1), text, colour) for y, (_, text, colour) in zip(heights, ends, strict=True)]


def _clean(text: str) -> str:
    """Text that a terminal, HTML and XML can hold."""
    return re.sub("[\ufffe\uffff]", "\ufffd", printable(text))


# ---- from matplotlib's document to an element of the page ---------------------------------------------------------------


def _inlined(document: str, chart: Chart, spots: _Spots) -> str:
    """Reduce an SVG document to an element inside HTML: no metadata, style sheet, clip paths or fixed colours.

    Only markers keep their ids, since a page has several charts.
    """
    root = ElementTree.fromstring(document)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for child in list(element):
            if child.tag.rpartition("}")[2] in ("metadata", "style", "clipPath"):
                element.remove(child)
    for element in root.iter():
        attributes = {name.rpartition("}")[2]: value for name, value in element.attrib.items()}
        attributes.pop("clip-path", None)
        if attributes.get("transform", "").startswith("rotate(-0 "):
            del attributes["transform"]
        if "style" in attributes:
            attributes["style"] = _themed(attributes["style"])
        if element.tag == "g" and "id" in attributes:
            kind, _, number = attributes.pop("id").partition("-")
            if kind in _CLASSES:
                attributes["class"] = kind
            if kind == "mark":
                title = ElementTree.Element("title")
                title.text = _clean(chart.marks[int(number)][1])
                element.insert(0, title)
        element.attrib.clear()
        element.attrib.update(attributes)
        element.text, element.tail = element.text if element.tag in ("text", "title") else None, None
    root.attrib.clear()
    root.attrib.update(
        {
            "viewBox": f"0 0 {chart.width} {chart.height}",
            "role": "img",
            "aria-label": _clean(chart.title),
            "data-plot": ",".join(map(str, spots.plot)),
            "data-lines": json.dumps(spots.lines, ensure_ascii=False),
        }
    )
    return ElementTree.tostring(root, encoding="unicode")


def _themed(style: str) -> str:
    """A style attribute with the page's colours and without a font family."""
    kept = [rule for rule in style.split("; ") if not rule.startswith("font-family:")]
    return re.sub(r"#[0-9a-fA-F]{6}\b", lambda colour: _VARIABLES[colour[0].lower()], "; ".join(kept))
