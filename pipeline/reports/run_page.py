"""HTML page of a run: scores, curves, and visualizations of the network's features.

Everything is read from the run directory (journals, attempts, newest checkpoint) and from its shards; nothing is fetched.
"""

from __future__ import annotations

import html
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.checkpoint.files import Saved
from pipeline.config.schema import Config
from pipeline.data.inputs import Inputs, prepare
from pipeline.errors import DataError
from pipeline.evaluation import results
from pipeline.evaluation.gallery import Gallery, varied
from pipeline.evaluation.principal import principal
from pipeline.evaluation.results import current_metric, split_metric
from pipeline.reports import html as pictures
from pipeline.reports import preview
from pipeline.reports.html import Chart, Line
from pipeline.runtime.clock import clock
from pipeline.runtime.run_directory import RunDirectory
from pipeline.tracking.journal import read
from pipeline.weights.from_checkpoint import load_trained, newest

if TYPE_CHECKING:
    from pipeline.data.augment.views import ViewSpec

CROPS, PCA, QUERIES, NEIGHBOURS = 4, 8, 6, 6
"""Number of samples shown with their crops, images in the PCA, and rows and columns of the neighbour table."""
_BANK = 4000  # maximum number of images searched
_THUMB = 216  # maximum size in pixels of a thumbnail in the file; the page shows it at half size
_CHOICE = 0xE7A1  # random stream of the draw, the one of the k-NN evaluation
_NETWORKS = {
    "trained": "trained network",
    "random_init": "same network, random init",
    "init_from": "same network, as it began",
    "pixels": "raw pixels",
}
_SCHEDULES = {"lr", "weight_decay", "teacher_momentum", "teacher_temperature", "epoch", "skipped_steps", "loss"}
_TITLES = {
    "dino_local": "DINO, local crops",
    "dino_global": "DINO, global crops",
    "ibot": "iBOT, hidden patches",
    "koleo": "KoLeo, spreading",
    "prototype_entropy": "prototypes in use, 1 = all",
    "target_entropy": "entropy of targets, 1 = undecided",
    "teacher_student_top1_agreement": "student agrees with teacher",
    "dino_loss_vs_log_k": "DINO below a mere guess",
}
_SHARES = {"prototype_entropy", "target_entropy", "teacher_student_top1_agreement"}


# ---- what the journals say ----------------------------------------------------------------------------------------------


@dataclass
class History:
    """A run's metrics over all attempts, each step once.

    Attributes:
        metrics: pairs of step and value by metric name, sorted by step.
        resumes: for each step from which an attempt resumed, the reason.
        attempts: number of attempts.
    """

    metrics: dict[str, dict[int, float]] = field(default_factory=dict)
    resumes: dict[int, str] = field(default_factory=dict)
    attempts: int = 0

    def line(self, name: str, batch: int) -> list[tuple[float, float]]:
        """A metric over samples seen, for steps of ``batch`` samples."""
        return [(step * batch, value) for step, value in sorted(self.metrics.get(name, {}).items())]


def history(run: RunDirectory) -> History:
    """Merge the journals of a run's attempts; steps after an attempt's last checkpoint are taken from the next attempt."""
    starts = {row["attempt"]: row for row in run.attempts() if row.get("event") == "start"}
    journals = {int(path.stem.removeprefix("journal-")): path for path in sorted(run.tracking.glob("journal-*.jsonl"))}
    out = History(attempts=len(starts.keys() | journals.keys()))
    ended, reached = "", 0
    for attempt, path in journals.items():
        begin = int(starts.get(attempt, {}).get("resumed_from") or 0)
        if ended:
            _go_on(
                out,
                begin,
                f"attempt {attempt - 1} {ended} at step {max(reached, begin)}, attempt {attempt} went on from",
                reached,
            )
        ended, reached = "broke off", begin
        for _, record in read(path):
            if record["kind"] == "metrics":
                step = int(record["step"])
                reached = max(reached, step)
                for name, value in record["values"].items():
                    out.metrics.setdefault(current_metric(name), {})[step] = float(value)
            elif record["kind"] == "tags":
                ended = {"stopped": f"was stopped by {record['values'].get('fovea.stop', 'a signal')}", "finished": ""}.get(
                    record["values"].get("fovea.state"), ended
                )
    return out


def _go_on(out: History, begin: int, what: str, reached: int) -> None:
    again = f"; {reached - begin} steps were done again" if reached > begin else ""
    text = f"{what} step {begin}{again}"
    out.resumes[begin] = f"{out.resumes[begin]}; {text}" if begin in out.resumes else text
    for points in out.metrics.values():
        for step in [step for step in points if step > begin]:
            del points[step]


# ---- the page -----------------------------------------------------------------------------------------------------------


