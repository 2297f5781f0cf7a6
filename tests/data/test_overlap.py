"""Nothing is evaluated that is learned from, whatever the shards are called and however they are named."""

from __future__ import annotations

import os
import shutil
import tarfile
from pathlib import Path

import pytest

from pipeline.config.load import load
from pipeline.config.schema import Config
from pipeline.data.inputs import evaluation_data, prepare
from pipeline.data.pack import synthetic as scenes
from pipeline.errors import DataError
from tests.helpers.runs import TOY

KNN = "evaluation.knn.enabled=true"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    scenes.write(folder, train=40, val=10, size=32, samples_per_shard=20)
    return folder


@pytest.fixture
def shards(made: Path, tmp_path: Path) -> Path:
    """``train-00000.tar``, ``train-00001.tar`` and ``val-00000.tar``."""
    folder = tmp_path / "data"
    folder.mkdir()
    for file in made.glob("*.tar"):
        shutil.copy(file, folder / file.name.removeprefix("scenes-"))
    return folder


def settings(folder: Path, *overrides: str) -> Config:
    (folder / "toy.yaml").write_text(TOY)
    return load(folder / "toy.yaml", [f"data.index={folder / 'index'}", *overrides]).config


def repack(source: Path, target: Path, *, keep: int | None = None, rename: str = "") -> None:
    """The same samples in another tar: other sizes, offsets, keys and order."""
    with tarfile.open(source) as old, tarfile.open(target, "w") as new:
        members = old.getmembers()
        keys = list(dict.fromkeys(member.name.partition(".")[0] for member in members))[::-1]
        for key in keys[:keep]:
            for member in members:
                if member.name.partition(".")[0] == key:
                    file = old.extractfile(member)
                    member.name = rename + member.name
                    new.addfile(member, file)


def link(folder: Path, kind: str) -> str:
    """A pattern of training shards among which the validation shard is, under another name."""
    other = folder / "more"
    other.mkdir()
    for name in ("train-00000.tar", "train-00001.tar"):
        shutil.copy(folder / name, other / name)
    target, source = other / "extra.tar", folder / "val-00000.tar"
    {"copy": shutil.copy, "symbolic link": lambda a, b: b.symlink_to(a), "hard link": os.link, "repacked": repack}[kind](
        source, target
    )
    return f"{other}/*.tar"


@pytest.mark.parametrize("name", ["knn", "linear", "logistic", "robustness"])
def test_a_pattern_that_holds_the_validation_shards_is_refused_for_each_evaluation_with_labels(shards: Path, name: str) -> None:
    config = settings(shards, f"data.shards={shards}/*.tar", f"evaluation.{name}.enabled=true")
    with pytest.raises(DataError, match=r"1 of 1 evaluated shards are also learned from: .*/val-00000\.tar") as caught:
        prepare(config, 1)
    assert "evaluation.knn.val_shards, by default" in caught.value.where and "train-" in caught.value.hint


@pytest.mark.parametrize(
    "patterns",
    [
        "{0}",  # a folder
        "{0}/{{train-00000,train-00001,val-00000}}.tar",
        "['{0}/train-*.tar', '{0}/../data/val-00000.tar']",
        "['{0}/train-*.tar', 'file://{0}/val-00000.tar']",
    ],
)
def test_so_is_a_folder_a_brace_range_and_a_detour(shards: Path, patterns: str) -> None:
    config = settings(shards, f"data.shards={patterns.format(shards)}", KNN, f"evaluation.knn.val_shards={shards}/val-*.tar")
    with pytest.raises(DataError, match="also learned from"):
        prepare(config, 1)


@pytest.mark.parametrize("kind", ["copy", "symbolic link", "hard link", "repacked"])
def test_so_is_the_same_data_under_another_name(shards: Path, kind: str) -> None:
    knn = [KNN, f"evaluation.knn.val_shards={shards}/val-*.tar"]
    with pytest.raises(DataError, match="also learned from"):
        prepare(settings(shards, f"data.shards={link(shards, kind)}", *knn), 1)


def test_so_are_data_sets_that_are_mixed_and_voters_of_their_own(shards: Path) -> None:
    mixed = f"data.sources=[{{name: a, shards: '{shards}/train-*.tar'}}, {{name: b, shards: '{shards}/val-*.tar'}}]"
    with pytest.raises(DataError, match="also learned from"):
        prepare(settings(shards, mixed, KNN, f"evaluation.knn.val_shards={shards}/val-0*.tar"), 1)
    own = [f"data.shards={shards}/train-*.tar", KNN, f"evaluation.knn.train_shards={shards}/*.tar"]
    with pytest.raises(DataError, match="also learned from") as caught:
        prepare(settings(shards, *own), 1)
    assert "evaluation.knn.train_shards" in caught.value.hint


