"""The lines ``reached`` and ``cost`` of configs' headers, generated from the ledger."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.bench.reproduction.agreement import interval
from pipeline.bench.reproduction.ledger import Entry, config_hash, record
from pipeline.config.load import available, load

_WIDTH = 140
_INDENT = "#             "
_COUNTS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def records(entries: Sequence[Entry]) -> Iterator[tuple[str, Path, Entry]]:
    """Name, file and record of each config that has one, as it is now."""
    names = {entry.config for entry in entries}
    for name, file in available().items():
        if name in names and (entry := record(entries, name, config_hash(load(name).config))) is not None:
            yield name, file, entry


def lines(entry: Entry) -> list[str]:
    """The lines of a header that state what was reached and what it cost."""
    values, count = entry.values(), len(entry.seeds)
    each = ", ".join(f"{100 * value:.1f}" for value in values)
    kinds = (("random_init", "the same network untrained"), ("pixels", "raw pixels"))
    beside = [f"{text} {100 * value:.1f} %" for name, text in kinds if (value := entry.baseline(name)) is not None]
    seeds = f"{_COUNTS[count] if count < len(_COUNTS) else count} seed{'s' * (count > 1)}"
    samples = entry.seeds[0].samples
    reached = (
        f"{_title(entry.metric)} {interval(values).percent()} after {samples:,} samples (95 % interval of the mean of {seeds}: "
        f"{each}); {', '.join(beside)}; {entry.date}"
    )
    cpu = [result.cpu_minutes for result in entry.seeds if result.cpu_minutes is not None]
    busy = f", {sum(cpu) / len(cpu):.0f} CPU minutes" if cpu else ""
    ranks = "one rank" if entry.ranks == 1 else f"{entry.ranks} ranks"
    cost = (
        f"{entry.minutes:.0f} minutes a seed{busy} ({ranks} on {entry.machine.get('cores', '?')} shared cores, "
        f"{entry.machine.get('processor', 'unknown processor')})"
    )
    return [*_wrapped("reached", reached), *_wrapped("cost", cost)]


def _title(metric: str) -> str:
    return f"k-NN (k={metric.removeprefix('knn/k')})" if metric.startswith("knn/k") else metric


def _wrapped(key: str, text: str) -> list[str]:
    parts = textwrap.wrap(text, _WIDTH - len(_INDENT), break_long_words=False)
    return [f"#   {key:<9} {parts[0]}", *(f"{_INDENT}{part}" for part in parts[1:])]


def updated(text: str, entry: Entry) -> str:
    """A config's text with these lines in the place of those about the same, or else before ``source``."""
    head, rest = _split(text)
    kept, skipping = [], False
    for line in head:
        key = re.match(r"#   (\S+)", line)
        skipping = key[1] in ("reached", "cost") if key else skipping and line.startswith(_INDENT)
        if not skipping:
            kept.append(line)
    at = next((i for i, line in enumerate(kept) if line.startswith("#   source")), len(kept))
    return "\n".join([*kept[:at], *lines(entry), *kept[at:], *rest])


def _split(text: str) -> tuple[list[str], list[str]]:
    every = text.split("\n")
    end = next((i for i, line in enumerate(every) if not line.startswith("#")), len(every))
    return every[:end], every[end:]