def write(run: Path, config: Config, out: Path, *, facts: dict[str, str] | None = None) -> Path:
    """Write the page of a run.

    Args:
        run: the run directory.
        config: its settings.
        out: the HTML file to write.
        facts: additional lines for the list beside the scores, or replacements for those of the same name read from the run;
            names that begin with k-NN are dropped, since the table holds them.

    Returns:
        ``out``.

    Raises:
        FoveaError: a run without a checkpoint, a checkpoint of another architecture, or missing shards.
    """
    import torch

    from pipeline.methods.registry import build_seeded_method

    directory = RunDirectory(run)
    saved, past = newest(run), history(directory)
    inputs = prepare(config, 1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained, untrained = load_trained(config, saved, device), build_seeded_method(config, device)
    towers = {"trained": trained.export()["backbone"].eval(), "untrained": untrained.export()["backbone"].eval()}
    look = Gallery(config, inputs, towers, config.evaluation.knn.image_size or trained.views[0].size, device)
    scores, scored_step = _scores(directory, past, saved)
    own = _facts(config, past, saved, sum(p.numel() for p in towers["trained"].parameters()))
    own |= {name: value for name, value in (facts or {}).items() if not name.startswith("k-NN")}
    body = [
        _head(config, scores, scored_step, look.split),
        _result(scores, own),
        _curves(config, past, scores),
        _crops(config, inputs, trained.views),
        _patches(look),
        _neighbours(look, min(config.evaluation.knn.max_train or _BANK, _BANK)),
        f"<footer>drawn from {html.escape(saved.path.name)} of the run “{html.escape(config.run.name)}”, "
        f"torch {html.escape(torch.__version__)}; this file holds everything it shows</footer>",
    ]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(pictures.document(f"fovea: {config.run.name}", "\n".join(body)), encoding="utf-8")
    except OSError as error:
        raise DataError(f"the page cannot be written ({error.strerror})", where=str(out), hint="Choose another place.") from error
    return out


def _figure(content: str, look: str, name: str) -> str:
    return f'<figure id="{name}">{content}<figcaption><b>What to look for.</b> {look}</figcaption></figure>'


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _number(value: float) -> str:
    return f"{value:,.0f}".replace(",", "\u202f")


# ---- what came out ------------------------------------------------------------------------------------------------------


def _scores(run: RunDirectory, past: History, saved: Saved) -> tuple[dict[str, dict[int, float]], int]:
    """The newest k-NN of the journals and its step; or that of ``fovea eval`` if it evaluated a later checkpoint."""
    newest = {name: points[max(points)] for name, points in past.metrics.items() if points}
    knn = {name for name in newest if split_metric(name)[1].startswith("knn/k")}
    step = max((max(past.metrics[name]) for name in knn), default=-1)
    if step < saved.step and (result := results.read_all(run).get(saved.path.name)) is not None:
        evaluated = {name: value for name, value in result.scores.items() if split_metric(name)[1].startswith("knn/k")}
        newest, step = (evaluated, saved.step) if evaluated else (newest, step)
    scores: dict[str, dict[int, float]] = {name: {} for name in _NETWORKS}
    for name, value in newest.items():
        baseline, metric = split_metric(name)
        k = metric.removeprefix("knn/k")
        if metric.startswith("knn/k") and k.isdecimal() and (baseline or "trained") in scores:
            scores[baseline or "trained"][int(k)] = value
    return scores, step if step >= 0 else saved.step


def _facts(config: Config, past: History, saved: Saved, weights: int) -> dict[str, str]:
    about, seen = saved.manifest, saved.step * config.train.global_batch_size
    data, seconds = about.get("data", {}), float(about.get("seconds", 0.0))
    bad = {str(reason): int(count) for reason, count in data.get("substituted", {}).items()}
    reasons = f" ({', '.join(f'{count} {reason}' for reason, count in bad.items())})" if bad else ""
    return {
        "images per second, training alone": _number(seen / seconds) if seconds else "unknown",
        "samples seen": _number(seen),
        "passes over the data": f"{seen / data['samples']:.1f}" if data.get("samples") else "unknown",
        "optimizer steps": _number(saved.step),
        "attempts": f"{max(past.attempts, 1)}",
        "steps skipped as not finite": str(about.get("skipped", 0)),
        "samples substituted": f"{sum(bad.values())}{reasons}",
        "time spent training": clock(seconds),
        "weights of the backbone": f"{weights / 1e6:.2f} M",
        "ranks": str(about.get("world", 1)),
    }


def _head(config: Config, scores: dict[str, dict[int, float]], step: int, split: str) -> str:
    seen = _number(step * config.train.global_batch_size)
    words = f"{config.method.name} after {seen} samples"
    if scores["trained"]:
        k = max(scores["trained"])
        named = f"name the class of {_percent(scores['trained'][k])} of the {split} pictures"
        words = f"After {seen} samples, nearest neighbours {named}"
        rivals = [
            f"{text}: {_percent(scores[name][k])}" for name, text in _NETWORKS.items() if k in scores[name] and name != "trained"
        ]
        words += "; " * bool(rivals) + ", ".join(rivals)
    over = f"fovea · {config.method.name} · {config.run.name}"
    return f'<p class="over">{html.escape(over)}</p><h1>{html.escape(words)}</h1>'


def _result(scores: dict[str, dict[int, float]], facts: dict[str, str]) -> str:
    ks = sorted({k for row in scores.values() for k in row})
    told = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in facts.items())
    if ks:
        head = "".join(f'<th class="n">k = {k}</th>' for k in ks)
        rows = []
        for number, (source, words) in enumerate((name, text) for name, text in _NETWORKS.items() if scores[name]):
            values = [_percent(scores[source][k]) if k in scores[source] else "unknown" for k in ks]
            cells = "".join(f'<td class="n">{value}</td>' for value in values)
            share = 100 * scores[source].get(ks[-1], 0.0)
            bar = f'<td class="wide"><span class="bar b{number}" style="width:{share:.1f}%"></span></td>'
            rows.append(f"<tr{' class=best' if source == 'trained' else ''}><th>{words}</th>{cells}{bar}</tr>")
        table = (
            f"<table><thead><tr><th>features that vote</th>{head}<th></th></tr></thead><tbody>{''.join(rows)}</tbody></table>"
            '<p class="note">Share of the pictures to which a weighted vote of the k nearest training pictures gives the right '
            "class. The whole width of a bar is 100 %. No label was seen in training.</p>"
        )
    else:
        table = '<p class="empty">k-NN was not measured: evaluation.knn was off, or there were no labels</p>'
    return f'<section id="result" class="pair"><div>{table}</div><dl class="facts">{told}</dl></section>'


