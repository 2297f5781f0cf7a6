"""Reports the problems that indexing found: counts by reason, examples, and every rejected shard."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.data import storage
from pipeline.data.index.fields import STATUSES
from pipeline.data.index.shard_table import Shard
from pipeline.data.index.sidecar import load_sidecar
from pipeline.errors import DataError, FoveaError
from pipeline.untrusted import printable, shown

# Explains each reason and how to fix it.
MEANING = {
    "missing_image": "no member with an image extension",
    "missing_caption": "a caption is required and there is none",
    "missing_label": "a class number is required and there is none",
    "missing_segmentation": "a class map is required and there is none",
    "not_image": "the bytes are not an image: often an error page or an empty download",
    "unsupported": "an image that the decoder does not read (GIF, AVIF…): pack again with --transcode",
    "truncated": "the end of the image is missing: download it again",
    "too_large": "more pixels than data.max_pixels",
    "too_small": "a side shorter than data.min_side",
    "duplicate_key": "the key and its members occur twice; the first is used",
    "not_adjacent": "members of one key lie apart: pack again, which brings them together",
    "unselected": "left out by data.selection or --selection",
    "other_channels": "another number of channels than data.channels.count",
    "other_dtype": "values of another type than data.channels.dtype",
    "other_size": "the files of one image differ in width or height",
    "undecodable": "failed a full decode (fovea shards verify --exclude)",
    "link": "links are not followed: put the files themselves into the tar",
    "device": "a device is not a sample",
    "sparse": "sparse members are not read: write the tar without --sparse",
    "unknown": "a kind of member that tar does not define",
    "no_extension": "a name without an extension belongs to no sample",
    "bad_label": "the class is not a whole number: it has no label (pack from a table or folders to number names)",
    "negative_label": "a negative class number: it has no label",
    "empty_label": "an empty class: it has no label",
    "bad_caption": "the caption in .json is neither a text nor a list of texts",
    "caption_nul": "a caption with NUL characters: UTF-16 without a byte order mark, or binary data",
    "caption_replaced": "a caption that is not UTF-8: invalid bytes are replaced by U+FFFD, and the caption is used",
    "bad_json": "the .json member holds no JSON object",
    "cut_sample": "the sample before the place where the shard is cut",
}


@dataclass(frozen=True)
class Finding:
    """One kind of problem.

    Attributes:
        reason: a status of the index, or a note.
        count: number of occurrences.
        refused: whether each is a sample that is not used; otherwise it is beside the samples, or part of a used one.
        examples: the first few, as (shard, key or member).
        shards: number of occurrences by shard URL.
    """

    reason: str
    count: int
    refused: bool
    examples: tuple[tuple[str, str], ...]
    shards: dict[str, int]

    @property
    def meaning(self) -> str:
        """What it means and how to fix it."""
        return MEANING.get(self.reason, "")


@dataclass(frozen=True)
class IndexReport:
    """Report on an index.

    Attributes:
        shards: number of shards.
        samples: samples in them, used or not.
        accepted: samples that can be used.
        findings: problems, those that reject samples first, then by count.
        refused: (shard, what is wrong, hint) of each shard that cannot be read.
        damaged: (shard, what is wrong) of those used in part.
    """

    shards: int
    samples: int
    accepted: int
    findings: tuple[Finding, ...]
    refused: tuple[tuple[str, str, str], ...]
    damaged: tuple[tuple[str, str], ...]

    def document(self) -> dict[str, Any]:
        """Returns the report for JSON; invalid UTF-8 in keys is replaced."""
        document = {
            "shards": self.shards,
            "samples": self.samples,
            "accepted": self.accepted,
            "findings": [{**asdict(finding), "meaning": finding.meaning} for finding in self.findings],
            "refused": [{"shard": shard, "what": what, "hint": hint} for shard, what, hint in self.refused],
            "damaged": [{"shard": shard, "what": what} for shard, what in self.damaged],
        }
        return json.loads(_printable(json.dumps(document, ensure_ascii=False)))

    def text(self, *, most_shards: int | None = None) -> str:
        """Returns the report as text.

        Args:
            most_shards: maximum number of rejected or damaged shards to name; all by default.
        """
        lines = [f"{self.accepted:,} of {self.samples:,} samples in {self.shards:,} shards can be used"]
        for refused, title in ((True, "samples left out"), (False, "noted beside the samples")):
            chosen = [finding for finding in self.findings if finding.refused == refused]
            if chosen:
                lines += ["", title]
            width = max((len(finding.reason) for finding in chosen), default=0)
            for finding in chosen:
                among = f"in {len(finding.shards)} shard{'s' if len(finding.shards) > 1 else ''}"
                lines.append(f"  {finding.count:>9,}  {finding.reason:<{width}}  {among}: {finding.meaning}")
                lines += [f"{'':13}{printable(shard)}: {printable(name)}" for shard, name in finding.examples]
        sections = (
            ("shards refused", [f"{shard}: {what}. {hint}".rstrip(". ") for shard, what, hint in self.refused]),
            ("shards used in part", [what for _, what in self.damaged]),
        )
        for title, entries in sections:
            if entries:
                lines += ["", title, *(f"  {entry}" for entry in entries[:most_shards])]
            if most_shards is not None and len(entries) > most_shards:
                lines.append(f"  and {len(entries) - most_shards:,} more")
        return shown("\n".join(lines))

    def save(self, path: Path) -> None:
        """Writes the report as JSON, and beside it as text (``report.json`` and ``report.txt``).

        Raises:
            DataError: the file cannot be written.
        """
        try:
            storage.write_atomically(path, (json.dumps(self.document(), indent=1, ensure_ascii=False) + "\n").encode())
            storage.write_atomically(path.with_suffix(".txt"), (self.text() + "\n").encode())
        except OSError as error:
            raise DataError(f"cannot be written ({error.strerror})", where=str(path), hint="Choose another --report") from error


def index_report(
    directory: str | Path, shards: Sequence[Shard], problems: Sequence[FoveaError] = (), few: int = 5
) -> IndexReport:
    """Collects the problems recorded in the sidecars of an index; sidecars of shards without problems are not opened.

    Args:
        directory: directory of all sidecars.
        shards: the summaries of the shards that could be read.
        problems: the errors of the other shards.
        few: examples for each reason.

    Raises:
        DataError: a sidecar is missing or damaged.
    """
    counts: dict[tuple[bool, str], dict[str, int]] = {}
    examples: dict[tuple[bool, str], list[tuple[str, str]]] = {}
    for shard in shards:
        here = {(True, status): n for status, n in shard.counts.items() if status != "ok"}
        here |= {(False, note): n for note, n in shard.notes.items()}
        for what, n in here.items():
            counts.setdefault(what, {})[shard.url] = n
        wanting = [what for what in here if len(examples.setdefault(what, [])) < few]
        if not wanting:
            continue
        index = load_sidecar(Path(directory) / shard.sidecar)
        for refused, reason in wanting:
            room = few - len(examples[refused, reason])
            if refused:
                rows = (index.columns["status"] == STATUSES.index(reason)).nonzero()[0][:room]
                names = [index.keys[row] for row in rows]
            else:
                names = list(index.examples.get(reason, ()))[:room]
            examples[refused, reason] += [(shard.name, name) for name in names]
    findings = [
        Finding(reason, sum(where.values()), refused, tuple(examples[refused, reason]), where)
        for (refused, reason), where in counts.items()
    ]
    findings.sort(key=lambda finding: (not finding.refused, -finding.count, finding.reason))
    return IndexReport(
        shards=len(shards) + len(problems),
        samples=sum(sum(shard.counts.values()) for shard in shards),
        accepted=sum(shard.samples for shard in shards),
        findings=tuple(findings),
        refused=tuple((problem.where, problem.what, problem.hint) for problem in problems),
        damaged=tuple((shard.url, shard.damage) for shard in shards if shard.damage),
    )


def _printable(text: str) -> str:
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
