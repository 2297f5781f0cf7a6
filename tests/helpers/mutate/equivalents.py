"""The mutants that no test can kill, from ``equivalent.toml``: found by the text of their line and what changed in it.

An entry names a file, what encloses the line (``in``), the line, the changes in it, and the reason. Line numbers do not matter:
an entry lives until its line is rewritten. Entries that fit no mutant are reported.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.mutate.mutations import Mutant

FILE = Path(__file__).parent / "equivalent.toml"


@dataclass(frozen=True)
class Equivalents:
    """Reasons by scope, line and change of the mutants of one file."""

    reasons: dict[tuple[str, str, str], str]

    def reason(self, mutant: Mutant) -> str:
        """Why no test can kill a mutant; empty: one should."""
        return self.reasons.get(mutant.key, "")

    def unmatched(self, mutants: list[Mutant]) -> list[tuple[str, str, str]]:
        """Entries that fit none of all mutants of the file."""
        return sorted(self.reasons.keys() - {mutant.key for mutant in mutants})


def equivalents(file: str, listed: Path = FILE) -> Equivalents:
    """Reads those of a file, named as from the root of the checkout.

    Raises:
        ValueError: an entry lacks something, or says nothing new.
    """
    reasons: dict[tuple[str, str, str], str] = {}
    for entry in tomllib.loads(listed.read_text(encoding="utf-8")).get("equivalent", []):
        if entry.keys() != {"file", "in", "line", "changes", "reason"} or not entry["reason"] or not entry["changes"]:
            raise ValueError(f"{listed.name}: an entry needs file, in, line, changes and reason: {entry}")
        if entry["file"] != file:
            continue
        for change in entry["changes"]:
            key = (entry["in"], entry["line"], change)
            if key in reasons:
                raise ValueError(f"{listed.name}: twice: {key}")
            reasons[key] = entry["reason"]
    return Equivalents(reasons)
