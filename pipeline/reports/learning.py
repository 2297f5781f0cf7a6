"""HTML page of what configs learn: the recorded score of each over samples seen, with its interval and its baselines."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from pipeline.bench.reproduction.agreement import interval
from pipeline.bench.reproduction.ledger import Entry
from pipeline.reports import page
from pipeline.reports.figures import Band, Chart, Line

_BASELINES = (("untrained", "random_init", 1), ("raw pixels", "pixels", 2))


def write(records: Sequence[tuple[str, Entry]], out: Path) -> Path:
    """Write the page.

    Args:
        records: names of configs and their records.
        out: the HTML file.

    Raises:
        DataError: the file cannot be written.
    """
    page.write(
        out,
        "learning",
        title="fovea: what the small configs learn",
        head=["config", "metric", "reached", "untrained", "raw pixels", "seeds", "samples", "minutes a seed"],
        rows=[_row(name, entry) for name, entry in records],
        charts=[chart(name, entry) for name, entry in records if any(result.curve for result in entry.seeds)],
    )
    return out


def _row(name: str, entry: Entry) -> list[str]:
    baselines = [entry.baseline(key) for _, key, _ in _BASELINES]
    return [
        name,
        entry.metric,
        interval(entry.values()).percent(),
        *("" if value is None else f"{100 * value:.1f} %" for value in baselines),
        str(len(entry.seeds)),
        page.number(entry.seeds[0].samples),
        f"{entry.minutes:.0f}",
    ]


def chart(name: str, entry: Entry) -> Chart:
    """Mean of the seeds over samples seen, with its 95 % interval where there are several, and the baselines as levels."""
    values: dict[int, list[float]] = {}
    for result in entry.seeds:
        for samples, value in result.curve:
            values.setdefault(samples, []).append(value)
    count = max(map(len, values.values()), default=0)
    points = {samples: each for samples, each in sorted(values.items()) if len(each) == count}
    mean = [(float(samples), statistics.fmean(each)) for samples, each in points.items()]
    intervals = {samples: interval(each) for samples, each in points.items()}
    band = [(float(x), one.mean - one.half, one.mean + one.half) for x, one in intervals.items() if one.half is not None]
    baselines = [(text, entry.baseline(key), colour) for text, key, colour in _BASELINES]
    levels = [(text, level, colour) for text, level, colour in baselines if level is not None]
    return Chart(f"{name}: {entry.metric}", [Line("trained", mean, dots=True)], levels=levels, bands=[Band(band)], percent=True)
