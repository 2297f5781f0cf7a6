"""What a start of a run reads of an index that is there, and what data sets share."""

from __future__ import annotations

import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pipeline.data.index.build as builder
import pipeline.data.index.manifest as module
from pipeline.data import storage
from pipeline.data.index.build import build
from pipeline.data.index.fields import Fields
from pipeline.data.index.filters import narrow
from pipeline.data.index.manifest import Manifest
from pipeline.data.index.shard_table import Shard, ShardTable
from pipeline.data.index.sidecar import Keys, load_sidecar, old_sidecar_name
from pipeline.data.inspect.verify import Failure, exclude
from pipeline.data.loader.reader import Reader
from pipeline.errors import DataError
from tests.data.index.test_build import samples, shard


@pytest.fixture
def urls(tmp_path: Path) -> list[str]:
    return [shard(tmp_path / f"{n}.tar", samples(3, 10 * n)) for n in range(4)]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Shards that are read, and sidecars that are opened while indexing."""
    names: list[str] = []
    index_shard, load = builder.index_shard, builder.load_sidecar
    monkeypatch.setattr(builder, "index_shard", lambda about, **rest: names.append(about.url) or index_shard(about, **rest))
    monkeypatch.setattr(builder, "load_sidecar", lambda path: names.append(path.name) or load(path))
    return names


def test_an_index_that_is_there_is_mapped_without_opening_sidecars(tmp_path: Path, urls: list[str], read: list[str]) -> None:
    first = build(urls, tmp_path / "index")
    read.clear()
    again = build(urls, tmp_path / "index")
    assert read == [] and again == first and again.fingerprint == first.fingerprint


def test_of_two_data_sets_that_share_shards_the_second_reads_its_own(tmp_path: Path, urls: list[str], read: list[str]) -> None:
    build(urls[:2], tmp_path / "a", sidecars=tmp_path / "sidecars")
    read.clear()
    both = build(urls, tmp_path / "b", sidecars=tmp_path / "sidecars")
    assert [name for name in read if name.endswith(".tar")] == urls[2:]
    read.clear()
    swapped = build(urls[::-1], tmp_path / "b", sidecars=tmp_path / "sidecars")
    assert read == [] and swapped.shards == tuple(both.shards)[::-1]
    assert len(list((tmp_path / "sidecars").rglob("*.npz"))) == 4


def test_other_rules_have_sidecars_of_their_own_and_both_indexes_stay_usable(tmp_path: Path, urls: list[str]) -> None:
    one = build(urls, tmp_path / "a", sidecars=tmp_path / "sidecars")
    two = build(urls, tmp_path / "b", sidecars=tmp_path / "sidecars", fields=Fields(min_side=17))
    assert len(Reader(one).fetch(one.ids())) == 12
    assert one.total == 12 and len(list((tmp_path / "sidecars").rglob("*.npz"))) == 8
    assert two.fields.min_side == 17 and two.rows(0).keys == one.rows(0).keys


def test_parts_are_joined_without_reading_anything_again(tmp_path: Path, urls: list[str], read: list[str]) -> None:
    for part in range(3):
        build(urls[part::3], tmp_path / "index" / f"part-{part}", sidecars=tmp_path / "sidecars")
    assert sorted(read) == urls
    read.clear()
    joined = build(urls, tmp_path / "index", sidecars=tmp_path / "sidecars")
    assert read == []
    assert joined.fingerprint == build(urls, tmp_path / "other").fingerprint


def test_a_lost_sidecar_is_made_again(tmp_path: Path, urls: list[str], read: list[str]) -> None:
    first = build(urls, tmp_path / "index")
    first.sidecar(1).unlink()
    read.clear()
    assert build(urls, tmp_path / "index") == first
    assert read == [urls[1]] and first.sidecar(1).exists()


def test_sidecars_of_an_earlier_version_are_taken_over(tmp_path: Path, urls: list[str], read: list[str]) -> None:
    made = build(urls, tmp_path / "new")
    for number, url in enumerate(urls):
        load_sidecar(made.sidecar(number)).save(tmp_path / "index" / old_sidecar_name(url))
    os.rename(urls[3], f"{urls[3]}.tmp")
    shard(Path(urls[3]), samples(5, 70))
    read.clear()
    taken = build(urls, tmp_path / "index")
    assert [name for name in read if name.endswith(".tar")] == [urls[3]]
    assert [one.digest for one in taken.shards][:3] == [one.digest for one in made.shards][:3]


def test_processes_get_a_manifest_by_its_name_and_notice_another(tmp_path: Path, urls: list[str]) -> None:
    manifest = build(urls, tmp_path / "index")
    manifest.rows(0)
    data = pickle.dumps(manifest)
    assert len(data) < 1200
    assert pickle.loads(data) == manifest
    copy: Any = ShardTable.of(manifest.shards, manifest.fields)
    assert pickle.loads(pickle.dumps(copy)) == manifest.shards
    other = build([*urls[1:], shard(tmp_path / "new.tar", samples(2, 50))], tmp_path / "index")
    assert pickle.loads(data) == manifest != other == Manifest.load(tmp_path / "index")
    other.save(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "manifest.npz").resolve().replace((tmp_path / "index" / "manifest.npz").resolve())
    (file,) = (path for path in (tmp_path / "index").glob("manifest-*.npz") if manifest.shards.version[:16] in path.name)
    file.write_bytes((tmp_path / "index" / "manifest.npz").read_bytes())
    with pytest.raises(DataError, match="built again while the run started"):
        pickle.loads(data)


def test_a_mapped_manifest_stays_what_it_was_while_another_takes_its_place(tmp_path: Path, urls: list[str]) -> None:
    manifest = build(urls, tmp_path / "index")
    shard(Path(urls[0]), samples(5, 90))
    other = build(urls, tmp_path / "index")
    assert manifest.rows(0).keys == ("0000", "0001", "0002") and manifest.total == 12
    assert other.rows(0).keys[0] == "0090" and other.total == 14


def test_excluding_samples_leaves_other_indexes_of_the_shard_alone(tmp_path: Path, urls: list[str]) -> None:
    one = build(urls, tmp_path / "a", sidecars=tmp_path / "sidecars")
    two = build(urls[:2], tmp_path / "b", sidecars=tmp_path / "sidecars")
    captions = narrow(one, tmp_path / "a" / "with-caption", ("caption",))
    changed = exclude(one, (Failure(0, 1, "undecodable"),))
    assert changed.rows(0).keys == ("0000", "0002") and changed.total == 11
    assert two.rows(0).keys == captions.rows(0).keys == ("0000", "0001", "0002")
    again = narrow(changed, tmp_path / "a" / "with-caption", ("caption",))
    assert again.rows(0).keys == ("0000", "0002") and again.parent == changed.shards.version


def test_rows_are_kept_up_to_a_number_of_bytes(tmp_path: Path, urls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = build(urls, tmp_path / "index")
    size = sum(column.nbytes for column in manifest.rows(0).columns.values()) + manifest.rows(0).keys.nbytes
    loaded: list[str] = []
    load = module.load_sidecar
    monkeypatch.setattr(module, "load_sidecar", lambda path: loaded.append(path.name[:5]) or load(path))
    manifest = pickle.loads(pickle.dumps(manifest))
    object.__setattr__(manifest, "_cache", module._Cache(limit=2 * size + 10))
    for number in (0, 1, 0, 2, 0, 1):
        manifest.rows(number)
    assert loaded == ["0.tar", "1.tar", "2.tar", "1.tar"]


def test_a_sidecar_that_is_not_the_manifests_is_refused(tmp_path: Path, urls: list[str]) -> None:
    manifest = build(urls, tmp_path / "index")
    load_sidecar(manifest.sidecar(0)).save(manifest.sidecar(1))
    with pytest.raises(DataError, match="another version of the shard"):
        manifest.rows(1)
    manifest.sidecar(2).write_bytes(b"")
    with pytest.raises(DataError, match=r"damaged.*--check"):
        manifest.rows(2)


def test_names_are_decoded_one_by_one() -> None:
    names = ["", "a", "été", "x/y", "\udce9"]
    keys = Keys.of(names)
    assert tuple(keys) == tuple(names) == tuple(keys[n] for n in range(5)) == keys[:] and keys[-1] == "\udce9"
    some = keys.take(np.array([4, 1]))
    assert some == ("\udce9", "a") and some[0] == "\udce9" and len(some) == 2 and some[-1] == "a"
    for wrong in (5, -6):
        with pytest.raises(IndexError):
            keys[wrong]


def test_a_table_gives_back_every_summary(tmp_path: Path) -> None:
    made = [
        Shard(
            url=f"s3://b/é{n}.tar",
            size=n,
            tag=f'"e{n}"',
            samples=n,
            classes=n % 3,
            digest=f"{n:032x}",
            sidecar="",
            counts={"ok": n} if n else {},
            notes={"links": n} if n == 2 else {},
            damage="cut" if n == 3 else "",
        )
        for n in range(5)
    ]
    table = ShardTable.of(made, Fields())
    assert [replace(shard, sidecar="") for shard in table] == made
    assert table[-1] == table[4] and table[1:3] == (table[1], table[2])
    abouts = [storage.ObjectStat(one.url, one.size, one.tag) for one in made]
    assert table.is_current(abouts) and not table.is_current(abouts[:-1])
    for changed in ({"size": 9}, {"tag": "x"}, {"url": "s3://b/x.tar"}):
        other_about = storage.ObjectStat(**{"url": made[1].url, "size": 1, "tag": made[1].tag} | changed)  # type: ignore[arg-type]
        assert not table.is_current([abouts[0], other_about, *abouts[2:]])


def test_an_index_without_samples_is_a_table_without_rows(tmp_path: Path) -> None:
    manifest = Manifest(str(tmp_path), ShardTable.of([], Fields())).save(tmp_path)
    assert Manifest.load(tmp_path) == manifest and manifest.total == 0 and manifest.ids().tolist() == []


def test_a_folder_of_sidecars_that_somebody_else_owns_is_refused_with_its_name(tmp_path: Path, urls: list[str]) -> None:
    (tmp_path / "index" / "sidecars").mkdir(parents=True)
    for number in range(256):
        (tmp_path / "index" / "sidecars" / f"{number:02x}").write_text("in the way")
    with pytest.raises(DataError, match="cannot be written") as caught:
        build(urls, tmp_path / "index")
    assert "data.index" in caught.value.hint


def test_the_same_bytes_stored_again_are_the_new_version(tmp_path: Path, urls: list[str], read: list[str]) -> None:
    first = build(urls, tmp_path / "index")
    captions = narrow(first, tmp_path / "index" / "with-caption", ("caption",))
    os.utime(urls[0], ns=(1, 1))
    storage.forget()
    second = build(urls, tmp_path / "index")
    assert second.fingerprint == first.fingerprint and second.shards[0].tag != first.shards[0].tag
    read.clear()
    assert build(urls, tmp_path / "index").shards[0].tag == second.shards[0].tag and read == []
    again = narrow(second, tmp_path / "index" / "with-caption", ("caption",))
    assert again.shards[0].tag == second.shards[0].tag != captions.shards[0].tag


def test_exclusions_are_the_data_sets_own_and_survive_changes_and_checks(tmp_path: Path, urls: list[str]) -> None:
    sidecars = tmp_path / "sidecars"
    for part in range(2):
        build(urls[part::2], tmp_path / "a" / f"part-{part}", sidecars=sidecars)
    one = build(urls, tmp_path / "a", sidecars=sidecars)
    changed = exclude(one, (Failure(0, 1, "undecodable"),))
    with pytest.raises(DataError, match="not the one that was verified"):
        exclude(one, (Failure(1, 1, "undecodable"),))
    assert build(urls, tmp_path / "b", sidecars=sidecars).total == 12
    shard(Path(urls[3]), samples(3, 70))
    for check in (False, True):
        assert build(urls, tmp_path / "a", sidecars=sidecars, check=check).total == changed.total == 11


def test_a_sidecar_under_a_wrong_name_is_not_used(tmp_path: Path, urls: list[str]) -> None:
    manifest = build(urls, tmp_path / "index")
    path = manifest.sidecar(0)
    path.rename(path.with_name(path.name[:-12] + "deadbeef.npz"))
    assert build(urls, tmp_path / "index").rows(0).keys == ("0000", "0001", "0002")


def test_old_versions_of_a_manifest_are_removed_in_time(tmp_path: Path, urls: list[str]) -> None:
    for number in range(12):
        shard(Path(urls[0]), samples(3 + number))
        build(urls, tmp_path / "index")
    assert len(list((tmp_path / "index").glob("manifest-*.npz"))) == 8
    assert Manifest.load(tmp_path / "index").total == 9 + 14
