"""Every page carries a Content-Security-Policy that lets its own script run and nothing else, and escapes every value."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

import jinja2
import pytest
from PIL import Image

from pipeline.errors import DataError
from pipeline.reports import page
from pipeline.reports.figures import Chart, Line

EVIL = "<script>\"'&\x1b[2J\u202e{{ 7 * 7 }}"
ESCAPED = "&lt;script&gt;&#34;&#39;&amp;\\x1b[2J\\u202e{{ 7 * 7 }}"
TEMPLATES = sorted(path.name for path in (Path(page.__file__).parent / "templates").glob("*.j2"))


def sheet(name: str) -> str:
    return page.render(
        "contact_sheet", title=name, cells=[(Image.new("RGB", (1, 1)), name, name)], total=1, shards=1, replaced=0, width=8
    )


def test_a_page_allows_its_own_script_by_digest_and_nothing_from_elsewhere() -> None:
    html = sheet("title")
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', html)
    assert policy is not None and html.index("Content-Security-Policy") < html.index("<style>")
    rules = dict(rule.strip().partition(" ")[::2] for rule in policy[1].split(";"))
    assert rules["default-src"] == "'none'" and rules["img-src"] == "data:"
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert rules["script-src"] == f"'sha256-{digest}'"


def test_values_are_escaped_and_printable_in_texts_and_attributes() -> None:
    html = sheet(EVIL)
    assert html.count(ESCAPED) == 5  # title, alt, tooltip, name, description
    assert html.count("<script>") == 1 and "\x1b" not in html and "\u202e" not in html


def test_every_template_is_a_page_with_the_policy_and_marks_no_value_as_safe() -> None:
    folder = Path(page.__file__).parent / "templates"
    assert len(TEMPLATES) > 5
    for name in TEMPLATES:
        text = (folder / name).read_text()
        assert not re.search(r"\|\s*safe|autoescape|Markup", text), name
        assert name in ("base.html.j2", "macros.html.j2") or text.startswith('{% extends "base.html.j2" %}'), name


def test_a_missing_variable_is_an_error() -> None:
    with pytest.raises(jinja2.UndefinedError, match="rows"):
        page.render("collapse_ablation", title="")


def test_both_themes_define_every_colour_that_charts_use() -> None:
    html = page.render(
        "collapse_ablation", title="", rows=[[Chart("t", [Line(n, [(0, 1.0), (1, 2.0)], i) for i, n in enumerate("abc")])]]
    )
    used = set(re.findall(r"var\((--\w+)\)", html))
    light, dark = re.findall(r":root\{(?:color-scheme[^;]*;)?(--back[^}]*)\}", html)
    for theme in (light, dark):
        assert used <= set(re.findall(r"(--\w+):", theme))
    colours = [dict(re.findall(r"(--\w+):(#\w+)", theme)) for theme in (light, dark)]
    for theme in colours:
        assert all(contrast(theme[name], theme["--back"]) > 3 for name in ("--ink", "--soft", "--c0", "--c1", "--c2"))


def contrast(one: str, other: str) -> float:
    """Contrast ratio of WCAG 2."""

    def luminance(colour: str) -> float:
        digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
        parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_an_unwritable_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file/page\.html: cannot be written"):
        page.write(tmp_path / "file" / "page.html", "collapse_ablation", title="", rows=[])
