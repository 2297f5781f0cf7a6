"""Runs that are guided by metadata: resumed bit for bit, checked before they begin, and as `fovea adapt` writes them."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pipeline.data.pack import synthetic as scenes
from pipeline.models.settings import ModelSettings
from pipeline.models.vision import build_tower
from tests.helpers.commands import fovea
from tests.helpers.limits import LONG
from tests.helpers.runs import TOY, command, processes_of, recorded, started_and_held, train, wait_for_step, weights

STEPS = 4
GROUND: dict[str, Any] = {"name": "ground", "direction": "discourage", "values": list(scenes.GROUNDS[1:])}
CLASS: dict[str, Any] = {"name": "label", "direction": "encourage", "values": list(range(10))}
SETTINGS = (
    "train.zero_stage=2",
    "train.micro_batch_size=4",
    f"train.duration={STEPS} steps",
    "checkpoint.every=2 steps",
    "checkpoint.keep_last=9",
    "schedule.lr.warmup=1 steps",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("guided")
    scenes.write(folder / "scenes", train=160, val=0, size=32, seed=3, samples_per_shard=80)
    (folder / "toy.yaml").write_text(TOY)
    return folder / "toy.yaml", str(folder / "scenes" / "*train-*.tar")


def guided(*columns: dict[str, Any]) -> str:
    return f"guidance={json.dumps({'columns': columns})}"


@pytest.mark.slow
def test_a_guided_run_is_resumed_bit_for_bit(data: tuple[Path, str], tmp_path: Path) -> None:
    config, shards = data
    settings = (*SETTINGS, guided(GROUND, CLASS))
    whole, resumed = tmp_path / "whole" / "run", tmp_path / "resumed" / "run"
    done = train(config, shards, whole, *settings)
    assert done.returncode == 0, done.stderr + done.stdout
    lines = [json.loads(line) for line in next((whole / "tracking").glob("journal-*.jsonl")).read_text().splitlines()]
    values = [line["values"] for line in lines if line["kind"] == "metrics" and "train/loss" in line["values"]]
    terms = {"train/discourage_ground", "train/encourage_label", "train/ground_missing", "train/ground_variance_share"}
    assert terms <= values[-1].keys()
    assert sum(one["train/ground_missing"] for one in values) > 0, "the first ground is not declared"
    assert not any(one["train/label_missing"] for one in values)
    shutil.copytree(whole, resumed, ignore=shutil.ignore_patterns(f"step_{STEPS:09d}", "batches", "catalog*"))
    done = train(config, shards, resumed, *settings)
    assert done.returncode == 0, done.stderr + done.stdout
    assert sorted(recorded(resumed, 0)) == [2, 3]
    assert weights(resumed, STEPS) == weights(whole, STEPS)

    killed = tmp_path / "killed" / "run"
    launcher = started_and_held(command(config, shards, killed, *settings, "checkpoint.async_save=false"), 3)
    wait_for_step(killed, 2, launcher)
    os.kill(processes_of(killed)[0], signal.SIGKILL)
    assert launcher.wait(LONG) != 0
    done = train(config, shards, killed, *settings)
    assert done.returncode == 0 and "resuming at step 2" in done.stdout, done.stderr + done.stdout
    assert weights(killed, STEPS) == weights(whole, STEPS)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (
            {**GROUND, "name": "scanner"},
            ("no column 'scanner'", "there are 'caption', 'class_name', 'ground', 'label'", "Choose one"),
        ),
        ({**GROUND, "values": ["a", "b"]}, ("none of the values of 'ground'", *map(repr, scenes.GROUNDS))),
    ],
    ids=["column", "values"],
)
def test_a_column_that_is_not_there_is_refused_by_the_check_and_the_run(
    data: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], column: dict[str, Any], message: tuple[str, ...]
) -> None:
    config, shards = data
    words = (str(config), f"data.shards={shards}", f"data.index={tmp_path / 'index'}", guided(column))
    for verb in (("config", "check"), ("train",)):
        assert fovea(*verb, *words, f"run.directory={tmp_path / 'run'}") == 2
        said = " ".join(capsys.readouterr().err.split())
        assert all(part in said for part in message), said
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_the_check_accepts_what_is_there_and_reads_nothing_without_columns(data: tuple[Path, str], tmp_path: Path) -> None:
    config, shards = data
    index = f"data.index={tmp_path / 'index'}"
    assert fovea("config", "check", str(config), "data.shards=nowhere-*.tar", index) == 0
    assert not (tmp_path / "index").exists()
    assert fovea("config", "check", str(config), f"data.shards={shards}", index, guided(GROUND)) == 0


@pytest.fixture
def start(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    tower = build_tower(ModelSettings(embed_dim=64, depth=1, num_heads=1, patch_size=8), image_size=32)
    torch.save(tower.vit.state_dict(), tmp_path / "start.pth")
    return tmp_path / "start.pth"


def test_adapt_lists_the_values_of_columns(data: tuple[Path, str], tmp_path: Path, start: Path) -> None:
    words = ("adapt", data[1], "--from", start, "--to", tmp_path / "run", "--config-only", f"data.index={tmp_path / 'index'}")
    assert fovea(*words, "--discourage", "ground", "--encourage", "class_name") == 0
    text = (tmp_path / "run" / "adapt.yaml").read_text()
    columns = yaml.safe_load(text)["guidance"]["columns"]
    assert [(one["name"], one["direction"]) for one in columns] == [("ground", "discourage"), ("class_name", "encourage")]
    assert columns[0]["values"] == sorted(scenes.GROUNDS) and columns[1]["values"] == sorted(scenes.CLASS_NAMES)
    (reason,) = [line for line in text.splitlines() if line.startswith("#   guidance.columns")]
    assert "values seen in 160 of 160 samples" in reason


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--discourage", "scanner"), "no column 'scanner'"),
        (("--discourage", "caption"), "'caption' has 1"),
        (("--discourage", "ground", "--encourage", "ground"), "named 2 times"),
        (("--discourage", "ground", "guidance.momentum=0.5"), "guidance is set"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_adapt_refuses_columns_that_cannot_guide(
    data: tuple[Path, str],
    tmp_path: Path,
    start: Path,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    message: str,
) -> None:
    (tmp_path / "shards").mkdir()
    code = fovea("adapt", data[1], "--from", start, "--to", tmp_path / "run", f"data.index={tmp_path / 'index'}", *options)
    said = " ".join(capsys.readouterr().err.split())
    assert code == 2 and message in said, said
    assert not (tmp_path / "run").exists()
