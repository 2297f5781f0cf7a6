"""Writes the result of a benchmark as JSON and as a Markdown page."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipeline.bench.machine import describe


def write(stem: Path, command: str, render: Callable[[dict[str, str], str], str], document: Mapping[str, Any]) -> str:
    """Write ``stem`` with the extensions ``.json`` and ``.md``, and return the page.

    Args:
        stem: output path without extension.
        command: command line that produces the result.
        render: makes the page from a description of the machine and the command.
        document: all figures, for the JSON file.
    """
    machine = describe()
    page = render(machine, command)
    stem.parent.mkdir(parents=True, exist_ok=True)
    _suffixed(stem, ".md").write_text(page, encoding="utf-8")
    text = json.dumps({"command": command, "machine": machine, **document}, indent=2, default=str)
    _suffixed(stem, ".json").write_text(text + "\n", encoding="utf-8")
    return page


def _suffixed(stem: Path, suffix: str) -> Path:
    return stem.with_name(stem.name + suffix)
