"""Whole runs of CLIP on two ranks, one evaluated by everything and one by nothing; then exported, evaluated again, compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.data.pack import synthetic as scenes
from pipeline.tracking.journal import read
from tests.helpers.commands import fovea
from tests.helpers.runs import TOY, recorded, train, weights

pytestmark = pytest.mark.slow

RECIPE = """
method:
  name: clip
  views: {global_size: 32}
  embed_dim: 16
  patch_dropout: 0.25
  text: {architecture: null, width: 16, depth: 1, num_heads: 2, context_length: 16}
"""
EVERYTHING = [
    "evaluation.knn.enabled=true",
    "evaluation.knn.k=[3]",
    "evaluation.linear={enabled: true, every: 4 steps, learning_rates: [1.0, 10.0], layers: [1], epochs: 6, batch_size: 8}",
    "evaluation.logistic={enabled: true, every: 4 steps, C: [1.0]}",
    "evaluation.retrieval={enabled: true, every: 2 steps}",
    "evaluation.robustness={enabled: true, every: 4 steps, epochs: 1, k: 3}",
    "evaluation.knn.every=2 steps",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The evaluated one and the other."""
    folder = tmp_path_factory.mktemp("evaluated")
    scenes.write(folder / "scenes", train=48, val=20, size=32, seed=3)
    toy = TOY[: TOY.index("method:")] + RECIPE + TOY[TOY.index("model:") :]
    toy = toy.replace("model: {", "model: {layer_scale: 1.0, ")  # or all features are alike
    (folder / "toy.yaml").write_text(toy.replace("train: {", "train: {zero_stage: 2, "))
    classes = sorted({scenes.render(3, number, 32).label for number in range(60)})
    (folder / "classes.txt").write_text("\n".join(f"thing {number}" for number in range(max(classes) + 1)))
    evaluated = [
        *EVERYTHING,
        f"evaluation.zeroshot={{enabled: true, every: 4 steps, class_names: {folder}/classes.txt}}",
        f"evaluation.knn.val_shards={folder}/scenes/*val-*.tar",
        "checkpoint.keep_best=linear/top1",
    ]
    for name, overrides in (("evaluated", evaluated), ("plain", [])):
        shards = f"{folder}/scenes/*train-*.tar"
        words = ["train.duration=6 steps", "checkpoint.every=3 steps", "checkpoint.keep_last=9", *overrides]
        done = train(folder / "toy.yaml", shards, folder / name, *words)
        assert done.returncode == 0, done.stderr + done.stdout
    return folder / "evaluated", folder / "plain"


def scored(run: Path) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for _, record in read(next((run / "tracking").glob("journal-*.jsonl"))):
        if record["kind"] == "metrics":
            for name, value in record["values"].items():
                found.setdefault(name, {})[record["step"]] = value
    return found


def artifacts(run: Path) -> set[str]:
    """Pictures that are to be sent to MLflow."""
    records = [record for _, record in read(next((run / "tracking").glob("journal-*.jsonl")))]
    return {Path(record["path"]).name for record in records if record["kind"] == "artifact"} & {
        path.name for path in (run / "pictures").iterdir()
    }


def test_evaluations_change_no_batch_and_no_weight(runs: tuple[Path, Path]) -> None:
    evaluated, plain = runs
    for rank in (0, 1):
        assert recorded(evaluated, rank) == recorded(plain, rank)
    assert weights(evaluated, 6) == weights(plain, 6)


def test_a_run_with_sharded_weights_has_the_same_scores(runs: tuple[Path, Path], tmp_path: Path) -> None:
    """ZeRO 3 holds no tower whole: all ranks have to make the same passes."""
    folder, run = runs[0].parent, tmp_path / "cut"
    words = [
        "train.duration=2 steps",
        "schedule.lr.warmup=1 steps",
        "train.zero_stage=3",
        *(word for word in EVERYTHING if "robustness" not in word),
        f"evaluation.zeroshot={{enabled: true, every: 4 steps, class_names: {folder}/classes.txt}}",
        f"evaluation.knn.val_shards={folder}/scenes/*val-*.tar",
    ]
    done = train(folder / "toy.yaml", f"{folder}/scenes/*train-*.tar", run, *words)
    assert done.returncode == 0, done.stderr + done.stdout
    whole, cut = scored(runs[0]), scored(run)
    for name in ("knn/k3", "linear/top1", "logistic/top1", "zeroshot/top1", "retrieval/image_to_text/recall@5"):
        assert cut[name][0] == pytest.approx(whole[name][0], abs=1e-6), name
    assert cut["knn/k3"].keys() == {0, 2}