def test_a_command_that_evaluates_by_hand_refuses_it_too(shards: Path) -> None:
    config = settings(shards, f"data.shards={shards}/*.tar", KNN)
    with pytest.raises(DataError, match="also learned from"):
        evaluation_data(config)


@pytest.mark.parametrize("name", ["retrieval", "zeroshot"])
def test_captions_that_were_trained_on_are_not_searched_for(shards: Path, name: str) -> None:
    from pipeline.evaluation.standalone import settings_for_weights

    words = [f"data.shards={shards}/*.tar", f"data.index={shards}/index", f"evaluation.{name}.enabled=true"]
    words += [f"evaluation.zeroshot.class_names={shards}/classes.txt"]
    config = settings_for_weights(words)
    with pytest.raises(DataError, match="also trained on"):
        evaluation_data(config, trained=True)
    assert evaluation_data(config)["queries"].total == 10  # weights from elsewhere did not see them


def test_nor_when_others_vote_as_far_as_the_training_shards_are_here(shards: Path) -> None:
    from pipeline.evaluation.standalone import settings_for_weights

    words = [
        f"data.index={shards}/index",
        "evaluation.retrieval.enabled=true",
        f"evaluation.knn.train_shards={shards}/train-*.tar",
    ]
    words += [f"evaluation.knn.val_shards={shards}/val-*.tar"]
    with pytest.raises(DataError, match="also trained on"):
        evaluation_data(settings_for_weights([f"data.shards={shards}/*.tar", *words]), trained=True)
    away = settings_for_weights([f"data.shards={shards}/away-*.tar", *words])
    assert evaluation_data(away, trained=True)["queries"].total == 10


def test_segmentation_has_its_own_pair(shards: Path, tmp_path: Path) -> None:
    scenes.write(tmp_path / "dense", train=8, val=4, size=32, samples_per_shard=4)
    train = sorted((tmp_path / "dense").glob("*train-*.tar"))
    shutil.copy(train[0], tmp_path / "held-out.tar")
    pair = f"train_shards: '{tmp_path}/dense/*train-*.tar', val_shards: '{tmp_path}/held-out.tar', num_classes: 4"
    config = settings(shards, f"data.shards={shards}/train-*.tar", f"evaluation.segmentation={{enabled: true, {pair}}}")
    with pytest.raises(DataError, match="1 of 1 evaluated shards") as caught:
        prepare(config, 1)
    assert caught.value.where == "evaluation.segmentation.val_shards"


def test_a_few_single_duplicates_are_reported_and_many_refused(shards: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copy(shards / "train-00000.tar", shards / "held-out.tar")
    knn = [KNN, f"evaluation.knn.val_shards=['{shards}/val-*.tar', '{shards}/more.tar']"]
    repack(shards / "train-00000.tar", shards / "more.tar", keep=3, rename="x")
    with pytest.raises(DataError, match="3 of 13 evaluated samples are also learned from"):
        prepare(settings(shards, f"data.shards={shards}/train-*.tar", *knn), 1)
    scenes.write(shards / "large", train=20, val=300, size=16, samples_per_shard=300, seed=5)
    knn = [KNN, f"evaluation.knn.val_shards=['{shards}/large/*val-*.tar', '{shards}/more.tar']"]
    repack(shards / "train-00000.tar", shards / "more.tar", keep=1, rename="y")
    for _ in range(2):  # counted, then read from what was counted
        prepare(settings(shards, f"data.shards={shards}/train-*.tar", *knn), 1)
        assert "1 of 301 evaluated samples are also learned from" in capfd.readouterr().err


def test_shards_of_one_name_in_two_folders_are_two(shards: Path, tmp_path: Path) -> None:
    scenes.write(tmp_path / "other", train=20, val=10, size=32, samples_per_shard=20, seed=9)
    (tmp_path / "val").mkdir()
    shutil.copy(next((tmp_path / "other").glob("*val-*.tar")), tmp_path / "val" / "train-00000.tar")
    knn = [KNN, f"evaluation.knn.val_shards={tmp_path}/val"]
    inputs = prepare(settings(shards, f"data.shards={shards}/train-*.tar", *knn), 1)
    assert inputs.queries is not None and inputs.queries.total == 10
