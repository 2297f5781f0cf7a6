"""``fovea report``: compares runs in one self-contained HTML file: scores, curves, interruptions, losses, settings."""

from __future__ import annotations

import html
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.checkpoint import files
from pipeline.config.load import flatten
from pipeline.config.schema import Config
from pipeline.config.upgrade import upgrade
from pipeline.errors import ConfigError, DataError
from pipeline.evaluation import results
from pipeline.evaluation.results import EvalResult
from pipeline.masking import masked
from pipeline.reports import html as pictures
from pipeline.reports.html import Chart, Line
from pipeline.reports.run_page import History, history
from pipeline.runtime.clock import clock
from pipeline.runtime.run_directory import RunDirectory
from pipeline.tracking.journal import read
from pipeline.untrusted import read_json

_PLAIN = ("train/", "perf/", "memory/", "system/", "gradient_norm/", "data/", "storage/", "checkpoint/", "alert/", "copies/")
_CURVES = (
    ("train/loss", "loss, sum of its terms (nats)"),
    ("train/lr", "learning rate"),
    ("perf/images_per_second", "images per second"),
    ("perf/data_wait_fraction", "share of the time spent waiting for data"),
)
_CHOICES = ("/rate", "/layers", "/patches", "/cost", "/chosen_on", "_rank", "_p10")  # in the table, but not plotted
_ABSENT = "—"


@dataclass
class RunSummary:
    """Contents of a run directory.

    Attributes:
        name: run name, numbered if others have the same.
        directory: the run directory.
        config: its settings, or ``None`` if they are of another version.
        past: its journals.
        outcome: final state, if the run has ended.
        manifest: manifest of its newest checkpoint.
        tags: environment as recorded in the journals.
        results: of ``fovea eval``, by checkpoint.
    """

    name: str
    directory: RunDirectory
    config: dict[str, Any]
    past: History
    outcome: dict[str, Any] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    results: dict[str, EvalResult] = field(default_factory=dict)

    @property
    def batch(self) -> int:
        """Samples per step."""
        return int(self.config.get("train", {}).get("global_batch_size", 1))

    @property
    def scores(self) -> dict[str, dict[int, float]]:
        """Evaluation metrics by step."""
        return {name: points for name, points in self.past.metrics.items() if not name.startswith(_PLAIN)}


def gather(paths: Sequence[Path]) -> list[RunSummary]:
    """Read runs.

    Raises:
        ConfigError: one of the paths is not a run.
    """
    found: list[RunSummary] = []
    for path in paths:
        run = RunDirectory(path)
        if not run.config.is_file():
            raise ConfigError(
                "is no run's directory", where=str(path), hint="It should hold the config.json that a training wrote."
            )
        config = upgrade(_json(run.config))
        name = str(config.get("run", {}).get("name") or path.name)
        if any(other.name == name for other in found):
            name = f"{name} ({path.name})" if all(other.directory.path.name != path.name for other in found) else str(path)
        manifests = files.listed(run.checkpoints)
        newest = max(manifests, key=lambda s: (s.serial, s.step), default=None)
        told = RunSummary(name, run, config, history(run), _json(path / "outcome.json"), newest.manifest if newest else {})
        for journal in sorted(run.tracking.glob("journal-*.jsonl")):
            for _, record in read(journal):
                if record["kind"] == "tags":
                    told.tags |= {str(key): str(value) for key, value in record["values"].items()}
        told.results = results.read_all(run)
        found.append(told)
    return found


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
        page = _page(runs)
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        raise DataError(
            f"a record of a run is damaged ({type(error).__name__})",
            where=", ".join(map(str, paths)),
            hint="Leave that run out; see its outcome.json, attempts.jsonl and evaluations.",
        ) from error
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise DataError(f"the page cannot be written ({error.strerror})", where=str(out), hint="Choose another place.") from error
    return out


def _page(runs: Sequence[RunSummary]) -> str:
    count = f"{len(runs)} runs side by side" if len(runs) > 1 else f"The run {runs[0].name}"
    body = [
        f'<p class="over">fovea · report</p><h1>{html.escape(count)}</h1>',
        _overview(runs),
        _curves(runs),
        _evaluations(runs),
        _interruptions(runs),
        _losses(runs),
        _environment(runs),
        _settings(runs),
        "<footer>Read from the runs' journals, checkpoints and records; this file holds everything it shows.</footer>",
    ]
    return pictures.document(f"fovea report: {', '.join(r.name for r in runs)}", "\n".join(body))


