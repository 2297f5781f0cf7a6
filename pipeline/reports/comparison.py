"""``fovea report``: compares runs in one self-contained HTML file: scores, curves, interruptions, losses, settings."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.checkpoint.catalog import latest
from pipeline.config.load import flatten
from pipeline.config.schema import Config
from pipeline.config.upgrade import upgrade
from pipeline.errors import ConfigError, DataError
from pipeline.evaluation.results import EvalResult, read_all
from pipeline.masking import masked
from pipeline.reports import page
from pipeline.reports.figures import Chart, Line
from pipeline.reports.history import History, read_history
from pipeline.reports.page import number
from pipeline.runtime.clock import clock
from pipeline.runtime.run_directory import RunDirectory
from pipeline.tracking.journal import lines, parse
from pipeline.untrusted import printable, read_json

_PLAIN = ("train/", "perf/", "memory/", "system/", "gradient_norm/", "data/", "storage/", "checkpoint/", "alert/", "copies/")
_CURVES = (
    ("train/loss", "loss, sum of its terms (nats)"),
    ("train/lr", "learning rate"),
    ("perf/images_per_second", "images per second"),
    ("perf/data_wait_fraction", "share of the time spent waiting for data"),
)
_CHOICES = ("/rate", "/layers", "/patches", "/cost", "/chosen_on", "_rank", "_p10")  # in the table, but not plotted
_ABSENT = "—"
_LONGEST = 400  # characters of a description of selections
_NAME = 100  # maximum length of a run's name
_CHARTS = 60  # maximum number of scores that are plotted


@dataclass
class RunSummary:
    """Contents of a run directory.

    Attributes:
        name: run name, numbered if others have the same.
        directory: the run directory.
        config: its settings, or ``None`` if they are of another version.
        history: its journals.
        outcome: final state, if the run has ended.
        manifest: manifest of its newest checkpoint.
        tags: environment as recorded in the journals.
        evaluations: results of ``fovea eval``, by checkpoint.
    """

    name: str
    directory: RunDirectory
    config: dict[str, Any]
    history: History
    outcome: dict[str, Any] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    evaluations: dict[str, EvalResult] = field(default_factory=dict)

    @property
    def batch(self) -> int:
        """Samples per step."""
        return int(self.config.get("train", {}).get("global_batch_size", 1))

    @property
    def scores(self) -> dict[str, dict[int, float]]:
        """Evaluation metrics by step."""
        return {name: points for name, points in self.history.metrics.items() if not name.startswith(_PLAIN)}


def gather(paths: Sequence[Path]) -> list[RunSummary]:
    """Read runs.

    Raises:
        ConfigError: one of the paths is not a run.
    """
    summaries: list[RunSummary] = []
    for path in paths:
        run = RunDirectory(path)
        if not run.config.is_file():
            raise ConfigError(
                "must be a run directory", where=str(path), hint="Name a directory with the config.json that training wrote"
            )
        config = upgrade(_json(run.config))
        name = printable(str(config.get("run", {}).get("name") or path.name), limit=_NAME)
        if any(other.name == name for other in summaries):
            name = f"{name} ({path.name})" if all(other.directory.path.name != path.name for other in summaries) else str(path)
        newest = latest(run.checkpoints)
        summary = RunSummary(
            name, run, config, read_history(run), _json(path / "outcome.json"), newest.manifest if newest else {}
        )
        for journal in sorted(run.tracking.glob("journal-*.jsonl")):
            for _, line in lines(journal):
                if b'"tags"' in line and (record := parse(line)) is not None and record["kind"] == "tags":
                    summary.tags |= {str(key): str(value) for key, value in record["values"].items()}
        summary.evaluations = read_all(run)
        summaries.append(summary)
    return summaries


def write(paths: Sequence[Path], out: Path) -> Path:
    """Write the page.

    Args:
        paths: run directories.
        out: the HTML file.

    Raises:
        ConfigError: one of the paths is not a run.
        DataError: the file cannot be written, or a record of a run has a wrong type.
    """
    try:
        runs = gather(paths)
        variables = {
            "title": f"fovea report: {', '.join(run.name for run in runs)}",
            "names": [run.name for run in runs],
            "overview": _overview(runs),
            "curves": [_chart(runs, name, title) for name, title in _CURVES],
            "scores": [_chart(runs, name, name, small=True) for name in _metrics(runs)],
            "evaluations": _evaluations(runs),
            "attempts": _attempts(runs),
            "substituted": _substituted(runs),
            "environment": _side_by_side(_environment(runs)),
            "settings": _side_by_side(_settings(runs)),
        }
        html = page.render("comparison", **variables)
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        raise DataError(
            f"a record of a run is damaged ({type(error).__name__})",
            where=", ".join(map(str, paths)),
            hint="Remove that run from the command, or see its outcome.json, attempts.jsonl and evaluations",
        ) from error
    with page.writing(out):
        out.write_text(html, encoding="utf-8")
    return out


def run(paths: Sequence[Path], out: Path) -> int:
    """Write the page and print its path; returns the exit code.

    Raises:
        FoveaError: see :func:`write`.
    """
    print(f"{write(paths, out)}: open it in a browser")
    return 0


def _json(path: Path) -> dict[str, Any]:
    try:
        document = read_json(path)
    except (OSError, DataError):
        return {}
    return document if isinstance(document, dict) else {}


# ---- variables of the template ------------------------------------------------------------------------------------------


def _overview(runs: Sequence[RunSummary]) -> list[list[str]]:
    rows: dict[str, list[str]] = {}
    for summary in runs:
        m, o, data = summary.manifest, summary.outcome, summary.manifest.get("data", {})
        step = int(o.get("step", m.get("step", 0)))
        seen = step * summary.batch
        seconds = float(o.get("seconds", m.get("seconds", 0.0)))
        rates = list(summary.history.metrics.get("perf/images_per_second", {}).values())
        bad = sum(int(n) for n in data.get("substituted", {}).values())
        plan = _json(summary.directory.path / "plan.json")
        total, selection = int(plan.get("steps", o.get("steps", 0))), str(plan.get("selection", ""))[:_LONGEST]
        for name, value in {
            "method": str(summary.config.get("method", {}).get("name", "unknown")),
            "state": _state(summary),
            "samples seen": number(seen),
            "steps": f"{number(step)} of {number(total)}" if total else number(step),
            "epochs": f"{seen / data['samples']:.2f}" if data.get("samples") else _ABSENT,
            "selection": selection or _ABSENT,
            "time spent training": clock(seconds) if seconds else _ABSENT,
            "images per second, median": number(statistics.median(rates)) if rates else _ABSENT,
            "images per second, entire run": number(seen / seconds) if seconds else _ABSENT,
            "attempts": str(max(summary.history.attempts, 1)),
            "steps skipped": str(o.get("skipped", m.get("skipped", 0))),
            "samples substituted": f"{number(bad)} of {number(float(data['seen']))}" if data.get("seen") else _ABSENT,
        }.items():
            rows.setdefault(name, []).append(value)
    return [[name, *values] for name, values in rows.items() if name != "selection" or set(values) != {_ABSENT}]


def _state(summary: RunSummary) -> str:
    final_state = _json(summary.directory.path / "final_state.json")
    if final_state:
        return str(final_state.get("state", "unknown"))
    stop = summary.outcome.get("stop")
    if stop:
        return "finished" if stop == "FINISHED" else f"stopped ({stop.lower()})"
    ends = [row for row in summary.directory.attempts() if row.get("event") == "end"]
    starts = [row for row in summary.directory.attempts() if row.get("event") == "start"]
    return "running, or broke off" if len(starts) > len(ends) else "broke off"


def _metrics(runs: Sequence[RunSummary]) -> list[str]:
    names = dict.fromkeys(name for summary in runs for name, points in summary.scores.items() if len(points) > 1)
    separate = ("baseline/", "segmentation/iou/")
    return [name for name in names if not name.startswith(separate) and not name.endswith(_CHOICES)][:_CHARTS]


def _chart(runs: Sequence[RunSummary], metric: str, title: str, *, small: bool = False) -> Chart:
    lines = [Line(summary.name, summary.history.line(metric, summary.batch), i % 3, small) for i, summary in enumerate(runs)]
    marks = [
        (float(step * summary.batch), f"{summary.name}: {text}")
        for summary in runs
        for step, text in summary.history.resumes.items()
    ]
    shown = [line for line in lines if line.points]
    return Chart(title, shown, marks=marks, width=360 if small else 520, height=180 if small else 280)


def _evaluations(runs: Sequence[RunSummary]) -> list[list[str]]:
    names = dict.fromkeys(name for summary in runs for name in summary.scores)
    rows = []
    for name in names:
        cells = []
        for summary in runs:
            points = summary.scores.get(name, {})
            if not points:
                cells.append(_ABSENT)
                continue
            last, best = max(points), max(points, key=lambda step: (points[step], -step))
            best_of = f" (best {points[best]:.4f} at step {best})" if points[best] > points[last] else ""
            cells.append(f"{points[last]:.4f}{best_of}")
        rows.append([name, *cells])
    metrics = dict.fromkeys(key for summary in runs for result in summary.evaluations.values() for key in result.scores)
    for key in sorted(metrics, key=lambda name: name.startswith("baseline/")):
        cells = []
        for summary in runs:
            results = summary.evaluations.items()
            values = {checkpoint: result.scores[key] for checkpoint, result in results if key in result.scores}
            newest = max(values, default="")
            cells.append(f"{values[newest]:.4f} ({newest})" if newest else _ABSENT)
        rows.append([f"{key}, fovea eval", *cells])
    return rows


def _attempts(runs: Sequence[RunSummary]) -> list[list[str]]:
    rows = []
    for summary in runs:
        ends = {row.get("attempt"): row for row in summary.directory.attempts() if row.get("event") == "end"}
        for row in summary.directory.attempts():
            if row.get("event") != "start":
                continue
            end = ends.get(row["attempt"], {})
            why = end.get("why") or end.get("cause") or (f"code {end['code']}" if "code" in end else "broke off, or is running")
            begin = row.get("resumed_from")
            rows.append(
                [
                    summary.name,
                    str(row["attempt"]),
                    str(row.get("ranks", _ABSENT)),
                    "the start" if begin is None else f"step {begin}",
                    str(why),
                    clock(end["t"] - row["t"]) if "t" in end and "t" in row else _ABSENT,
                ]
            )
    return rows


def _substituted(runs: Sequence[RunSummary]) -> list[list[str]]:
    rows = []
    for summary in runs:
        data = summary.manifest.get("data", {})
        for reason, count in data.get("substituted", {}).items():
            rows.append([summary.name, str(reason), number(float(count))])
        if data.get("quarantine"):
            rows.append([summary.name, "different samples in quarantine", number(len(data["quarantine"]))])
    return rows


def _environment(runs: Sequence[RunSummary]) -> dict[str, list[str]]:
    rows: dict[str, list[str]] = {}
    for column, summary in enumerate(runs):
        m = summary.manifest
        facts: dict[str, str] = {name: str(m[name]) for name in ("fovea", "torch", "python", "world") if name in m}
        data = m.get("data", {})
        facts |= {f"data.{name}": str(data[name]) for name in ("fingerprint", "samples", "lanes", "block") if name in data}
        facts |= {name: value for name, value in summary.tags.items() if not name.startswith(("alert/", "mlflow."))}
        for name, value in facts.items():
            rows.setdefault(name, [_ABSENT] * len(runs))[column] = value
    return rows


def _settings(runs: Sequence[RunSummary]) -> dict[str, list[str]]:
    rows: dict[str, list[str]] = {}
    for column, summary in enumerate(runs):
        for key, value in _flat(summary.config).items():
            rows.setdefault(key, [_ABSENT] * len(runs))[column] = value
    return rows


def _flat(config: Mapping[str, Any]) -> dict[str, str]:
    try:
        return {key: str(value) for key, value in masked(flatten(Config.model_validate(config))).items()}
    except (ValueError, RecursionError):  # written by another version
        return {str(key): json.dumps(value) for key, value in masked(dict(config)).items()}


def _side_by_side(rows: Mapping[str, Sequence[str]]) -> dict[str, list[list[str]]]:
    """Rows whose values differ between the runs, and the others."""
    different = [[key, *values] for key, values in rows.items() if len(set(values)) > 1]
    return {"different": different, "equal": [[key, *values] for key, values in rows.items() if len(set(values)) <= 1]}
