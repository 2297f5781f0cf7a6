"""Journals of standalone evaluations: a directory with a journal, its cursor, and its destination.

    <folder>/about.json           the fields of :class:`EvalDestination`
    <folder>/journal-0000.jsonl   the records
    <folder>/cursor.json          how much of the journal MLflow has accepted

Each standalone evaluation has its own directory, so it shares no cursor with another evaluation or with a training that resumes.
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
class EvalDestination:
    """Destination of a journal that is separate from the run's own.

    Attributes:
        uri: MLflow tracking URI.
        experiment: MLflow experiment.
        name: name of the MLflow run to create.
        joins: name of a cursor file, relative to the folder, whose MLflow run receives the records instead of a new one. Empty
            for a new run.
    """

    uri: str
    experiment: str
    name: str
    joins: str = ""

    def begin(self, folder: Path) -> Journal:
        """Creates the folder, records the journal's destination, and opens the journal."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "about.json").write_text(json.dumps(asdict(self), indent=1))
        return Journal(folder / "journal-0000.jsonl")

    def shipper(self, folder: Path, log: Callable[[str], None] = lambda _: None) -> Shipper:
        """Returns the shipper of a folder's journal; artifacts may be anywhere in the run directory, two levels up."""
        joins = folder / self.joins if self.joins else None
        root = folder.parent.parent
        return Shipper(
            folder, uri=self.uri, experiment=self.experiment, name=self.name, log=log, joins=joins, once=False, root=root
        )


def eval_destinations(tracking: Path) -> list[tuple[Path, EvalDestination]]:
    """Lists all such folders below ``<run>/tracking``, oldest first; skips those with a malformed ``about.json``."""
    return [(file.parent, one) for file in sorted(tracking.glob("*/about.json")) if (one := _read(file)) is not None]


def _read(file: Path) -> EvalDestination | None:
    try:
        document = read_json(file, limit=1 << 20)
    except (OSError, FoveaError):
        return None
    names = {field.name for field in fields(EvalDestination)}
    if not isinstance(document, dict) or not {"uri", "experiment", "name"} <= document.keys() <= names:
        return None
    if not all(isinstance(value, str) for value in document.values()) or document.get("joins", "") not in _JOINS:
        return None
    return EvalDestination(**document)
