"""HTML building blocks of reports: embedded images, inline SVG charts, and the page template.

Pages are self-contained: no script, font, style or image is fetched. Colours are those of Okabe and Ito, which are
distinguishable with any colour vision, in a light and a dark theme.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pipeline.data.augment.views import IMAGENET_MEAN, IMAGENET_STD

Pixels = NDArray[np.uint8]

BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
_MOST_POINTS = 300


def pixels(view: Any) -> Pixels:
    """Convert a normalised view to an image.

    Args:
        view: float tensor ``[3, height, width]``, normalised with ImageNet's mean and standard deviation.

    Returns:
        uint8 ``[height, width, 3]``.
    """
    values = view.detach().float().cpu().numpy().transpose(1, 2, 0) * np.asarray(IMAGENET_STD, np.float32) + np.asarray(
        IMAGENET_MEAN, np.float32
    )
    return np.clip(np.rint(values * 255), 0, 255).astype(np.uint8)


def fitted(picture: Pixels, side: int, *, sharp: bool = False) -> Image.Image:
    """Resize an image so that its longer side has ``side`` pixels.

    Args:
        picture: uint8 ``[height, width, 3]``.
        side: pixels.
        sharp: enlarge with nearest-neighbour instead of smooth interpolation.
    """
    height, width = picture.shape[:2]
    scale = side / max(height, width)
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    smooth = Image.Resampling.LANCZOS
    return Image.fromarray(picture).resize(size, Image.Resampling.NEAREST if sharp and scale > 1 else smooth)


def veiled(image: Image.Image, hidden: NDArray[np.bool_]) -> Image.Image:
    """Hatch the hidden patches of an image in gray.

    Args:
        image: the image.
        hidden: bool ``[rows, columns]``, true where hidden.
    """
    rows, columns = hidden.shape
    hatch = Image.new("RGB", image.size, (128, 132, 136))
    draw = ImageDraw.Draw(hatch)
    for offset in range(-image.height, image.width, 8):
        draw.line([(offset, 0), (offset + image.height, image.height)], fill=(158, 162, 166), width=2)
    grid = Image.fromarray(hidden.astype(np.uint8) * 224).resize(image.size, Image.Resampling.NEAREST)
    out = Image.composite(hatch, image, grid)
    lines = ImageDraw.Draw(out)
    for row, column in np.argwhere(hidden).tolist():
        left, top = column * image.width / columns, row * image.height / rows
        lines.rectangle((left, top, left + image.width / columns - 1, top + image.height / rows - 1), outline=(96, 100, 104))
    return out


def boxed(image: Image.Image, boxes: Sequence[tuple[tuple[float, float, float, float], str, str, int]]) -> Image.Image:
    """Draw labelled frames on an image, with a white rim for contrast on any background.

    Args:
        image: the image.
        boxes: of each frame left, top, right and bottom as shares of the sides, its colour, its label of one or two letters, and
            its width in pixels.
    """
    out = image.copy()
    draw = ImageDraw.Draw(out)
    tags = []
    for (left, top, right, bottom), colour, name, width in boxes:
        x0, y0, x1, y1 = (
            left * (image.width - 1),
            top * (image.height - 1),
            right * (image.width - 1),
            bottom * (image.height - 1),
        )
        draw.rectangle((x0 - 1, y0 - 1, max(x1 + 1, x0), max(y1 + 1, y0)), outline="white", width=width + 2)
        draw.rectangle((x0, y0, max(x1, x0), max(y1, y0)), outline=colour, width=width)
        tags.append((x0, y0, colour, name))
    for x0, y0, colour, name in tags:
        x, y = min(max(x0, 0), image.width - 22), min(max(y0, 0), image.height - 22)
        draw.rectangle((x, y, x + 21, y + 21), fill=colour, outline="white")
        draw.text((x + 11, y + 11), name, fill=on(colour), font=font(17), anchor="mm")
    return out


def on(colour: str) -> str:
    """Black or white, whichever contrasts better with a colour such as ``#0072B2``."""
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "#ffffff"