def _curves(config: Config, past: History, scores: dict[str, dict[int, float]]) -> str:
    batch = config.train.global_batch_size
    marks = [(step * batch, text) for step, text in sorted(past.resumes.items())]
    k = max(scores["trained"], default=0)
    names = {"random_init": ("random init", 1), "init_from": ("init_from", 1), "pixels": ("raw pixels", 2)}
    levels = [(name, scores[source][k], colour) for source, (name, colour) in names.items() if k in scores[source]]
    trained = Line("trained", past.line(f"knn/k{k}", batch), dots=True)
    knn = Chart(f"k-NN accuracy, k = {k}", [trained], levels=levels, marks=marks, percent=True, floor=0.0)
    loss = Chart("loss, sum of its terms (nats)", [Line("loss", past.line("train/loss", batch))], marks=marks)
    terms = [name.removeprefix("train/") for name in past.metrics if name.startswith("train/")]
    terms = [name for name in terms if name not in _SCHEDULES]
    terms.sort(key=lambda name: (list(_TITLES).index(name) if name in _TITLES else len(_TITLES), name))
    panels = [
        _panel(_TITLES.get(name, name), past.line(f"train/{name}", batch), marks, share=name in _SHARES) for name in terms[:6]
    ]
    panels.append(_panel("learning rate", past.line("train/lr", batch), marks, floor=0.0))
    panels.append(_panel("images per second", past.line("perf/images_per_second", batch), marks, floor=0.0))
    line = "Dotted upright lines: there the run was" if len(marks) > 1 else "The dotted upright line: there the run was"
    stops = f" {line} interrupted and resumed." if marks else ""
    return (
        "<h2>How it went</h2>"
        + _figure(
            f'<div class="pair">{pictures.draw(knn)}{pictures.draw(loss)}</div>',
            "k-NN should climb above both dashed lines, which never move: the same network before training, and raw pixels. "
            f"The loss should fall and never jump.{stops}",
            "curves",
        )
        + _figure(
            f'<div class="small">{"".join(panels)}</div>',
            "Each term of the loss (DINO, iBOT, KoLeo; nats, as weighted) comes down on its own. Prototypes in use stay near 1, "
            "for a fall towards 0 would be collapse, while the targets grow more decided. The learning rate rises, then falls as "
            "planned, straight through an interruption.",
            "terms",
        )
    )


def _panel(
    title: str,
    points: list[tuple[float, float]],
    marks: list[tuple[int, str]],
    *,
    floor: float | None = None,
    share: bool = False,
) -> str:
    low, high = (0.0, 1.02) if share else (floor, None)
    return pictures.draw(Chart(title, [Line(title, points)], marks=marks, floor=low, ceiling=high, width=250, height=160))


# ---- what the network saw, and what it makes of images ----------------------------------------------------------------


def _crops(config: Config, inputs: Inputs, views: tuple[ViewSpec, ...]) -> str:
    cards = "".join(map(preview.card, preview.gather(config, inputs, views, CROPS)))
    return "<h2>What the network was shown</h2>" + _figure(
        cards,
        "Numbered frames show where each view was cut. Views of one sample differ in place, size, colour and sharpness, yet show "
        "the same thing: that is all the teaching there is. What lies under hatched patches the student has to guess. "
        f"Each sample: {html.escape(preview.legend(views))}.",
        "crops",
    )


def _patches(look: Gallery) -> str:
    import torch

    size = 2 * look.size
    images, captions = look.images(look.queries, varied(look.queries, PCA), size)
    side = size // look.towers["trained"].patch
    rows = [("picture", f"{size} pixels a side", [pictures.pixels(image) for image in images])]
    for name, tower in look.towers.items():
        with torch.inference_mode():
            tokens = torch.cat([tower(part).patches for part in images.split(8)])
        colours, share = principal(tokens)
        bytes_ = np.rint(255 * colours).astype(np.uint8).reshape(len(images), side, side, -1)
        rows.append((name, f"{100 * share:.0f} % of the variance", list(bytes_)))
    lines = []
    for title, note, row in rows:
        cells = "".join(_tile(image, f"{title}: {caption}", sharp=True) for image, caption in zip(row, captions, strict=True))
        lines.append(f'<div class="row"><div class="said"><b>{title}</b>{note}</div>{cells}</div>')
    return "<h2>What its patches know</h2>" + _figure(
        f'<div class="scroll"><div class="rows">{"".join(lines)}</div></div>',
        f"The three directions in which the {side} x {side} patch tokens of these {len(images)} pictures differ most, fitted "
        "over all of them together and shown as red, green and blue. After training, parts of one kind should share a colour "
        "within a picture and from picture to picture, whatever their brightness; untrained tokens follow edges, colours and "
        "places. No background was cut away, and the pictures are the first of different classes, not chosen by eye.",
        "patches",
    )


def _tile(picture: pictures.Pixels, about: str, *, sharp: bool = False) -> str:
    image = pictures.fitted(picture, min(_THUMB, max(picture.shape)))  # small images are enlarged by the browser
    return pictures.tag(image, about, width=_THUMB // 2, kind="sharp" if sharp else "")


def _neighbours(look: Gallery, most: int) -> str:
    import torch

    from pipeline.data.order.random import permutation

    ids = look.bank.ids()
    if most < len(ids):
        ids = ids[np.sort(permutation(len(ids), 0, _CHOICE)[:most])]
    wanted = varied(look.queries, QUERIES)
    keys, classes = look.classes(look.bank, ids)
    asked, answers = look.classes(look.queries, wanted)
    similarity = asked @ keys.T
    if look.bank is look.queries:  # an image is not its own neighbour
        similarity[torch.from_numpy(wanted[:, None] == ids[None])] = -2.0
    near, place = similarity.topk(min(NEIGHBOURS, len(ids)), dim=1)
    queries, said = look.images(look.queries, wanted, look.size)
    found, told = look.images(look.bank, ids[place.flatten().numpy()], look.size)
    rows, right, known = [], 0, 0
    for row, label in enumerate(answers):
        name = f"class {label}" if label >= 0 else "no class"
        cells = [f'<div class="hit">{_tile(pictures.pixels(queries[row]), said[row])}{name}</div><div class="gap"></div>']
        for column, number in enumerate(range(row * place.shape[1], (row + 1) * place.shape[1])):
            other = classes[int(place[row, column])]
            labelled = label >= 0 and other >= 0
            known, right = known + labelled, right + (labelled and other == label)
            kind = "" if not labelled else "same" if other == label else "other"
            image = _tile(pictures.pixels(found[number]), f"class {other}: {told[number]}")
            cells.append(f'<div class="hit {kind}">{image}{float(near[row, column]):.3f}</div>')
        rows.append(f'<div class="row">{"".join(cells)}</div>')
    frames = "The shards have no labels, so no picture is framed. "
    if known:
        frames = '<span class="key same"></span>same class, <span class="key other"></span>another class; '
        frames += f"here {right} of {known} are of the same class. "
    return "<h2>What it finds alike</h2>" + _figure(
        f'<div class="scroll"><div class="find">{"".join(rows)}</div></div>',
        f"On the left a {look.split} picture, beside it the {place.shape[1]} of {_number(len(ids))} training pictures whose "
        f"class tokens are nearest, with the cosine. "
        f"Good neighbours agree in what is shown rather than in colour or ground. {frames}",
        "neighbours",
    )
