"""Generates the tables of benchmark results in the READMEs from the results kept in this package."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.bench.reproduction import agreement, headers, ledger

RESULTS = Path(__file__).parent / "results"
MAIN = ("<!-- results: begin -->", "<!-- results: end -->")
"""Markers around the short table of the project's README."""
ALL = ("<!-- all results: begin -->", "<!-- all results: end -->")
"""Markers around the full table beside the benchmarks."""
LEARNING = ("<!-- learning: begin -->", "<!-- learning: end -->")
"""Markers around the table of what the small configs learn, from the ledger."""
_MEGABYTE = 1e6

Document = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        measure: what is measured.
        ours, baseline: results of fovea and of what it is compared with.
        ratio: of the two.
    """

    measure: str
    ours: str
    baseline: str
    ratio: str


def table(results: Path = RESULTS) -> str:
    """Markdown table of all kept results with their commands, in a fixed order; links are relative to this package."""
    lines = ["| measures | fovea | baseline | ratio | command |", "|---|---:|---:|---:|---|"]
    for name, rows in _READERS.items():
        if (document := _read(results, name)) is not None:
            cells = [f"| [{row.measure}]({_page(name)}) | {row.ours} | {row.baseline} | {row.ratio} |" for row in rows(document)]
            lines += [f"{line} `{document['command']}` |" for line in cells]
    return "\n".join(lines) + "\n"


def main_table(results: Path = RESULTS) -> str:
    """Markdown table of the main results; links are relative to the project's README."""
    lines = ["| measures | fovea | baseline | ratio |", "|---|---:|---:|---:|"]
    for name in _MAIN:
        if (document := _read(results, name)) is not None:
            link = f"pipeline/bench/{_page(name)}"
            rows = _READERS[name](document)
            lines += [f"| [{row.measure}]({link}) | {row.ours} | {row.baseline} | {row.ratio} |" for row in rows]
    return "\n".join(lines) + "\n"


def update(readme: str, results: Path = RESULTS) -> str:
    """The text of a README with the tables inserted between their markers.

    Raises:
        ValueError: the text has no markers.
    """
    tables = {MAIN: lambda: main_table(results), ALL: lambda: table(results), LEARNING: learning_table}
    parts = [(markers, make) for markers, make in tables.items() if markers[0] in readme]
    if not parts:
        raise ValueError(f"must contain {MAIN[0]} or {ALL[0]}")
    for (begin, end), make in parts:
        before, after = readme.index(begin) + len(begin), readme.index(end)
        readme = f"{readme[:before]}\n{make()}{readme[after:]}"
    return readme


