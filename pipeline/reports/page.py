"""Renders the pages of reports from the templates beside this file, and writes them.

Pages are self-contained: no script, font, style or image is fetched, and a Content-Security-Policy lets the page's own script run
and nothing else. Every value in a template passes :func:`pipeline.untrusted.printable` and is escaped.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from pipeline.errors import DataError
from pipeline.reports import figures, images
from pipeline.untrusted import printable

_TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, **values: Any) -> str:
    """The HTML of a template.

    Args:
        template: file name without ``.html.j2``.
        values: variables of the template; a missing one is an error.
    """
    return _environment().get_template(f"{template}.html.j2").render(values)


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Create the folder of an output file; failures to write within the context are reported with its name.

    Raises:
        DataError: the file cannot be written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise DataError(f"cannot be written ({error.strerror})", where=str(out), hint="Choose another --out") from error


def write(out: Path, template: str, **values: Any) -> None:
    """Render a template into a file; see :func:`render` and :func:`writing`."""
    with writing(out):
        out.write_text(render(template, **values), encoding="utf-8")


def number(value: float) -> str:
    """A number without decimals, its thousands apart."""
    return f"{value:,.0f}".replace(",", "\u202f")


def percent(value: float) -> str:
    """A fraction in percent."""
    return f"{100 * value:.1f} %"


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    style, script = (Markup((_TEMPLATES / name).read_text(encoding="utf-8")) for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    environment.globals.update(
        style=style,
        script=script,
        policy=Markup(policy),
        draw=lambda chart: Markup(figures.draw(chart)),
        embedded=lambda image: Markup(images.embedded(image)),
        contrast=images.on,
    )
    environment.filters.update(number=number, percent=percent)
    return environment
