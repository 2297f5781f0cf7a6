"""What is said about weights when no training runs: a folder with a journal, a cursor, and where the journal is to go.

    <folder>/about.json           the fields of :class:`Aside`
    <folder>/journal-0000.jsonl   what was said
    <folder>/cursor.json          how far MLflow has it

Each evaluation by hand has a folder of its own, so that neither another one nor a training that goes on shares its cursor.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from pipeline.errors import FoveaError
from pipeline.tracking.journal import Journal
from pipeline.tracking.mlflow_shipper import Shipper
from pipeline.untrusted import read_json

_JOINS = ("", "../cursor.json")  # cursors that may be joined


@dataclass(frozen=True)
class Aside:
    """Where a journal beside a run's own is to go.

    Attributes:
        uri: MLflow tracking URI.
        experiment: MLflow experiment.
        name: name of the MLflow run that is made.
        joins: name of a cursor file, relative to the folder: its MLflow run is written to and none is made. Empty for none.
    """

    uri: str
    experiment: str
    name: str
    joins: str = ""

    def begin(self, folder: Path) -> Journal:
        """Make the folder, write down where its journal goes, and open it."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "about.json").write_text(json.dumps(asdict(self), indent=1))
        return Journal(folder / "journal-0000.jsonl")

    def shipper(self, folder: Path, log: Callable[[str], None] = lambda _: None) -> Shipper:
        """Who sends a folder's journal; artifacts may lie anywhere in the run directory, two folders above."""
        joins = folder / self.joins if self.joins else None
        root = folder.parent.parent
        return Shipper(
            folder, uri=self.uri, experiment=self.experiment, name=self.name, log=log, joins=joins, once=False, root=root
        )


def asides(tracking: Path) -> list[tuple[Path, Aside]]:
    """All folders of that kind below ``<run>/tracking``, oldest first, but for those with another ``about.json``."""
    return [(file.parent, one) for file in sorted(tracking.glob("*/about.json")) if (one := _read(file)) is not None]


def _read(file: Path) -> Aside | None:
    try:
        document = read_json(file, limit=1 << 20)
    except (OSError, FoveaError):
        return None
    names = {field.name for field in fields(Aside)}
    if not isinstance(document, dict) or not {"uri", "experiment", "name"} <= document.keys() <= names:
        return None
    if not all(isinstance(value, str) for value in document.values()) or document.get("joins", "") not in _JOINS:
        return None
    return Aside(**document)
