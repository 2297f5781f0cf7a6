"""What W&B's offline directories hold."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.tracking.wandb_files import records


@dataclass
class Contents:
    """What several files of one W&B run hold together."""

    ids: set[str] = field(default_factory=set)
    names: set[str] = field(default_factory=set)
    projects: set[str] = field(default_factory=set)
    history: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    codes: list[int] = field(default_factory=list)
    files: list[str] = field(default_factory=list)

    def series(self, key: str) -> list[tuple[int, Any]]:
        return [(row["step"], row[key]) for row in self.history if key in row]


def contents(folder: Path) -> Contents:
    """Everything in the offline runs below a folder, in the order in which they were made."""
    known = Contents()

    def pairs(items: Any) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for item in items:
            name, *inner = item.nested_key or [item.key]
            if inner:  # part of an image or a table
                values.setdefault(name, {})["/".join(inner)] = json.loads(item.value_json)
            else:
                values[name] = json.loads(item.value_json)
        return values

    for path in sorted(folder.glob("offline-run-*/run-*.wandb")):
        for record in records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                known.ids.add(record.run.run_id)
                known.names.add(record.run.display_name)
                known.projects.add(record.run.project)
                known.config.update(pairs(record.run.config.update))
            elif kind == "history":
                known.history.append(pairs(record.history.item))
            elif kind == "config":
                known.config.update(pairs(record.config.update))
            elif kind == "summary":
                known.summary.update(pairs(record.summary.update))
            elif kind == "files":
                known.files += [file.path for file in record.files.files]
            elif kind == "exit":
                known.codes.append(record.exit.exit_code)
    return known