def font(size: int) -> Any:
    """Pillow's built-in font, size in pixels; missing characters are drawn as boxes."""
    return ImageFont.load_default(size)


def embedded(image: Image.Image) -> str:
    """Encode an image as the value of an ``src`` attribute: PNG in base64."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def tag(image: Image.Image, about: str, *, width: int | None = None, kind: str = "") -> str:
    """An ``img`` element with embedded data.

    Args:
        image: the image.
        about: description, used as alternative text and tooltip.
        width: pixels on the page; default, the image's own.
        kind: CSS classes.
    """
    words = html.escape(about, quote=True)
    size = f' style="width:{width}px"' if width is not None else ""
    return f'<img src="{embedded(image)}" alt="{words}" title="{words}" class="{kind}"{size}>'


# ---- charts -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        name: label; shown at the line's end if the chart has several.
        points: pairs of x and y; gaps where y is not finite.
        colour: index of a page colour, 0 to 2.
        dots: show every point.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    dots: bool = False


@dataclass(frozen=True)
class Chart:
    """A line chart over samples seen.

    Attributes:
        title: what is shown, with the unit.
        lines: the curves.
        levels: constant levels: name, value and colour of dashed lines.
        marks: x and text of vertical lines.
        percent: y is a share, shown in percent.
        floor, ceiling: limits of the y axis; default, slightly beyond the values.
        width, height: pixels.
    """

    title: str
    lines: Sequence[Line]
    levels: Sequence[tuple[str, float, int]] = ()
    marks: Sequence[tuple[float, str]] = ()
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


def ticks(low: float, high: float, most: int) -> list[float]:
    """At most ``most`` + 1 evenly spaced round numbers between ``low`` and ``high``."""
    if not high > low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def _labels(values: Sequence[float], percent: bool) -> list[str]:
    """Labels with just enough digits that neighbours differ."""
    if percent:
        values = [100 * value for value in values]
    texts = [short(value) for value in values]
    for digits in range(4, 9):
        if len(set(texts)) == len(texts):
            break
        texts = [f"{value:.{digits}g}" for value in values]
    return [f"{text} %" for text in texts] if percent else texts


def draw(chart: Chart) -> str:
    """Render a chart as an ``svg`` element, or as a sentence if there is nothing to draw."""
    lines = [_thinned(line) for line in chart.lines]
    shown = [(x, y) for line in lines for x, y in line.points if math.isfinite(y)]
    if not shown:
        return '<p class="empty">nothing was logged</p>'
    labelled = bool(chart.levels) or len(lines) > 1
    left, right, top, bottom = 46, chart.width - (124 if labelled else 14), 26, chart.height - 34
    highest_x = max([x for x, _ in shown] + [x for x, _ in chart.marks])
    values = [y for _, y in shown] + [value for _, value, _ in chart.levels]
    least, most = min(values), max(values)
    margin = max(0.06 * (most - least), 1e-3 * max(abs(least), abs(most)), 1e-12)
    low = min(chart.floor, least) if chart.floor is not None else least - margin
    high = max(chart.ceiling, most) if chart.ceiling is not None else most + margin

    def px(x: float) -> float:
        return round(left + (right - left) * x / (highest_x or 1), 1)

    def py(y: float) -> float:
        return round(bottom - (bottom - top) * (y - low) / (high - low), 1)

    def said(y: float) -> str:
        return f"{100 * y:.1f} %" if chart.percent else f"{y:.4g}"

    parts = []
    rungs = ticks(low, high, 4 if chart.height > 200 else 3)
    for value, text in zip(rungs, _labels(rungs, chart.percent), strict=True):
        parts.append(
            f'<path class="grid" d="M{left} {py(value)}H{right}"/>'
            f'<text x="{left - 6}" y="{py(value) + 4}" class="end">{text}</text>'
        )
    for value in ticks(0, highest_x, 5 if chart.width > 400 else 3):
        parts.append(f'<text x="{px(value)}" y="{bottom + 16}" class="mid">{short(value)}</text>')
    parts.append(f'<path class="axis" d="M{left} {bottom}H{right}"/>')
    parts.append(f'<text x="{right}" y="{bottom + 30}" class="end soft">samples seen</text>')
    for x, text in chart.marks:
        anchor = "end" if px(x) > (left + right) / 2 else ""
        said_at = px(x) + (-5 if anchor else 5)
        label = f'<text x="{said_at}" y="{top + 9}" class="soft {anchor}">resumed</text>' if chart.width > 400 else ""
        parts.append(f'<g><title>{html.escape(text)}</title><path class="mark" d="M{px(x)} {top}V{bottom}"/>{label}</g>')
    ends: list[tuple[float, str, int]] = []
    for name, value, colour in chart.levels:
        parts.append(f'<path class="level c{colour}" d="M{left} {py(value)}H{right}"/>')
        ends.append((py(value), f"{name} {said(value)}", colour))
    for line in lines:
        parts.append(_path(line, px, py))
        last = [(x, y) for x, y in line.points if math.isfinite(y)]
        if last and labelled:
            ends.append((py(last[-1][1]), f"{line.name} {said(last[-1][1])}", line.colour))
    parts += [
        f'<text x="{right + 6}" y="{y + 4}" class="name f{colour}">{html.escape(text)}</text>' for y, text, colour in _apart(ends)
    ]
    data = [{"name": line.name, "colour": line.colour, "points": _spots(line, px, py, said)} for line in lines]
    title, points = (html.escape(text, quote=True) for text in (chart.title, json.dumps(data, ensure_ascii=False)))
    return (
        f'<svg viewBox="0 0 {chart.width} {chart.height}" role="img" aria-label="{title}" '
        f'data-plot="{left},{right},{top},{bottom}" data-lines="{points}">'
        f'<text x="0" y="13" class="title">{html.escape(chart.title)}</text>{"".join(parts)}</svg>'
    )


def _spots(line: Line, px: Any, py: Any, said: Any) -> list[tuple[float, float, str, str]]:
    """Positions and texts of a line's points."""
    return [(px(x), py(y), f"{x:,.0f}".replace(",", "\u202f"), said(y)) for x, y in line.points if math.isfinite(y)]