def test_each_evaluator_runs_at_its_own_steps(runs: tuple[Path, Path]) -> None:
    scores = scored(runs[0])
    steps = {name: sorted(points) for name, points in scores.items()}
    assert steps["knn/k3"] == steps["retrieval/image_to_text/recall@1"] == [0, 2, 4, 6]
    assert steps["linear/top1"] == steps["logistic/top1"] == steps["zeroshot/top1"] == steps["robustness/fooling"] == [0, 4, 6]
    assert steps["baseline/random_init/knn/k3"] == steps["baseline/pixels/knn/k3"] == [0]
    assert steps["baseline/random_init/linear/top1"] == [0]
    best = json.loads((runs[0] / "checkpoints" / "best.json").read_text())
    assert best["metric"] == "linear/top1"
    sheets = {f"{name}-{n:09d}.png" for n in (0, 2, 4, 6) for name in ("pca", "attention", "retrieval")}
    assert {path.name for path in (runs[0] / "pictures").iterdir()} == sheets == artifacts(runs[0])
    assert best["score"] == max(scores["linear/top1"][step] for step in (4, 6))


def test_eval_has_the_scores_of_training(runs: tuple[Path, Path], tmp_path: Path) -> None:
    evaluated = runs[0]
    out = tmp_path / "scores.json"
    flags = ["--knn", "--linear", "--logistic", "--retrieval", "--zeroshot", str(evaluated.parent / "classes.txt")]
    assert fovea("eval", str(evaluated), *flags, "--output", str(out), "launch.backend=gloo") == 0
    found: dict[str, float] = json.loads(out.read_text())["scores"]
    expected = scored(evaluated)
    for name in ("knn/k3", "linear/top1", "logistic/top1", "retrieval/text_to_image/recall@5", "zeroshot/mean_per_class"):
        assert found[name] == pytest.approx(expected[name][6], abs=1e-6), name


def test_watching_evaluates_every_checkpoint_once_and_ends_with_the_run(
    runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    plain = runs[1]
    words = ["eval", str(plain), "--knn", "--watch", f"evaluation.knn.val_shards={plain.parent}/scenes/*val-*.tar"]
    assert fovea(*words) == 0
    found = {file.stem: json.loads(file.read_text()) for file in (plain / "evaluations").glob("*.json")}
    assert {name: row["step"] for name, row in found.items()} == {"step_000000003": 3, "step_000000006": 6}
    capsys.readouterr()
    assert fovea(*words) == 0
    assert "Scores of" not in capsys.readouterr().out


@pytest.mark.parametrize("layout", ["timm", "huggingface", "open_clip"])
def test_an_export_scores_as_its_run_does(runs: tuple[Path, Path], layout: str, tmp_path: Path) -> None:
    evaluated = runs[0]
    folder, out = tmp_path / layout, tmp_path / "scores.json"
    assert fovea("export", str(evaluated), "--to", layout, "--out", str(folder)) == 0
    shards = [
        f"data.shards={evaluated.parent}/scenes/*train-*.tar",
        f"evaluation.knn.val_shards={evaluated.parent}/scenes/*val-*.tar",
    ]
    flags = ["--retrieval"] if layout == "open_clip" else ["--knn", "--logistic"]
    settings = ["evaluation.knn.k=[3]", "evaluation.logistic.C=[1.0]", "launch.backend=gloo"]
    assert fovea("eval", str(folder), *flags, "--output", str(out), *shards, *settings) == 0
    found: dict[str, Any] = json.loads(out.read_text())["scores"]
    expected = scored(evaluated)
    assert found and all(value == pytest.approx(expected[name][6], abs=1e-6) for name, value in found.items())


def test_the_report_holds_both_runs_and_fetches_nothing(runs: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "page" / "report.html"
    assert fovea("report", *map(str, runs), "--out", str(out)) == 0
    page = out.read_text()
    assert page.count("<svg") >= 5
    bare = page.replace("http://www.w3.org", "")
    assert "http:" not in bare and "https:" not in bare
    for expected in ("linear/top1", "evaluation.linear.enabled", "finished", "that are equal", "toy (plain)", "fingerprint"):
        assert expected in page, expected
    assert not torch.distributed.is_initialized()
