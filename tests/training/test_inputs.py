"""What is refused about the data before a rank starts, and where an index is kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import load
from pipeline.data import scenes
from pipeline.errors import ConfigError, DataError
from pipeline.settings import Config
from pipeline.training.inputs import prepare
from tests.runs import TOY


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    scenes.write(folder, train=40, val=10, size=32, samples_per_shard=20)
    return folder


def settings(shards: Path, folder: Path, *overrides: str) -> Config:
    (folder / "toy.yaml").write_text(TOY)
    words = [f"data.shards={shards}/scenes-train-*.tar", f"data.index={folder / 'index'}"]
    return load(folder / "toy.yaml", [*words, *overrides]).config


def test_a_run_without_evaluation_reads_its_training_shards_only(shards: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    inputs = prepare(settings(shards, tmp_path), 2, lambda done, total, _: told.append((done, total)))
    assert (inputs.train.total, inputs.bank, inputs.queries) == (40, None, None)
    assert (inputs.order.total, inputs.order.lanes, inputs.order.global_batch, inputs.order.seed) == (40, 4, 16, 7)
    assert told == [(1, 2), (2, 2)]


def test_the_bank_is_the_training_set_unless_another_is_named(shards: Path, tmp_path: Path) -> None:
    knn = ["evaluation.knn.enabled=true", f"evaluation.knn.val_shards={shards}/scenes-val-*.tar"]
    inputs = prepare(settings(shards, tmp_path, *knn), 2)
    assert inputs.bank is inputs.train
    assert inputs.queries is not None
    assert inputs.queries.total == 10
    other = prepare(settings(shards, tmp_path, *knn, f"evaluation.knn.train_shards={shards}/scenes-train-00001.tar"), 2)
    assert other.bank is not None
    assert other.bank.total == 20


def test_each_set_of_shards_has_a_folder_of_its_own_below_the_index(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(shards, tmp_path)
    urls = [f"{shards}/scenes-train-00000.tar", f"{shards}/scenes-train-00001.tar"]
    folder = config.data.index_folder(urls)
    assert folder.parent == tmp_path / "index"
    prepare(config, 2)
    assert (folder / "manifest.json").exists()
    assert config.data.index_folder(urls[:1]) != folder
    monkeypatch.chdir(shards)
    assert config.data.index_folder([Path(url).name for url in urls]) == folder
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    free = config.data.model_copy(update={"index": None})
    assert free.index_folder(urls) == tmp_path / "cache" / "fovea" / "index" / folder.name


def test_an_index_is_built_once(shards: Path, tmp_path: Path) -> None:
    config = settings(shards, tmp_path)
    prepare(config, 2)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "index").rglob("*.npz")}
    assert len(before) == 2
    prepare(config, 2)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "index").rglob("*.npz")} == before


def test_numbers_that_do_not_divide_are_refused_with_those_that_do(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="3 ranks cannot share 4 lanes"):
        prepare(settings(shards, tmp_path), 3)
    with pytest.raises(ConfigError, match="16 samples do not divide by 2 ranks times 3") as caught:
        prepare(
            settings(shards, tmp_path, "launch.ranks=1", "train.micro_batch=4").replace(
                train=settings(shards, tmp_path).train.model_copy(update={"micro_batch": 3})
            ),
            2,
        )
    assert caught.value.where == "train.micro_batch"
    assert "divisor of 8" in caught.value.mend


def test_no_shards_few_samples_and_no_place_for_the_index_are_refused(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        prepare(settings(shards, tmp_path, f"data.shards={shards}/none-*.tar"), 2)
    with pytest.raises(DataError, match="40 usable samples are fewer than one global batch of 64"):
        prepare(settings(shards, tmp_path, "train.global_batch=64"), 2)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be kept here") as caught:
        prepare(settings(shards, tmp_path, f"data.index={tmp_path / 'file'}"), 2)
    assert "data.index" in caught.value.mend