def run(paths: Sequence[Path], out: Path) -> int:
    """Write the page and print its path; returns the exit code.

    Raises:
        FoveaError: see :func:`write`.
    """
    print(f"{write(paths, out)}: open it in a browser")
    return 0


def _json(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path)
    except (OSError, DataError):
        return {}
    return found if isinstance(found, dict) else {}


# ---- sections -------------------------------------------------------------------------------------------------------------


def _overview(runs: Sequence[RunSummary]) -> str:
    rows: dict[str, list[str]] = {}
    for told in runs:
        m, o, data = told.manifest, told.outcome, told.manifest.get("data", {})
        step = int(o.get("step", m.get("step", 0)))
        seen = step * told.batch
        seconds = float(o.get("seconds", m.get("seconds", 0.0)))
        rates = list(told.past.metrics.get("perf/images_per_second", {}).values())
        bad = sum(int(n) for n in data.get("substituted", {}).values())
        total = int(_json(told.directory.path / "plan.json").get("steps", o.get("steps", 0)))
        for name, value in {
            "method": str(told.config.get("method", {}).get("name", "unknown")),
            "state": _state(told),
            "samples seen": _number(seen),
            "steps": f"{_number(step)} of {_number(total)}" if total else _number(step),
            "passes over the data": f"{seen / data['samples']:.2f}" if data.get("samples") else _ABSENT,
            "time spent training": clock(seconds) if seconds else _ABSENT,
            "images per second, median": _number(statistics.median(rates)) if rates else _ABSENT,
            "images per second, whole run": _number(seen / seconds) if seconds else _ABSENT,
            "attempts": str(max(told.past.attempts, 1)),
            "steps skipped": str(o.get("skipped", m.get("skipped", 0))),
            "samples substituted": f"{_number(bad)} of {_number(float(data['seen']))}" if data.get("seen") else _ABSENT,
        }.items():
            rows.setdefault(name, []).append(value)
    return _table(["", *(told.name for told in runs)], [[name, *values] for name, values in rows.items()], kind="overview")


def _state(told: RunSummary) -> str:
    verdict = _json(told.directory.path / "final_state.json")
    if verdict:
        return str(verdict.get("state", "unknown"))
    stop = told.outcome.get("stop")
    if stop:
        return "finished" if stop == "FINISHED" else f"stopped ({stop.lower()})"
    ends = [row for row in told.directory.attempts() if row.get("event") == "end"]
    starts = [row for row in told.directory.attempts() if row.get("event") == "start"]
    return "running, or broke off" if len(starts) > len(ends) else "broke off"


def _curves(runs: Sequence[RunSummary]) -> str:
    drawn = [_chart(runs, name, title) for name, title in _CURVES]
    return (
        "<h2>Curves</h2>"
        + _figure("".join(drawn), "Upright dotted lines: a run was interrupted there, and resumed.", "curves")
        + _figure(
            "".join(_chart(runs, name, name, small=True) for name in _metrics(runs)) or '<p class="empty">nothing was judged</p>',
            "Scores of evaluations during training, over samples seen; all of them are in the table below.",
            "scores",
            "small",
        )
    )


def _figure(content: str, look: str, name: str, kind: str = "pair") -> str:
    return f'<figure id="{name}"><div class="{kind}">{content}</div><figcaption>{look}</figcaption></figure>'


def _metrics(runs: Sequence[RunSummary]) -> list[str]:
    names = dict.fromkeys(name for told in runs for name, points in told.scores.items() if len(points) > 1)
    separate = ("baseline/", "segmentation/iou/")
    return [name for name in names if not name.startswith(separate) and not name.endswith(_CHOICES)]


def _chart(runs: Sequence[RunSummary], metric: str, title: str, *, small: bool = False) -> str:
    lines = [Line(told.name, told.past.line(metric, told.batch), i % 3, small) for i, told in enumerate(runs)]
    marks = [(float(step * told.batch), f"{told.name}: {text}") for told in runs for step, text in told.past.resumes.items()]
    shown = [line for line in lines if line.points]
    return pictures.draw(Chart(title, shown, marks=marks, width=360 if small else 520, height=180 if small else 280))


