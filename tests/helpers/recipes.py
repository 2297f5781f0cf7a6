"""The scripts of pipeline/data/README.md, as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "pipeline" / "data" / "README.md"


def recipes() -> dict[str, str]:
    """The scripts by the name in their first line."""
    blocks = re.findall(r"```python\n(# recipe: ([\w ]+)\n.*?)```", PAGE.read_text(), re.DOTALL)
    return {name: text for text, name in blocks}


def written(name: str, folder: Path, shards: str, *changes: tuple[str, str]) -> Path:
    """Writes a recipe as a script that reads other shards, with some lines replaced."""
    text = recipes()[name]
    for old, new in (("/data/shards/*.tar", shards), *changes):
        assert old in text, old
        text = text.replace(old, new)
    path = folder / "script.py"
    path.write_text(text)
    return path
