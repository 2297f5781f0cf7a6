"""HTML building blocks of reports: embedded images, charts, and the page template.

Pages are self-contained: no script, font, style or image is fetched. Colours are those of Okabe and Ito, which are
distinguishable with any colour vision, in a light and a dark theme.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pipeline.data.augment.views import IMAGENET_MEAN, IMAGENET_STD
from pipeline.reports.figures import Chart, draw

Pixels = NDArray[np.uint8]

BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"


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


def chart(content: Chart) -> str:
    """A chart as an ``svg`` element, or a sentence if there is nothing to draw."""
    return draw(content) or '<p class="empty">nothing was logged</p>'


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
svg *{stroke-linejoin:round}
svg text{fill:var(--soft)}
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
