"""A folder of embeddings that is being written: what continues it, what it refuses, and that no interruption changes a byte."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import parquet

from pipeline.data.embeddings import table, work
from pipeline.data.embeddings.document import EmbeddedChannels, EmbeddingSpec, WeightsSpec
from pipeline.data.embeddings.reader import Embeddings
from pipeline.data.embeddings.work import BadSample, EmbeddingFolder, Unit, unit_size
from pipeline.data.index.build import build
from pipeline.data.index.manifest import Manifest
from pipeline.data.pack import synthetic as scenes
from pipeline.errors import ConfigError, DataError
from tests.helpers.embeddings import columns, content
from tests.helpers.runs import ROOT, environment

SPEC = EmbeddingSpec("cls", 4, "float32", weights=WeightsSpec("a", "a", "0" * 64), batch_size=4)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Shards of 10, 10 and 5 samples."""
    folder = tmp_path_factory.mktemp("scenes")
    scenes.write(folder, train=25, val=4, size=16, seed=3, samples_per_shard=10)
    return build([str(path) for path in sorted(folder.glob("*train-*.tar"))], folder / "index")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of eight samples."""
    monkeypatch.setattr(work, "_SAMPLES", 8)
    monkeypatch.setattr(work, "_VISIBLE", 0.0)


def embed(folder: EmbeddingFolder, units: list[Unit]) -> None:
    """Writes units; sample 3 of each shard is bad."""
    for unit in units:
        held = columns(SPEC, unit.shard, 10, skipped=(3,))
        inside = (held["row"] >= unit.first) & (held["row"] < unit.last)
        part = {
            name: [v for v, ok in zip(value, inside, strict=True) if ok] if name == "key" else value[inside]
            for name, value in held.items()
        }
        bad = [BadSample(3, "bad\udcff", "undecodable")] if unit.first <= 3 < unit.last else []
        folder.write_unit(unit, [part], bad)


def complete(directory: Path, manifest: Manifest) -> None:
    folder = EmbeddingFolder(directory, SPEC, manifest)
    assert folder.prepare() != "complete"
    units, waiting = folder.missing()
    embed(folder, units)
    for shard in sorted({*waiting, *(unit.shard for unit in units)}):
        folder.assemble(shard)
    folder.finish()
    folder.close()


def test_parts_are_full_batches_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    sizes = {unit_size(replace(SPEC, dim=dim, batch_size=size)) for dim in (1, 64, 1024) for size in (64, 256)}
    assert sizes == {2048}
    assert unit_size(replace(SPEC, batch_size=300)) == 1800 and unit_size(replace(SPEC, batch_size=5000)) == 5000
    large = replace(SPEC, pooling="patches", patches=256, dim=1024, batch_size=32)
    assert unit_size(large) == 64 and unit_size(replace(large, dtype="float16")) == 128


def test_a_folder_is_complete_with_its_bad_samples(manifest: Manifest, tmp_path: Path) -> None:
    complete(tmp_path / "out", manifest)
    embeddings = Embeddings.open(tmp_path / "out")
    assert [shard.rows for shard in embeddings.shards] == [9, 9, 4]
    assert embeddings.fingerprint == manifest.fingerprint
    assert [shard.digest for shard in embeddings.shards] == [shard.digest for shard in manifest.shards]
    for number in range(3):
        held = embeddings.read(number, ("row", "embedding"))
        expected = columns(SPEC, number, 10, skipped=(3,))
        assert held["row"].tolist() == [row for row in range(manifest.sizes[number]) if row != 3]
        assert np.array_equal(held["embedding"], expected["embedding"][: len(held["row"])])
    lines = [json.loads(line) for line in (tmp_path / "out" / "bad_samples.jsonl").read_text().splitlines()]
    assert lines == [{"key": "bad\\udcff", "shard": n, "row": 3, "reason": "undecodable"} for n in range(3)]
    assert sorted(os.listdir(tmp_path / "out")) == [
        *(shard.file for shard in embeddings.shards),
        "bad_samples.jsonl",
        "embeddings.json",
    ]
    assert EmbeddingFolder(tmp_path / "out", SPEC, manifest).prepare() == "complete"


class _Killed(BaseException):
    """Stands for SIGKILL before a change of the disk."""


@pytest.fixture
def changes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many changes of the disk are left before the process is killed; -1 for all."""
    left = [-1]

    def counted(function: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            if left[0] == 0:
                raise _Killed
            left[0] -= left[0] > 0
            return function(*arguments, **named)

        return call

    for name in ("replace", "unlink", "fsync"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    monkeypatch.setattr(Path, "replace", counted(Path.replace))
    monkeypatch.setattr(Path, "mkdir", counted(Path.mkdir))
    yield left
    left[0] = -1


def test_killed_before_any_change_of_the_disk_it_gives_the_same_bytes(
    manifest: Manifest, tmp_path: Path, changes: list[int]
) -> None:
    complete(tmp_path / "plain", manifest)
    expected = content(tmp_path / "plain")
    starts = 0
    for stride in (1, 2, 5):
        folder, number = tmp_path / f"killed-{stride}", 0
        while True:
            number += 1
            changes[0] = number * stride
            try:
                complete(folder, manifest)
            except _Killed:
                starts += 1
                assert not (folder / "embeddings.json").exists() or (folder / ".progress").exists()
            except AssertionError:  # the description was there: the next start has nothing to do
                break
            else:
                break
            finally:
                changes[0] = -1
        assert EmbeddingFolder(folder, SPEC, manifest).prepare() == "complete"
        assert content(folder) == expected
    assert starts > 15


def test_what_is_finished_is_not_written_again(manifest: Manifest, tmp_path: Path) -> None:
    folder = EmbeddingFolder(tmp_path, SPEC, manifest)
    assert folder.prepare() == "new"
    units, waiting = folder.missing()
    assert [(unit.shard, unit.first, unit.last) for unit in units] == [(0, 0, 8), (0, 8, 10), (1, 0, 8), (1, 8, 10), (2, 0, 5)]
    assert waiting == []
    embed(folder, units[:3])
    folder.assemble(0)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.parquet")}
    again = EmbeddingFolder(tmp_path, SPEC, manifest)
    folder.close()
    assert again.prepare() == "resumed"
    units, waiting = again.missing()
    assert [(unit.shard, unit.part) for unit in units] == [(1, 1), (2, 0)] and waiting == []
    embed(again, units[:1])
    assert again.missing()[1] == [1]
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.parquet")} == before


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (replace(SPEC, dtype="float16"), "dtype float32, not float16"),
        (replace(SPEC, weights=WeightsSpec("a", "a", "1" * 64)), "weights 0000000000000000, not 1111111111111111"),
        (replace(SPEC, image=replace(SPEC.image, size=448)), "size 224, not 448"),
        (replace(SPEC, batch_size=8), "batch_size 4, not 8"),
        (replace(SPEC, device="cuda"), "device cpu, not cuda"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_a_folder_of_other_embeddings_is_refused(
    spec: EmbeddingSpec, text: str, finished: bool, manifest: Manifest, tmp_path: Path
) -> None:
    if finished:
        complete(tmp_path, manifest)
    else:
        EmbeddingFolder(tmp_path, SPEC, manifest).prepare()
    before = content(tmp_path)
    with pytest.raises(ConfigError) as raised:
        EmbeddingFolder(tmp_path, spec, manifest).prepare()
    assert text in str(raised.value) and "--overwrite" in str(raised.value)
    assert content(tmp_path) == before
    moved = replace(SPEC, weights=replace(SPEC.weights, source="elsewhere"))
    assert EmbeddingFolder(tmp_path, moved, manifest).prepare() in ("complete", "resumed")


@pytest.mark.parametrize("finished", [True, False])
def test_a_folder_is_continued_where_people_are_shown_other_channels(finished: bool, manifest: Manifest, tmp_path: Path) -> None:
    channels = EmbeddedChannels(("a", "b", "c"), "uint16", (0, 1, 2))
    spec = replace(SPEC, image=replace(SPEC.image, channels=channels))
    folder = EmbeddingFolder(tmp_path, spec, manifest)
    assert folder.prepare() == "new"
    if finished:
        embed(folder, folder.missing()[0])
        for shard in range(len(manifest.shards)):
            folder.assemble(shard)
        folder.finish()
    folder.close()
    shown = replace(spec, image=replace(SPEC.image, channels=replace(channels, composite="pca")))
    again = EmbeddingFolder(tmp_path, shown, manifest)
    assert again.prepare() == ("complete" if finished else "resumed")
    again.close()
    other = replace(spec, image=replace(SPEC.image, channels=replace(channels, names=("a", "c", "b"))))
    with pytest.raises(ConfigError, match="holds embeddings with channels"):
        EmbeddingFolder(tmp_path, other, manifest).prepare()


def test_other_shards_are_refused(manifest: Manifest, tmp_path: Path) -> None:
    scenes.write(tmp_path / "other", train=25, val=4, size=16, seed=4, samples_per_shard=10)
    other = build([str(path) for path in sorted((tmp_path / "other").glob("*train-*.tar"))], tmp_path / "index")
    complete(tmp_path / "out", manifest)
    with pytest.raises(ConfigError, match="other shards"):
        EmbeddingFolder(tmp_path / "out", SPEC, other).prepare()


def test_only_files_of_embeddings_are_overwritten(manifest: Manifest, tmp_path: Path) -> None:
    complete(tmp_path, manifest)
    expected = content(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "table.parquet").write_text("mine")
    assert EmbeddingFolder(tmp_path, SPEC, manifest).prepare() == "complete"
    with pytest.raises(ConfigError, match=r"has other files, such as 'notes.txt'"):
        EmbeddingFolder(tmp_path, replace(SPEC, dim=5), manifest).prepare(overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == (tmp_path / "table.parquet").read_text() == "mine"
    (tmp_path / "notes.txt").unlink()
    (tmp_path / "table.parquet").unlink()
    complete(tmp_path, manifest)
    assert content(tmp_path) == expected


def test_a_folder_of_something_else_is_refused(manifest: Manifest, tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_text("x")
    for check in (lambda: work.check_directory(tmp_path), lambda: EmbeddingFolder(tmp_path, SPEC, manifest).prepare()):
        with pytest.raises(ConfigError, match=r"has other files, such as 'photo.jpg'"):
            check()
    with pytest.raises(ConfigError, match="must be a folder"):
        work.check_directory(tmp_path / "photo.jpg")


def test_two_processes_do_not_write_one_folder(manifest: Manifest, tmp_path: Path) -> None:
    code = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); "
        "sys.stdin.read()"
    )
    EmbeddingFolder(tmp_path, SPEC, manifest).prepare()
    lock = str(tmp_path / ".progress" / "lock")
    with subprocess.Popen(
        [sys.executable, "-c", code, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(), cwd=ROOT
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        for overwrite in (False, True):
            with pytest.raises(ConfigError, match="another process is writing these embeddings"):
                EmbeddingFolder(tmp_path, SPEC, manifest).prepare(overwrite=overwrite)
        with pytest.raises(ConfigError, match="another process is writing these embeddings"):
            work.clear(tmp_path)
    assert EmbeddingFolder(tmp_path, SPEC, manifest).prepare() == "resumed"


def test_damaged_parts_are_named(manifest: Manifest, tmp_path: Path) -> None:
    folder = EmbeddingFolder(tmp_path, SPEC, manifest)
    folder.prepare()
    units, _ = folder.missing()
    embed(folder, units)
    parts = sorted((tmp_path / ".progress" / "parts").iterdir())
    parts[0].write_bytes(parts[0].read_bytes()[:-20])
    with pytest.raises(DataError, match=r"00000-000000.parquet: part is damaged .* Remove the file"):
        folder.assemble(0)
    parts[2].write_bytes(parts[3].read_bytes())
    with pytest.raises(DataError, match="part has 2 rows instead of 8"):
        folder.assemble(1)
    parts[4].unlink()
    with pytest.raises(DataError, match="part is missing"):
        folder.assemble(2)
    assert not list(tmp_path.glob("*.parquet"))
    with pytest.raises(DataError, match="its embeddings are missing"):
        folder.finish()


def test_a_full_disk_leaves_no_half_file(manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = EmbeddingFolder(tmp_path, SPEC, manifest)
    folder.prepare()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        embed(folder, folder.missing()[0])
    assert not list((tmp_path / ".progress" / "parts").iterdir())


def test_the_stored_layout_is_fixed(manifest: Manifest, tmp_path: Path) -> None:
    """Row groups do not depend on how a shard was divided into parts."""
    complete(tmp_path, manifest)
    meta = parquet.read_metadata(tmp_path / "00000-scenes-train-00000.parquet")
    assert meta.row_group(0).column(0).compression == "UNCOMPRESSED" and meta.num_rows == 9
    assert table.ROW_GROUP == 8192
