"""Every page carries a Content-Security-Policy that lets our one script run and nothing else."""

from __future__ import annotations

import base64
import hashlib
import re

from pipeline.reports.html import document


def test_a_page_allows_its_own_script_by_digest_and_nothing_from_elsewhere() -> None:
    page = document("title", "<p>body</p>")
    found = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert found is not None and page.index("Content-Security-Policy") < page.index("<style>")
    rules = dict(rule.strip().partition(" ")[::2] for rule in found[1].split(";"))
    assert rules["default-src"] == "'none'" and rules["img-src"] == "data:"
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert rules["script-src"] == f"'sha256-{digest}'"


def test_a_title_is_escaped() -> None:
    assert "<script>" not in document("<script>", "").partition("<style>")[0]
