"""A run with rectangular views: resumed bit for bit, evaluated, embedded and exported at its own and at other sizes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.data.pack import synthetic as scenes
from tests.helpers.runs import ROOT, TOY, environment, recorded, train, weights

STEPS = 4
SETTINGS = (
    f"train.duration={STEPS} steps",
    "checkpoint.every=2 steps",
    "checkpoint.keep_last=9",
    "schedule.lr.warmup=1 steps",
    "method.views.global_size=[16, 48]",
    "method.views.local_size=[16, 8]",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("rectangles")
    (folder / "toy.yaml").write_text(TOY)
    scenes.write(folder / "shards", train=64, val=16, size=48, samples_per_shard=64)
    return folder / "toy.yaml", str(folder / "shards" / "*train-*.tar")


@pytest.fixture(scope="module")
def reference(data: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("reference") / "run"
    done = train(*data, directory, *SETTINGS)
    assert done.returncode == 0, done.stderr + done.stdout
    return directory


def without_the_end(reference: Path, directory: Path) -> Path:
    shutil.copytree(reference, directory)
    shutil.rmtree(directory / "checkpoints" / f"step_{STEPS:09d}")
    return directory


def test_a_resume_is_exact_bit_for_bit(data: tuple[Path, str], reference: Path, tmp_path: Path) -> None:
    directory = without_the_end(reference, tmp_path / "run")
    done = train(*data, directory, *SETTINGS)
    assert done.returncode == 0 and "resuming at step 2" in done.stdout, done.stderr + done.stdout
    assert weights(directory, STEPS) == weights(reference, STEPS)
    for rank in range(2):
        assert recorded(directory, rank) == recorded(reference, rank)


@pytest.mark.parametrize(("key", "value"), [("global", "[48, 16]"), ("local", "16")])
def test_other_sizes_are_another_run(data: tuple[Path, str], reference: Path, tmp_path: Path, key: str, value: str) -> None:
    directory = without_the_end(reference, tmp_path / "run")
    done = train(*data, directory, *SETTINGS, f"method.views.{key}_size={value}")
    assert done.returncode != 0 and f"method.views.{key}_size was" in done.stderr + done.stdout


@pytest.mark.slow
def test_it_is_evaluated_embedded_and_exported(data: tuple[Path, str], reference: Path, tmp_path: Path) -> None:
    def fovea(*words: str | Path) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "launch.cli.main", *map(str, words)],
            capture_output=True,
            text=True,
            env=environment(),
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout

    shards = data[1].replace("train", "val")
    knn = (f"evaluation.knn.val_shards={shards}", "evaluation.knn.k=[3]", f"data.index={tmp_path}/index")
    assert "knn/k3" in fovea("eval", reference, *knn, "evaluation.knn.image_size=[32, 64]")
    fovea("embed", reference, shards, "--out", tmp_path / "own", f"data.index={tmp_path}/index")
    fovea("embed", reference, shards, "--out", tmp_path / "larger", "--size", "32x64", f"data.index={tmp_path}/index")
    sizes = [json.loads((tmp_path / name / "embeddings.json").read_text())["spec"]["image"]["size"] for name in ("own", "larger")]
    assert sizes == [[16, 48], [32, 64]]
    fovea("export", reference, "--to", "timm", "--out", tmp_path / "timm")
    scores = fovea("eval", tmp_path / "timm", "--knn", f"data.shards={data[1]}", *knn, "--output", tmp_path / "scores.json")
    assert "knn/k3" in scores and json.loads((tmp_path / "scores.json").read_text())["image_size"] == [16, 48]
    fovea("shards", "preview", reference / "config.yaml", "-o", tmp_path / "preview.html")
    assert "2 global views of 16 x 48 pixels" in (tmp_path / "preview.html").read_text()
