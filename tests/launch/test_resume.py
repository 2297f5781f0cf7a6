"""What an attempt starts from: the newest whole checkpoint of the same run over the same data, or a sentence why not."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launch.resume import check_identity, choose_checkpoint, chosen_again, origins
from pipeline.checkpoint.files import entry
from pipeline.config.load import load
from pipeline.config.schema import Config
from pipeline.data.inputs import Inputs, data_identity, prepare
from pipeline.data.pack import synthetic as scenes
from pipeline.errors import CheckpointError
from pipeline.runtime.run_directory import RunDirectory
from tests.helpers.runs import TOY


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    scenes.write(folder, train=60, val=1, size=32, samples_per_shard=20)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "toy.yaml"
    path.write_text(TOY)
    return path


def settings(text: Path, shards: Path, *overrides: str) -> Config:
    folder = text.parent
    words = [f"data.shards={shards}/scenes-train-*.tar", f"run.directory={folder / 'run'}", f"data.index={folder / 'index'}"]
    return load(text, [*words, *overrides]).config


@pytest.fixture
def config(text: Path, shards: Path) -> Config:
    return settings(text, shards)


@pytest.fixture
def inputs(config: Config) -> Inputs:
    return prepare(config, 2)


@pytest.fixture
def run(config: Config) -> RunDirectory:
    return RunDirectory(config.run.folder)


def save(folder: Path, step: int, config: Config, inputs: Inputs, **changes: Any) -> Path:
    """A checkpoint with a small file where the tensors would be."""
    path = folder / f"step_{step:09d}"
    path.mkdir(parents=True)
    (path / "rank_00000.safetensors").write_bytes(b"tensors" * step)
    manifest = {
        "format": 1,
        "step": step,
        "config": config.model_dump(mode="json"),
        "data": {**data_identity(inputs), "samples": inputs.train.total},
        "files": [entry(path / "rank_00000.safetensors")],
        **changes,
    }
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def test_a_new_run_starts_from_nothing(config: Config, inputs: Inputs, run: RunDirectory) -> None:
    assert choose_checkpoint(config, run, inputs) == (None, [])


def test_the_newest_is_taken(config: Config, inputs: Inputs, run: RunDirectory) -> None:
    for step in (10, 9, 100):
        save(run.checkpoints, step, config, inputs)
    found, complaints = choose_checkpoint(config, run, inputs)
    assert found is not None
    assert (found.step, complaints) == (100, [])


def test_a_damaged_one_is_passed_over_and_told(config: Config, inputs: Inputs, run: RunDirectory) -> None:
    save(run.checkpoints, 10, config, inputs)
    (save(run.checkpoints, 20, config, inputs) / "rank_00000.safetensors").write_bytes(b"tensors")
    found, (complaint,) = choose_checkpoint(config, run, inputs)
    assert found is not None
    assert found.step == 10
    assert "step_000000020" in complaint


def test_a_changed_setting_is_refused_by_its_key(
    text: Path, shards: Path, config: Config, inputs: Inputs, run: RunDirectory
) -> None:
    save(run.checkpoints, 10, config, inputs)
    changed = settings(text, shards, "schedule.lr.peak=2e-2", "method.prototypes=64")
    with pytest.raises(CheckpointError) as caught:
        choose_checkpoint(changed, run, inputs)
    assert "schedule.lr.peak was 0.01 and is 0.02" in caught.value.what
    assert "method.prototypes was 32 and is 64" in caught.value.what
    assert "step_000000010" in caught.value.where


def test_a_setting_that_does_not_touch_the_mathematics_may_change(
    text: Path, shards: Path, config: Config, inputs: Inputs, run: RunDirectory
) -> None:
    save(run.checkpoints, 10, config, inputs)
    changed = settings(text, shards, "data.num_workers=2", "train.log_every=5", "checkpoint.keep_last=5", "tracking.enabled=true")
    found, _ = choose_checkpoint(changed, run, inputs)
    assert found is not None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fingerprint", "0123"),
        ("seed", 8),
        ("global_batch", 32),
        ("lanes", 2),
        ("block", 128),
        ("plan", 0),
        ("version", 0),
        ("channels", [2, "uint16", [], "full"]),
    ],
)
def test_changed_data_are_refused_by_what_changed(
    config: Config, inputs: Inputs, run: RunDirectory, name: str, value: object
) -> None:
    save(run.checkpoints, 10, config, inputs, data={**data_identity(inputs), "samples": 60, name: value})
    with pytest.raises(CheckpointError, match=re.escape(f"{name} was {value!r} and is")) as caught:
        choose_checkpoint(config, run, inputs)
    assert "60 samples" in caught.value.hint


def test_another_set_of_shards_is_other_data(text: Path, shards: Path, config: Config, inputs: Inputs, run: RunDirectory) -> None:
    save(run.checkpoints, 10, config, inputs)
    fewer = settings(text, shards, f"data.shards={shards}/scenes-train-00000.tar")
    with pytest.raises(CheckpointError, match="fingerprint"):
        choose_checkpoint(fewer, run, prepare(fewer, 2))


def test_the_same_shards_elsewhere_are_the_same_data(
    text: Path, shards: Path, config: Config, inputs: Inputs, run: RunDirectory, tmp_path: Path
) -> None:
    save(run.checkpoints, 10, config, inputs)
    (tmp_path / "moved").symlink_to(shards)
    moved = settings(text, tmp_path / "moved")
    found, _ = choose_checkpoint(moved, run, prepare(moved, 2))
    assert found is not None


def test_never_means_that_nothing_is_there(text: Path, shards: Path, config: Config, inputs: Inputs, run: RunDirectory) -> None:
    never = settings(text, shards, "checkpoint.resume=never")
    assert choose_checkpoint(never, run, inputs) == (None, [])
    save(run.checkpoints, 10, config, inputs)
    with pytest.raises(CheckpointError, match=r"checkpoint\.resume=never") as caught:
        choose_checkpoint(never, run, inputs)
    assert "run.directory" in caught.value.hint


def test_a_start_within_a_launch_goes_on_with_what_it_has_written_though_it_began_from_nothing(
    text: Path, shards: Path, inputs: Inputs, run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    never = settings(text, shards, "checkpoint.resume=never", f"checkpoint.mirror={tmp_path / 'mirror'}")
    monkeypatch.setattr("launch.resume.copies.fetch", lambda *_: pytest.fail("a mirrored copy is that of another run"))
    assert chosen_again(never, run, inputs, None) is None
    save(run.checkpoints, 10, never, inputs)
    again = chosen_again(never, run, inputs, None)
    assert again is not None and again.step == 10


def test_a_snapshot_with_as_many_steps_spares_the_check_of_the_checkpoint(
    config: Config, inputs: Inputs, run: RunDirectory, tmp_path: Path
) -> None:
    snapshots = tmp_path / "memory"
    on_disk = save(run.checkpoints, 10, config, inputs)
    (on_disk / "rank_00000.safetensors").write_bytes(b"damaged")
    save(snapshots, 10, config, inputs)
    again = chosen_again(config, run, inputs, snapshots)
    assert again is not None and again.path.parent == snapshots
    save(run.checkpoints, 12, config, inputs)
    again = chosen_again(config, run, inputs, snapshots)
    assert again is not None and again.path.parent == run.checkpoints and again.step == 12
    (save(snapshots, 14, config, inputs) / "rank_00000.safetensors").write_bytes(b"damaged")
    again = chosen_again(config, run, inputs, snapshots)
    assert again is not None and again.step == 12


def test_a_path_names_one_checkpoint_of_any_run(
    text: Path, shards: Path, config: Config, inputs: Inputs, run: RunDirectory, tmp_path: Path
) -> None:
    save(run.checkpoints, 100, config, inputs)
    chosen = save(tmp_path / "copies", 10, config, inputs)
    named = settings(text, shards, f"checkpoint.resume={chosen}")
    found, _ = choose_checkpoint(named, run, inputs)
    assert found is not None
    assert found.path == chosen
    (chosen / "rank_00000.safetensors").write_bytes(b"other")
    with pytest.raises(CheckpointError, match="damaged"):
        choose_checkpoint(named, run, inputs)
    nowhere = settings(text, shards, f"checkpoint.resume={tmp_path}")
    with pytest.raises(CheckpointError, match="manifest cannot be read") as caught:
        choose_checkpoint(nowhere, run, inputs)
    assert "step_" in caught.value.hint


def test_a_path_is_where_the_run_begins_and_what_came_of_it_is_gone_on_with(
    text: Path, shards: Path, config: Config, inputs: Inputs, run: RunDirectory, tmp_path: Path
) -> None:
    start = save(tmp_path / "other", 10, config, inputs)
    save(run.checkpoints, 50, config, inputs, serial=1)  # of the run's own, but it did not come of that one
    named = settings(text, shards, f"checkpoint.resume={start}")
    found, complaints = choose_checkpoint(named, run, inputs)
    assert found is not None
    assert (found.path, complaints) == (start, [])
    lineage = origins(found, named)
    assert lineage == [{"id": found.id, "path": str(start)}]

    for step, serial in ((20, 2), (30, 3)):
        save(run.checkpoints, step, config, inputs, serial=serial, origins=lineage)
    found, (told,) = choose_checkpoint(named, run, inputs)
    assert found is not None
    assert found.step == 30
    assert "resuming from" in told
    assert origins(found, named) == lineage, "an attempt that goes on begins nothing"
    found, _ = choose_checkpoint(config, run, inputs)
    assert found is not None
    assert found.step == 30, "auto takes what was written last, not what is furthest"

    (run.checkpoints / "step_000000030" / "rank_00000.safetensors").write_bytes(b"")
    found, complaints = choose_checkpoint(named, run, inputs)
    assert found is not None
    assert found.step == 20
    assert "damaged" in complaints[0]

    for file in start.iterdir():
        file.unlink()
    found, _ = choose_checkpoint(named, run, inputs)
    assert found is not None
    assert found.step == 20, "what it was begun with may be gone by now"


def test_another_checkpoint_at_the_same_path_is_another_beginning(
    text: Path, shards: Path, config: Config, inputs: Inputs, run: RunDirectory, tmp_path: Path
) -> None:
    start = save(tmp_path / "other", 10, config, inputs)
    named = settings(text, shards, f"checkpoint.resume={start}")
    lineage = [{"id": "of another", "path": str(start)}]
    save(run.checkpoints, 20, config, inputs, serial=1, origins=lineage)
    found, complaints = choose_checkpoint(named, run, inputs)
    assert found is not None
    assert (found.path, complaints) == (start, [])


def test_a_run_without_checkpoints_fetches_its_newest_copy(
    text: Path, shards: Path, config: Config, inputs: Inputs, run: RunDirectory, tmp_path: Path
) -> None:
    copied = settings(text, shards, f"checkpoint.mirror={tmp_path / 'copies'}")
    assert choose_checkpoint(copied, run, inputs) == (None, [])
    for step in (10, 20):
        save(tmp_path / "copies" / "toy", step, config, inputs)
    found, (told,) = choose_checkpoint(copied, run, inputs)
    assert found is not None
    assert found.path == run.checkpoints / "step_000000020"
    assert "fetched" in told
    save(run.checkpoints, 15, config, inputs, serial=9)
    found, _ = choose_checkpoint(copied, run, inputs)
    assert found is not None
    assert found.step == 15, "what is here comes first"


def test_a_manifest_that_cannot_be_read_is_told_and_alone_it_refuses_to_start_anew(
    config: Config, inputs: Inputs, run: RunDirectory
) -> None:
    (save(run.checkpoints, 20, config, inputs) / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints is complete"):
        choose_checkpoint(config, run, inputs)
    save(run.checkpoints, 10, config, inputs)
    found, (told,) = choose_checkpoint(config, run, inputs)
    assert found is not None
    assert found.step == 10
    assert "step_000000020" in told


def test_only_damaged_ones_refuse_to_start_anew_in_silence(config: Config, inputs: Inputs, run: RunDirectory) -> None:
    (save(run.checkpoints, 10, config, inputs) / "rank_00000.safetensors").unlink()
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints is complete"):
        choose_checkpoint(config, run, inputs)


def test_settings_of_another_version_are_told_not_thrown(config: Config) -> None:
    old = {**config.model_dump(mode="json"), "cache": {"size": 3}}
    with pytest.raises(CheckpointError, match=r"cannot be read by this version.*cache"):
        check_identity(config, old, Path("config.json"))
    check_identity(config, config.model_dump(mode="json"), Path("config.json"))


def test_a_long_list_of_changes_is_cut(text: Path, shards: Path, config: Config) -> None:
    words = [
        "schedule.lr.peak=1",
        "optim.eps=1",
        "run.seed=3",
        "model.depth=2",
        "model.num_heads=4",
        "method.prototypes=64",
        "data.shuffle_block_size=65",
    ]
    with pytest.raises(CheckpointError) as caught:
        check_identity(settings(text, shards, *words), config.model_dump(mode="json"), Path("config.json"))
    assert caught.value.what.count(" was ") == 5
    assert caught.value.what.endswith("…)")


def test_all_of_the_order_is_in_the_identity(inputs: Inputs) -> None:
    other = replace(inputs, order=type(inputs.order)([30, 30], 9, 32, 8, 16))
    ours, theirs = data_identity(inputs), data_identity(other)
    assert {name for name in ours if ours[name] != theirs[name]} == {"seed", "global_batch", "lanes", "block"}
