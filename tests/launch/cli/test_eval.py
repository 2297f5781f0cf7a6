"""``fovea eval`` on the command line: the table, the results file, and what it is called with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.cli.eval import summarize
from pipeline.config.load import show
from pipeline.evaluation.results import EvalResult
from pipeline.methods.registry import build_seeded_method
from tests.helpers.commands import fovea
from tests.helpers.evaluation import CPU, changed, toy, write_checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints, not tracked."""
    loaded = toy(tmp_path_factory.mktemp("eval"), "launch.backend=gloo")
    folder = loaded.config.run.folder
    write_checkpoint(folder, build_seeded_method(loaded.config, CPU), step=12)
    write_checkpoint(folder, changed(build_seeded_method(loaded.config, CPU), 1))
    (folder / "config.yaml").write_text(show(loaded))
    return folder


def test_without_arguments_knn_and_its_baselines_are_printed_and_written(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert fovea("eval", str(run)) == 0
    out = capsys.readouterr().out
    document = json.loads((run / "evaluations" / "step_000000024.json").read_text())
    assert (document["checkpoint"], document["step"], document["samples_seen"]) == ("step_000000024", 24, 384)
    scores = document["scores"]
    prefixes = ("", "baseline/random_init/", "baseline/pixels/")
    assert set(scores) == {f"{prefix}knn/k{k}" for prefix in prefixes for k in (1, 5)}
    for k in (1, 5):
        row = next(line for line in out.splitlines() if f" knn/k{k} " in line)
        assert [cell.strip() for cell in row.split("│")[2:-1]] == [
            f"{100 * scores[f'{prefix}knn/k{k}']:.1f} %" for prefix in prefixes
        ]
    assert all(title in out for title in ("trained", "random init", "pixels"))
    assert "after 384 samples: 20 queries, feature bank of 40 images, 10 classes; chance is 10.0 %" in out
    assert not (run / "evaluation.json").exists()


def test_a_checkpoint_and_an_output_file_may_be_named(run: Path, tmp_path: Path) -> None:
    older = run / "checkpoints" / "step_000000012"
    assert fovea("eval", str(older), "--only", "knn", "--baselines", "--output", str(tmp_path / "new" / "scores.json")) == 0
    document = json.loads((tmp_path / "new" / "scores.json").read_text())
    assert document == json.loads((run / "evaluations" / "step_000000012.json").read_text())
    assert document["scores"]["knn/k5"] == document["scores"]["baseline/random_init/knn/k5"], "the weights of the seed"


def test_named_evaluators_come_without_baselines(run: Path, tmp_path: Path) -> None:
    assert fovea("eval", str(run), "--knn", "--output", str(tmp_path / "scores.json")) == 0
    assert set(json.loads((tmp_path / "scores.json").read_text())["scores"]) == {"knn/k1", "knn/k5"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "nearest"], "there is no evaluator 'nearest'"),
        (["--segmentation"], "evaluation.segmentation.train_shards is required"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert fovea("eval", str(run), *words) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_the_summary_says_what_there_is() -> None:
    full = EvalResult("step_1", 10, 160_000, queries=10_000, bank=50_000, classes=10)
    assert summarize(full) == (
        "after 160,000 samples: 10,000 queries, feature bank of 50,000 images, 10 classes; chance is 10.0 %"
    )
    assert summarize(EvalResult("w", queries=20)) == "20 queries"
    assert summarize(EvalResult("step_1", 10, 160)) == "after 160 samples"
    assert summarize(EvalResult("w")) == ""