def _evaluations(runs: Sequence[RunSummary]) -> str:
    names = dict.fromkeys(name for told in runs for name in told.scores)
    rows = []
    for name in names:
        cells = []
        for told in runs:
            points = told.scores.get(name, {})
            if not points:
                cells.append(_ABSENT)
                continue
            last, best = max(points), max(points, key=lambda step: (points[step], -step))
            best_of = f" (best {points[best]:.4f} at step {best})" if points[best] > points[last] else ""
            cells.append(f"{points[last]:.4f}{best_of}")
        rows.append([name, *cells])
    metrics = dict.fromkeys(key for told in runs for result in told.results.values() for key in result.scores)
    for key in sorted(metrics, key=lambda name: name.startswith("baseline/")):
        cells = []
        for told in runs:
            values = {checkpoint: result.scores[key] for checkpoint, result in told.results.items() if key in result.scores}
            newest = max(values, default="")
            cells.append(f"{values[newest]:.4f} ({newest})" if newest else _ABSENT)
        rows.append([f"{key}, fovea eval", *cells])
    table = _table(["metric", *(told.name for told in runs)], rows) if rows else '<p class="empty">nothing was judged</p>'
    return f"<h2>Evaluations</h2>{table}"


def _interruptions(runs: Sequence[RunSummary]) -> str:
    rows = []
    for told in runs:
        ends = {row.get("attempt"): row for row in told.directory.attempts() if row.get("event") == "end"}
        for row in told.directory.attempts():
            if row.get("event") != "start":
                continue
            end = ends.get(row["attempt"], {})
            why = end.get("why") or end.get("cause") or (f"code {end['code']}" if "code" in end else "broke off, or goes on")
            begin = row.get("resumed_from")
            rows.append(
                [
                    told.name,
                    str(row["attempt"]),
                    str(row.get("ranks", _ABSENT)),
                    "the beginning" if begin is None else f"step {begin}",
                    str(why),
                    clock(end["t"] - row["t"]) if "t" in end and "t" in row else _ABSENT,
                ]
            )
    head = ["run", "attempt", "ranks", "went on from", "ended", "lasted"]
    return f"<h2>Attempts</h2>{_table(head, rows)}" if rows else ""


def _losses(runs: Sequence[RunSummary]) -> str:
    rows = []
    for told in runs:
        data = told.manifest.get("data", {})
        for reason, count in data.get("substituted", {}).items():
            rows.append([told.name, str(reason), _number(float(count))])
        if data.get("quarantine"):
            rows.append([told.name, "different samples in quarantine", _number(len(data["quarantine"]))])
    note = "Samples that could not be used, replaced by others of their shard; named in the run's <code>bad_samples/</code>."
    table = _table(["run", "reason", "times"], rows) if rows else '<p class="empty">No sample was lost.</p>'
    return f'<h2>Samples lost</h2><p class="note">{note}</p>{table}'


def _environment(runs: Sequence[RunSummary]) -> str:
    rows: dict[str, list[str]] = {}
    for place, told in enumerate(runs):
        m = told.manifest
        facts: dict[str, str] = {name: str(m[name]) for name in ("fovea", "torch", "python", "world") if name in m}
        data = m.get("data", {})
        facts |= {f"data.{name}": str(data[name]) for name in ("fingerprint", "samples", "lanes", "block") if name in data}
        facts |= {name: value for name, value in told.tags.items() if not name.startswith(("alert/", "mlflow."))}
        for name, value in facts.items():
            rows.setdefault(name, [_ABSENT] * len(runs))[place] = value
    return f"<h2>Environment</h2>{_side_by_side(rows, runs)}"


def _settings(runs: Sequence[RunSummary]) -> str:
    rows: dict[str, list[str]] = {}
    for place, told in enumerate(runs):
        for key, value in _flat(told.config).items():
            rows.setdefault(key, [_ABSENT] * len(runs))[place] = value
    return f"<h2>Settings</h2>{_side_by_side(rows, runs)}"


def _flat(config: Mapping[str, Any]) -> dict[str, str]:
    try:
        return {key: str(value) for key, value in masked(flatten(Config.model_validate(config))).items()}
    except (ValueError, RecursionError):  # written by another version
        return {str(key): json.dumps(value) for key, value in masked(dict(config)).items()}


def _side_by_side(rows: Mapping[str, Sequence[str]], runs: Sequence[RunSummary]) -> str:
    head = ["", *(told.name for told in runs)]
    different = [[key, *values] for key, values in rows.items() if len(set(values)) > 1]
    same = [[key, *values] for key, values in rows.items() if len(set(values)) <= 1]
    shown = _table(head, different) if different else ""
    if len(runs) > 1 and not different:
        shown = '<p class="empty">All alike.</p>'
    title = f"{len(same)} that are alike" if len(runs) > 1 else f"all {len(same)}"
    return f"{shown}<details><summary>{title}</summary>{_table(head, same)}</details>" if same else shown


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, kind: str = "") -> str:
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    lines = "".join(
        f"<tr><th>{html.escape(row[0])}</th>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:]) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>'


def _number(value: float) -> str:
    return f"{value:,.0f}".replace(",", "\u202f")