def _thinned(line: Line) -> Line:
    """Reduce a line to a few hundred points by averaging neighbours; the last point is kept as it is."""
    points = list(line.points)
    if len(points) <= _MOST_POINTS:
        return line
    width = -(-len(points) // _MOST_POINTS)
    groups = [points[at : at + width] for at in range(0, len(points) - 1, width)]
    means = [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]
    return Line(line.name, [*means, points[-1]], line.colour, line.dots)


def _path(line: Line, px: Any, py: Any) -> str:
    path, pen = [], False
    for x, y in line.points:
        if math.isfinite(y):
            path.append(f"{'L' if pen else 'M'}{px(x)} {py(y)}")
        pen = math.isfinite(y)
    dots = "".join(
        f'<circle cx="{px(x)}" cy="{py(y)}" r="2.6" class="f{line.colour}"/>' for x, y in line.points if math.isfinite(y)
    )
    return f'<path class="line c{line.colour}" d="{"".join(path)}"/>' + (dots if line.dots or len(line.points) == 1 else "")


def _apart(ends: list[tuple[float, str, int]], least: float = 14.0) -> list[tuple[float, str, int]]:
    """Shift labels vertically until they do not overlap."""
    ends = sorted(ends)
    places = [y for y, _, _ in ends]
    for _ in range(100):
        for i in range(len(places) - 1):
            overlap = least - (places[i + 1] - places[i])
            if overlap > 0:
                places[i], places[i + 1] = places[i] - overlap / 2, places[i + 1] + overlap / 2
    return [(round(place, 1), text, colour) for place, (_, text, colour) in zip(places, ends, strict=True)]


# ---- the file -----------------------------------------------------------------------------------------------------------

_STYLE = """
:root{color-scheme:light dark;--back:#fff;--card:#f6f7f9;--ink:#1c2126;--soft:#5d6872;--rule:#dde2e7;
--c0:#0072B2;--c1:#B84F00;--c2:#007F5C}
@media(prefers-color-scheme:dark){:root{--back:#13161a;--card:#1b1f24;--ink:#e7eaed;--soft:#99a3ad;--rule:#2e353c;
--c0:#56B4E9;--c1:#F08A3C;--c2:#2BBE93}}
*{box-sizing:border-box}
body,svg{font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
body{margin:0;background:var(--back);color:var(--ink);font-size:16px;line-height:1.5}
main{max-width:1120px;margin:0 auto;padding:36px 24px 60px}
h1{font-size:30px;line-height:1.2;margin:0 0 26px;letter-spacing:-.015em;text-wrap:balance}
h2{font-size:20px;margin:52px 0 4px;letter-spacing:-.01em}
p{margin:6px 0 14px;max-width:78ch}
.over{color:var(--soft);font-size:14px;margin:0 0 6px}
.note{color:var(--soft);font-size:13px}
.empty{color:var(--soft);font-size:14px;border:1px dashed var(--rule);padding:18px;border-radius:4px}
figure{margin:18px 0 0}
figcaption{color:var(--soft);font-size:14px;max-width:100ch;margin-top:10px}
figcaption b{color:var(--ink);font-weight:600}
footer{margin-top:56px;border-top:1px solid var(--rule);padding-top:12px;color:var(--soft);font-size:13px}
img{display:block;max-width:100%;height:auto;border-radius:3px}
img.sharp{image-rendering:pixelated}
.scroll{overflow-x:auto}
.pair{display:grid;gap:28px;grid-template-columns:repeat(auto-fit,minmax(min(460px,100%),1fr));align-items:start}
.small{display:grid;gap:18px 24px;grid-template-columns:repeat(auto-fit,minmax(min(220px,100%),1fr));margin-top:22px}
.small svg{max-width:340px}

table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:8px 10px 8px 0;border-bottom:1px solid var(--rule);font-weight:400}
thead th{color:var(--soft);font-size:13px;padding-top:0}
td.n,th.n{text-align:right;white-space:nowrap}
tr.best td,tr.best th{font-weight:600}
td.wide{width:38%}
.bar{display:block;height:10px;border-radius:2px;min-width:1px}
.b0{background:var(--c0)}.b1{background:var(--c1)}.b2{background:var(--c2)}
dl.facts{display:grid;grid-template-columns:1fr auto;margin:0;font-size:15px}
dl.facts dt,dl.facts dd{margin:0;padding:5px 0;border-bottom:1px solid var(--rule)}
dl.facts dt{color:var(--soft)}
dl.facts dd{text-align:right;padding-left:18px;font-variant-numeric:tabular-nums}

svg{display:block;width:100%;height:auto;overflow:visible;font-size:12px}
svg text{fill:var(--soft)}
svg .title{fill:var(--ink);font-size:13px;font-weight:600}
svg .end{text-anchor:end}svg .mid{text-anchor:middle}svg .name{font-weight:600}
.grid{stroke:var(--rule);fill:none}.axis{stroke:var(--soft);fill:none}
.line{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.level{fill:none;stroke-width:1.5;stroke-dasharray:5 4}
.mark{stroke:var(--soft);stroke-dasharray:2 3;fill:none}
.c0{stroke:var(--c0)}.c1{stroke:var(--c1)}.c2{stroke:var(--c2)}
svg .f0{fill:var(--c0)}svg .f1{fill:var(--c1)}svg .f2{fill:var(--c2)}
.cursor path{stroke:var(--ink);opacity:.5}
.cursor circle{stroke:var(--back);stroke-width:1.5}
.cursor text{fill:var(--ink)}

.card{background:var(--card);border-radius:8px;padding:16px;margin:0 0 16px;align-items:start}
.card{display:grid;gap:18px;grid-template-columns:auto 1fr}
.card h3{font-size:15px;margin:0 0 2px;overflow-wrap:anywhere}
.card .about{max-width:none;font-size:13px;color:var(--soft);margin:0 0 10px}
.views{display:flex;flex-wrap:wrap;gap:14px 12px;align-items:flex-start}
.view{font-size:12px;line-height:1.35;color:var(--soft)}
.view b{display:block;font-weight:600;color:var(--ink);margin-top:4px}
.sign{display:inline-block;min-width:16px;padding:0 3px;margin-right:6px;border-radius:3px;text-align:center}
.sign{font-size:11px;line-height:16px}
@media(max-width:640px){.card{grid-template-columns:1fr}}

.rows{display:grid;gap:8px;width:max-content}
.rows .row{display:flex;gap:8px;align-items:center}
.rows .said{width:118px;font-size:13px;color:var(--soft);line-height:1.3}
.rows .said b{display:block;color:var(--ink)}
.find{display:grid;gap:14px;width:max-content}
.find .row{display:flex;gap:10px;align-items:flex-start}
.find .gap{width:14px}
.hit{font-size:12px;color:var(--soft);text-align:center;font-variant-numeric:tabular-nums}
.hit img{border:4px solid transparent;border-radius:6px;padding:2px}
.hit.same img{border-color:var(--c0)}
.hit.other img{border:4px dashed var(--c1)}
.key{display:inline-block;width:22px;height:12px;border-radius:3px;vertical-align:-1px;margin-right:5px}
.key.same{border:3px solid var(--c0)}
.key.other{border:3px dashed var(--c1)}
"""

# Hovering over a chart shows the nearest values; the page is readable without scripts.
_SCRIPT = """
for (const chart of document.querySelectorAll("svg[data-lines]")) {
  const lines = JSON.parse(chart.dataset.lines);
  const [left, right, top, bottom] = chart.dataset.plot.split(",").map(Number);
  let cursor = null;
  const add = (kind, attributes, parent) => {
    const element = document.createElementNS(chart.namespaceURI, kind);
    for (const name in attributes) element.setAttribute(name, attributes[name]);
    return parent.appendChild(element);
  };
  const clear = () => { if (cursor) cursor.remove(); cursor = null; };
  chart.addEventListener("pointerleave", clear);
  chart.addEventListener("pointermove", event => {
    const box = chart.getBoundingClientRect();
    const x = (event.clientX - box.left) * chart.viewBox.baseVal.width / box.width;
    clear();
    if (x < left - 8 || x > right + 8) return;
    cursor = add("g", {class: "cursor"}, chart);
    let said = "";
    for (const line of lines.filter(line => line.points.length)) {
      const near = line.points.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a);
      if (!said) { said = near[2] + " samples"; add("path", {d: `M${near[0]} ${top}V${bottom}`}, cursor); }
      add("circle", {cx: near[0], cy: near[1], r: 4, class: "f" + line.colour}, cursor);
      said += " · " + (lines.length > 1 ? line.name + " " : "") + near[3];
    }
    add("text", {x: left, y: bottom + 30}, cursor).textContent = said;
  });
}
"""


def _policy() -> str:
    """Content-Security-Policy: allow only the page's own content and our one script, in case an escape is missing somewhere."""
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    return f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def document(title: str, body: str) -> str:
    """Wrap a page's sections into an HTML file with a Content-Security-Policy."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_policy()}">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
        f"<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )
