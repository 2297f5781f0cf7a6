"""The page of a run: every figure, true numbers, nothing fetched from anywhere."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.config.load import Loaded
from pipeline.data.inputs import prepare
from pipeline.errors import CheckpointError
from pipeline.evaluation import gallery
from pipeline.evaluation.principal import principal
from pipeline.methods.registry import build_seeded_method
from pipeline.reports import run_page as page
from pipeline.reports.history import History, read_history
from pipeline.runtime.run_directory import RunDirectory
from pipeline.weights.from_checkpoint import newest
from tests.helpers.evaluation import CPU, changed, toy, write_checkpoint
from tests.reports.test_preview import OUTSIDE, VIEWS

FIGURES = ("result", "curves", "terms", "crops", "patches", "neighbours")
BATCH = 16


def journal(run: Path, attempt: int, records: Iterable[dict[str, Any]]) -> None:
    folder = run / "tracking"
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({"t": 0.0, **record}) + "\n" for record in records)
    (folder / f"journal-{attempt:04d}.jsonl").write_text(lines)


def metrics(step: int, **values: float) -> dict[str, Any]:
    return {"kind": "metrics", "step": step, "values": {name.replace("__", "/"): value for name, value in values.items()}}


def logged(first: int, last: int) -> list[dict[str, Any]]:
    return [
        metrics(step, train__loss=8 - step / 8, train__ibot=3 - step / 16, train__lr=1e-3, perf__images_per_second=100.0 + step)
        for step in range(first, last + 1, 2)
    ]


def tags(**values: str) -> dict[str, Any]:
    return {"kind": "tags", "values": {f"fovea.{name}": value for name, value in values.items()}}


def attempts(run: Path, *resumed_from: int | None) -> None:
    run.mkdir(parents=True, exist_ok=True)
    rows = [{"event": "start", "t": 0.0, "attempt": n, "ranks": 2, "resumed_from": step} for n, step in enumerate(resumed_from)]
    (run / "attempts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """A run of 24 steps that was stopped by a signal at 10, killed after 18, and resumed from 16."""
    loaded = toy(tmp_path_factory.mktemp("page"))
    folder = loaded.config.run.folder
    baselines = {"untrained__k5": 0.25, "pixels__k5": 0.2, "untrained__k1": 0.15, "pixels__k1": 0.1}
    start = metrics(0, knn__k1=0.15, knn__k5=0.25, **baselines)
    journal(folder, 0, [start, *logged(2, 10), tags(state="stopped", stop="SIGTERM")])
    journal(folder, 1, [*logged(12, 18), metrics(17, train__loss=99.0)])
    journal(folder, 2, [*logged(18, 24), metrics(24, knn__k1=0.55, knn__k5=0.65), tags(state="finished")])
    attempts(folder, None, 10, 16)
    method = changed(build_seeded_method(loaded.config, CPU), 1)
    data = {"substituted": {"corrupt": 2, "unreadable": 1}, "samples": 40}
    write_checkpoint(folder, method, step=24, seconds=3.0, skipped=4, data=data)
    return loaded


@pytest.fixture(scope="module")
def drawn(run: Loaded) -> str:
    out = run.config.run.folder / "page.html"
    assert page.write(run.config.run.folder, run.config, out) == out
    return out.read_text(encoding="utf-8")


class _Balance(HTMLParser):
    """Whether every element is closed where it should be, and which ids there are outside charts."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if "svg" not in self.open:
            self.ids += [value for name, value in attributes if name == "id" and value]
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes something else"


def section(drawn: str, name: str) -> str:
    return drawn[drawn.index(f'id="{name}"') :].partition("</figure>")[0]


def test_every_figure_is_there_with_a_sentence_and_nothing_comes_from_outside(drawn: str) -> None:
    parser = _Balance()
    parser.feed(drawn)
    assert parser.open == [] and parser.ids == list(FIGURES)
    assert not OUTSIDE.search(drawn)
    for name in FIGURES[1:]:
        assert "What to look for." in section(drawn, name)
    assert section(drawn, "curves").count("<svg ") == 2 and section(drawn, "terms").count("<svg ") == 3
    assert "prefers-color-scheme:dark" in drawn


def test_pictures_are_as_many_as_promised(drawn: str) -> None:
    assert section(drawn, "crops").count("<img ") == page.CROPS * (1 + VIEWS)
    assert section(drawn, "patches").count("<img ") == 3 * page.PCA
    assert section(drawn, "neighbours").count("<img ") == page.QUERIES * (1 + page.NEIGHBOURS)


def test_trained_and_untrained_patches_differ(drawn: str) -> None:
    images = re.findall(r'<img src="([^"]+)"', section(drawn, "patches"))
    assert len(set(images)) == len(images)


def test_the_table_tells_the_newest_scores_beside_the_baselines(drawn: str) -> None:
    table = drawn[drawn.index('id="result"') :].partition("</table>")[0]
    rows = re.findall(r"<tr.*?</tr>", table)[1:]
    shown = [re.findall(r">([^<>]+)</t[hd]>", row) for row in rows]
    assert shown == [
        ["trained network", "55.0 %", "65.0 %"],
        ["same network, random init", "15.0 %", "25.0 %"],
        ["raw pixels", "10.0 %", "20.0 %"],
    ]
    headline = re.search(r"<h1>(.*?)</h1>", drawn, re.DOTALL)
    assert headline and "After 384 samples" in headline[1] and "65.0 % of the validation images" in headline[1]


def test_the_facts_are_those_of_the_run(drawn: str) -> None:
    facts = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", drawn))
    assert facts["images per second, training alone"] == "128"
    assert facts["samples seen"] == "384" and facts["optimizer steps"] == "24" and facts["epochs"] == "9.6"
    assert facts["attempts"] == "3" and facts["steps skipped as not finite"] == "4" and facts["time spent training"] == "0:03"
    assert facts["samples substituted"] == "3 (2 corrupt, 1 unreadable)"


def test_given_facts_are_added_or_take_the_place_of_the_same_name(run: Loaded, tmp_path: Path) -> None:
    facts = {"k-NN, trained teacher": "never", "attempts": "nine", "wall <time>": "1:02"}
    told = page.write(run.config.run.folder, run.config, tmp_path / "page.html", facts=facts).read_text(encoding="utf-8")
    assert "<dt>attempts</dt><dd>nine</dd>" in told and told.count("<dt>attempts") == 1
    assert "<dt>wall &lt;time&gt;</dt><dd>1:02</dd>" in told and "never" not in told.partition("</dl>")[0]


def test_each_step_counts_once_and_interruptions_are_marked(run: Loaded, drawn: str) -> None:
    past = read_history(RunDirectory(run.config.run.folder))
    assert past.line("train/loss", BATCH) == [(BATCH * step, 8 - step / 8) for step in range(2, 25, 2)]
    assert past.attempts == 3
    assert past.resumes == {
        10: "attempt 0 was stopped by SIGTERM at step 10, attempt 1 resumed from step 10",
        16: "attempt 1 broke off at step 18, attempt 2 resumed from step 16; 2 steps were repeated",
    }
    charts = re.findall(r"<svg .*?</svg>", section(drawn, "curves") + section(drawn, "terms"))
    assert len(charts) == 5
    assert all(chart.count('class="mark"') == 2 and html.escape(past.resumes[16]) in chart for chart in charts)


def test_a_run_started_again_after_its_end_was_not_interrupted(tmp_path: Path) -> None:
    journal(tmp_path, 0, [*logged(2, 4), tags(state="finished")])
    journal(tmp_path, 1, [tags(state="running"), tags(state="finished")])
    attempts(tmp_path, None, 4)
    past = read_history(RunDirectory(tmp_path))
    assert past.resumes == {} and past.attempts == 2 and max(past.metrics["train/loss"]) == 4


def test_numbers_of_eval_count_where_the_journals_stop_before_the_checkpoint(run: Loaded, tmp_path: Path) -> None:
    scores = {"trained": {"1": 0.9}, "untrained": {"1": 0.3}, "pixels": {"1": 0.2}}
    saved = newest(run.config.run.folder)
    (tmp_path / "evaluation.json").write_text(json.dumps({"checkpoint": saved.path.name, "knn": scores}))
    short = History(metrics={"knn/k1": {16: 0.5}, "baseline/random_init/knn/k1": {0: 0.3}})
    found, step = page._scores(RunDirectory(tmp_path), short, saved)
    assert (found["trained"], found["pixels"], step) == ({1: 0.9}, {1: 0.2}, 24)
    found, step = page._scores(RunDirectory(tmp_path), History(metrics={"knn/k1": {24: 0.5}}), saved)
    assert (found["trained"], found["pixels"], step) == ({1: 0.5}, {}, 24)
    (tmp_path / "evaluation.json").write_text(json.dumps({"checkpoint": "step_000000012", "knn": scores}))
    assert page._scores(RunDirectory(tmp_path), short, saved)[1] == 16


def test_a_run_without_k_nn_or_journals_still_has_its_page(run: Loaded, tmp_path: Path) -> None:
    config = run.config
    write_checkpoint(tmp_path / "run", build_seeded_method(config, CPU))
    knn = config.evaluation.knn.model_copy(update={"enabled": False})
    config = config.replace(evaluation=config.evaluation.model_copy(update={"knn": knn}))
    told = page.write(tmp_path / "run", config, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "k-NN was not measured" in told and "nothing was logged" in told
    rows = section(told, "neighbours").split('<div class="row">')[1:]
    for row in rows:
        query, *found = re.findall(r'<img src="([^"]+)"', row)
        assert query not in found, "a picture is its own neighbour"


def test_a_run_without_a_checkpoint_has_no_page(run: Loaded, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        page.write(tmp_path / "run", run.config, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_chosen_pictures_are_the_first_of_each_class(run: Loaded) -> None:
    manifest = prepare(run.config, 1).train
    labels = manifest.column(0, "label").tolist()
    chosen = gallery.varied(manifest, 12).astype(int).tolist()
    assert sorted(labels[n] for n in chosen[:10]) == list(range(10))
    assert [labels.index(labels[n]) for n in chosen[:10]] == chosen[:10] == sorted(chosen[:10])
    assert len(set(chosen)) == 12 and len(gallery.varied(manifest, 100)) == 40


def test_principal_directions_give_like_tokens_like_colours() -> None:
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randint(0, 4, (5, 9), generator=generator)
    centres = torch.randn(4, 16, generator=generator)
    colours, share = principal(3.0 + centres[kinds])
    assert colours.shape == (5, 9, 3) and colours.min() >= 0 and colours.max() <= 1
    assert math.isclose(share, 1.0, rel_tol=1e-6), "four points lie in three directions"
    for kind in range(4):
        alike = colours[(kinds == kind).numpy()]
        assert np.ptp(alike, axis=0).max() < 1e-4
    again, _ = principal(3.0 + centres[kinds])
    assert np.array_equal(colours, again)
    wide = torch.randn(50, 9, 16, generator=generator)
    wide[..., 0] *= 100
    assert principal(wide)[1] > 0.99


def test_a_run_from_pretrained_weights_shows_them_too_or_says_why_not(run: Loaded, tmp_path: Path) -> None:
    source = tmp_path / "weights"
    shutil.copytree(run.config.run.folder, source)
    config = run.config
    adapted = config.replace(init_from=config.init_from.model_copy(update={"source": str(source)}))
    out = tmp_path / "page.html"
    page.write(run.config.run.folder, adapted, out)
    drawn = out.read_text(encoding="utf-8")
    rows = section(drawn, "patches")
    assert rows.count("<img ") == 4 * page.PCA and ">start<" in rows
    images = re.findall(r'<img src="([^"]+)"', rows)
    trained, start = images[page.PCA : 2 * page.PCA], images[3 * page.PCA :]
    assert trained == start  # the same weights here
    shutil.rmtree(source)
    page.write(run.config.run.folder, adapted, out)
    drawn = out.read_text(encoding="utf-8")
    assert section(drawn, "patches").count("<img ") == 3 * page.PCA and "start not shown" in drawn