def learning_table(ledger_file: Path | None = None) -> str:
    """Markdown table of the ledger's records; ± is the 95 % interval of the mean over seeds."""
    lines = [
        "| `fovea reproduce` | k-NN | untrained | raw pixels | seeds | CPU minutes a seed |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, _, entry in headers.records(ledger.read(ledger_file or ledger.default_file())):
        baselines = [entry.baseline(kind) for kind in ("random_init", "pixels")]
        cells = ["" if value is None else f"{100 * value:.1f} %" for value in baselines]
        cpu = [result.cpu_minutes for result in entry.seeds if result.cpu_minutes is not None]
        minutes = f"{statistics.fmean(cpu):.0f}" if cpu else ""
        reached = agreement.interval(entry.values()).percent()
        lines.append(f"| `{name}` | {reached} | {' | '.join(cells)} | {len(entry.seeds)} | {minutes} |")
    return "\n".join(lines) + "\n"


def _speed(ratio: float) -> str:
    return f"{ratio:.2f} x the speed"


def _read(results: Path, name: str) -> Document | None:
    path = results / f"{name}.json"
    document: Document | None = json.loads(path.read_text()) if path.is_file() else None
    return document


def _page(name: str) -> str:
    return f"results/{name.removesuffix('-20').removesuffix('-77')}.md"


def _data(d: Document) -> list[Row]:
    best = {name: min(values) for name, values in d["milliseconds"].items()}
    return [
        Row(
            f"DINOv2's ten views of an image, {label}, CPU time",
            f"{best[ours]:.1f} ms",
            f"{best[theirs]:.1f} ms torchvision v2",
            _speed(best[theirs] / best[ours]),
        )
        for label, ours, theirs in (
            ("hue in YIQ", "fovea, hue yiq", "torchvision v2, hue"),
            ("hue in HSV", "fovea, hue hsv", "torchvision v2, hue"),
            ("no hue", "fovea, hue off", "torchvision v2"),
        )
    ]


def _step(caption: int) -> Callable[[Document], list[Row]]:
    def rows(d: Document) -> list[Row]:
        ours, theirs = (min(d["cases"][name]["seconds"]) for name in ("fovea", "open_clip"))
        measure = f"CLIP B/32 step, captions of {caption} tokens"
        return [Row(measure, f"{ours:.2f} s", f"{theirs:.2f} s open_clip", _speed(theirs / ours))]

    return rows


def _dinov2(d: Document) -> list[Row]:
    ours, theirs = (min(d["cases"][name]["seconds"]) for name in ("fovea", "official"))
    return [Row("DINOv2 ViT-S/14 step", f"{ours:.2f} s", f"{theirs:.2f} s official code", _speed(theirs / ours))]


def _prototype_loss(d: Document) -> list[Row]:
    ours, full = d["cases"]["chunked"], d["cases"]["full logits"]
    time = min(full["seconds"]) / min(ours["seconds"])
    memory = full["peak"] / ours["peak"]
    sizes = [f"{case['peak'] / _MEGABYTE:,.0f} MB, {min(case['seconds']):.1f} s" for case in (ours, full)]
    return [Row("prototype losses", sizes[0], f"{sizes[1]} full logits", f"{memory:.1f} x less memory, {time:.2f} x the speed")]


def _checkpoint(d: Document) -> list[Row]:
    ours, waiting = d["beside"] / d["step"], d["waiting"] / d["step"]
    row = ("pause of training for a checkpoint", f"{ours:.1%} of a step", f"{waiting:.1%} synchronous")
    return [Row(*row, f"{waiting / ours:.0f} x shorter")]


def _resume(d: Document) -> list[Row]:
    fresh, resumed = min(d["fresh"]), min(d["resumed"])
    row = ("first step after a verified resume, CPU time", f"{resumed:.2f} s", f"{fresh:.2f} s fresh start")
    return [Row(*row, f"{resumed / fresh:.2f} x as long")]


def _trainer_overhead(d: Document) -> list[Row]:
    trainer, engine = (statistics.median(d[name]) * 1e3 for name in ("trainer", "engine"))
    row = ("training loop, CPU time of a step", f"{trainer:.2f} ms", f"{engine:.2f} ms engine alone")
    return [Row(*row, f"{trainer - engine:.2f} ms more")]


def _signatures(d: Document) -> list[Row]:
    signature, step = (statistics.median(d[name]) * 1e3 for name in ("signature", "step"))
    return [Row("signature of a step", f"{signature:.2f} ms", f"{step:.0f} ms the step", f"{100 * signature / step:.2f}% of it")]


def _verification(d: Document) -> list[Row]:
    verified, plain = (statistics.median(d[name]) * 1e3 for name in ("verified", "plain"))
    return [
        Row("verified step, CPU time", f"{verified:.0f} ms", f"{plain:.0f} ms another step", f"{verified / plain:.2f} x as long")
    ]


def _curation(d: Document) -> list[Row]:
    own = [r["row"] for r in d["rows"] if r["stage"] == "duplicates" and r["row"]["threshold"] == "0.97"]
    removed, lost = ([float(row[name].rstrip(" %")) for row in own] for name in ("removed copies", "lost originals"))
    recall = f"{min(removed):.1f} to {max(removed):.1f} % removed"
    rows = [Row("planted near-duplicates, cosine 0.97", recall, "what was planted", f"{max(lost):.1f} % of originals lost")]
    learned = [r["row"] for r in d["rows"] if r["stage"] == "learning"]
    if not learned:
        return rows
    score = {name: [float(row[_SCORE].rstrip(" %")) for row in learned if row["trained on"] == name] for name in _TRAINED_ON}
    chosen, everything = (f"{sum(values) / len(values):.1f} %" for values in score.values())
    return [
        *rows,
        Row("k-NN of DINOv2 on a curated selection, equal steps", chosen, f"{everything} all samples", learned[-1][_SCORE]),
    ]


_SCORE, _TRAINED_ON = "k-NN (k=20)", ("the selection", "all samples")


def _determinism(d: Document) -> list[Row]:
    strict, normal = (min(d["cases"][name]["seconds"]) for name in ("deterministic", "normal"))
    return [Row("deterministic mode", f"{strict:.2f} s", f"{normal:.2f} s normal", f"{strict / normal:.2f} x as long")]


def _collectives(d: Document) -> list[Row]:
    rows = []
    for stage in d["stages"]:
        sent, expected = (sum(v for k, v in stage[name].items() if k != "small") for name in ("payload", "expected"))
        row = (f"bytes of collectives of a step, ZeRO {stage['stage']}", f"{sent:,}", f"{expected:,} by theory")
        rows.append(Row(*row, f"{sent / expected:.2f} x"))
    return rows


def _flops(d: Document) -> list[Row]:
    return [
        Row(
            f"FLOPs of a sample, {cost['name']}",
            f"{cost['counted']:,.1f} G counted",
            f"{cost['formula']:,.1f} G by formula",
            f"{cost['formula'] / cost['counted'] - 1:+.1%}",
        )
        for cost in d["costs"]
    ]


def _methods(d: Document) -> list[Row]:
    return [
        Row(
            f"k-NN of {row['method']} on scenes after {row['samples']:,} samples",
            f"{row['knn']:.1%}",
            f"{row['untrained']:.1%} untrained",
            f"{100 * (row['knn'] - row['untrained']):+.1f} points",
        )
        for row in d["rows"]
        if not row["failed"]
    ]


def _dense_features(d: Document) -> list[Row]:
    miou = {name: [run["miou"] for run in d["runs"] if run["method"] == name] for name in ("detailclip", "clip")}
    means = [statistics.mean(values) for values in miou.values()]
    spans = [f"{mean:.1%} ({min(v):.1%} to {max(v):.1%})" for mean, v in zip(means, miou.values(), strict=True)]
    measure = f"mIoU of DetailCLIP's patches on scenes, mean of {len(miou['clip'])} seeds"
    return [Row(measure, spans[0], f"{spans[1]} CLIP", f"{100 * (means[0] - means[1]):+.1f} points")]


def _collapse_ablation(d: Document) -> list[Row]:
    by_question: dict[str, list[Document]] = {}
    for trial in (trial for trial in d["trials"] if trial["knn"]):
        by_question.setdefault(trial["trial"]["question"], []).append(trial)
    rows = []
    for question, (reference, *others) in by_question.items():
        first = _last(reference["knn"])
        for trial in others:
            knn = _last(trial["knn"])
            measure = f"k-NN, {question} {trial['trial']['name']}"
            baseline = f"{first:.1%} {reference['trial']['name']}"
            rows.append(Row(measure, f"{knn:.1%}", baseline, f"{100 * (knn - first):+.1f} points"))
    return rows


def _last(points: Mapping[str, float]) -> float:
    return points[max(points, key=int)]


def _host_path(d: Document) -> list[Row]:
    def blocks(row: Document) -> float:
        return float(row["waits"] + row["blocking"] + row["loader_blocks"])

    return [
        Row(
            f"waits and blocking copies of a step and its loading, {row['after']['config']}{''.join(name.partition(',')[1:])}",
            f"{blocks(row['after']):.0f}",
            f"{blocks(row['before']):.0f} before",
            f"{blocks(row['after']) / max(blocks(row['before']), 1):.2f} x",
        )
        for name, row in d["methods"].items()
    ]


def _scale(d: Document) -> list[Row]:
    rows = []
    for curve in d["curves"]:
        both = [int(size) for size in curve["before"] if size in curve["now"]]
        if not both or (curve["figure"] == "bytes" and "memory" not in curve["name"] and "sent" not in curve["name"]):
            continue
        size = str(max(both))
        now, before = (_amount(curve[when][size], curve["figure"]) for when in ("now", "before"))
        ratio = curve["now"][size] / curve["before"][size]
        rows.append(Row(f"{curve['name']}, {int(size):,} {curve['unit']}", now, f"{before} before", f"{ratio:.3g} x"))
    streams = d.get("streams", [])
    if streams:
        usual = streams[0]
        for row in streams[1:]:
            down, other = row["amplification"], usual["amplification"]
            title = f"bytes downloaded for each used in 1000 steps, {row['streams']} streams"
            rows.append(Row(title, f"{down:.2f}", f"{other:.2f} with {usual['streams']}", f"{down / other:.2f} x"))
    return rows


def _startup(d: Document) -> list[Row]:
    cpu = {(one["version"], one["shards"], one["ranks"], one["index"]): min(one["cpu"]) for one in d["starts"]}
    rows = []
    for version, shards, ranks, index in cpu:
        before = cpu.get(("before", shards, ranks, index))
        if version == "before" or (not index and before is None):
            continue
        now = cpu[version, shards, ranks, index]
        of = f"{shards:,} shards{'' if index else ' without an index'}, {ranks} ranks"
        title = f"CPU time from the command to the first step, {of}"
        ratio = f"{now / before:.2f} x" if before else ""
        rows.append(Row(title, f"{now:.1f} s", f"{before:.1f} s before" if before else "not measured", ratio))
    return rows


def _large_job(d: Document) -> list[Row]:
    starts = [one for one in d["starts"] if not one["resumed"]]
    sent = {(one["world"], one["mesh"]): one["phases"]["rendezvous"]["first"]["sent"] for one in starts}
    rows = []
    for world, mesh in sent:
        other = sent.get((world, True))
        ours = f"{sent[world, mesh] / _MEGABYTE:.2f} MB"
        if mesh:
            continue
        baseline = f"{other / _MEGABYTE:.2f} MB, each with each" if other else "not measured"
        ratio = f"{sent[world, mesh] / other:.3g} x" if other else ""
        rows.append(Row(f"sent by the first of {world} ranks at the rendezvous", ours, baseline, ratio))
    return rows


def _amount(value: float, figure: str) -> str:
    return f"{value / _MEGABYTE:,.3f} MB" if figure == "bytes" else f"{value:.3g} {figure}"


def _recompilations(d: Document) -> list[Row]:
    rows = []
    for name, row in d["methods"].items():
        if row["before"] is not None and sum(row["after"]["graphs"]):
            counts = [sum(row[state]["graphs"]) for state in ("after", "before")]
            blocks = [row[state]["calls"][-1] for state in ("after", "before")]
            figures = [f"{graphs} for {calls} blocks" for graphs, calls in zip(counts, blocks, strict=True)]
            title = f"graphs compiled in {len(row['after']['graphs'])} steps, {name}"
            rows.append(Row(title, figures[0], f"{figures[1]} before", f"{counts[0] / max(counts[1], 1):.2f} x"))
    return rows


def _loaders(d: Document) -> list[Row]:
    ours, *others = ((name, max(one["decoded"])) for name, one in d["loaders"].items() if one["decoded"])
    name, best = max(others, key=lambda pair: pair[1])
    measure = "decoded samples per CPU second from the loader as a library"
    return [Row(measure, f"{ours[1]:,.0f}", f"{best:,.0f} {name}, the fastest of {len(others)}", _speed(ours[1] / best))]


def _chaos(d: Document) -> list[Row]:
    rows = [row for row in d["rows"] if row["kind"] not in ("none", "slurm-none")]
    equal, lost = sum(row["equal"] for row in rows), statistics.median(row["seconds_lost"] for row in rows)
    kinds, samples = len({row["kind"] for row in rows}), sum(row["samples_wrong"] for row in rows)
    measure = f"runs under {len(rows)} faults of {kinds} kinds that end with the bits of an undisturbed run"
    return [Row(measure, f"{equal}", f"{len(rows)} faults", f"{lost:.1f} s lost (median), {samples} samples")]


def _data_versions(d: Document) -> list[Row]:
    rows = []
    for hue, both in d["milliseconds"].items():
        now, before = (statistics.median(both[name]) for name in ("now", "before"))
        pixels = "the same pixels" if d["equal"][hue] else "other pixels"
        measure = f"CPU ms per image of 8-bit RGB, hue {hue}, beside the version before declared channels; {pixels}"
        rows.append(Row(measure, f"{now:.2f} ms", f"{before:.2f} ms before", _speed(before / now)))
    return rows


def _kills(d: Document) -> list[Row]:
    deaths = d["deaths"]
    seconds = [death["noticed"] + death["started"] for death in deaths]
    again = [death["step"] - death["resumed"] for death in deaths]
    measure = (
        f"seconds from the death of a rank to the next step ({len(deaths)} in one run, which ends with the undisturbed bits)"
    )
    if not d["equal"]:
        measure = measure.replace("which ends with the", "which does not end with the")
    figures = f"{d['cold']:.1f} s to the first step of the first start", f"{statistics.median(again):g} steps redone (median)"
    return [Row(measure, f"{statistics.median(seconds):.1f} s (median)", *figures)]


def _failures(d: Document) -> list[Row]:
    rows = []
    for point in (point for point in d["points"] if point["nodes"] in (64, 512, 2048)):
        ours, default = (100 * point[name][0] for name in ("repaired", "default"))
        measure = f"simulated goodput on {point['nodes']:,} nodes, best interval and snapshots"
        rows.append(Row(measure, f"{ours:.1f} %", f"{default:.1f} % every 3,750 steps", f"{ours - default:+.1f} points"))
    return rows


def _snapshots(d: Document) -> list[Row]:
    plain, every = statistics.median(d["seconds"]["none"]), d["options"]["every"]
    rows = []
    for case, title in (
        ("snapshot_every_n", f"a snapshot in host memory every {every} steps"),
        ("snapshot_every_step", "a snapshot in host memory every step"),
        ("checkpoint_every_n", f"a checkpoint every {every} steps"),
    ):
        times = [ours / theirs for ours, theirs in zip(d["seconds"][case], d["seconds"]["none"], strict=True)]
        ours = f"{statistics.median(d['seconds'][case]):.3f} s"
        rows.append(Row(f"a step with {title}", ours, f"{plain:.3f} s without", f"{agreement.interval(times).times()} x as long"))
    return rows


_READERS: dict[str, Callable[[Document], list[Row]]] = {
    "data-cpu": _data,
    "step-clip-cpu-20": _step(20),
    "step-clip-cpu-77": _step(77),
    "step-dinov2-cpu": _dinov2,
    "prototype-loss-cpu": _prototype_loss,
    "checkpoint-cpu": _checkpoint,
    "resume-cpu": _resume,
    "trainer-overhead-cpu": _trainer_overhead,
    "signatures-cpu": _signatures,
    "verification-cpu": _verification,
    "curation-cpu": _curation,
    "determinism-cpu": _determinism,
    "collectives-cpu": _collectives,
    "flops": _flops,
    "methods-cpu": _methods,
    "dense-features-cpu": _dense_features,
    "collapse-ablation-cpu": _collapse_ablation,
    "host-path": _host_path,
    "scale-cpu": _scale,
    "large-job-cpu": _large_job,
    "startup-cpu": _startup,
    "recompilations": _recompilations,
    "loaders-cpu": _loaders,
    "chaos-cpu": _chaos,
    "kills-cpu": _kills,
    "data-versions-cpu": _data_versions,
    "failures": _failures,
    "snapshots-cpu": _snapshots,
}
_MAIN = ("data-cpu", "step-clip-cpu-20", "step-dinov2-cpu", "prototype-loss-cpu", "checkpoint-cpu")
