"""Sources: each is recognised, lists the same samples in the same order, and its digest changes with the listing."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from pipeline.data.index.image_header import inspect_header
from pipeline.data.pack.keys import unique_keys
from pipeline.data.pack.packer import pack
from pipeline.data.pack.sources import ImageSource, Members, SkippedSample, open_source
from pipeline.errors import DataError
from tests.data.pack.test_packer import contents, packed, picture


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as writer:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            writer.addfile(entry, io.BytesIO(data))


def downloaded(folder: Path) -> Path:
    """What img2dataset leaves behind with ``output_format=files``."""
    for n in (0, 1, 10_000):
        place = folder / f"{n // 10_000:05d}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{n:09d}.jpg").write_bytes(picture(n))
        (place / f"{n:09d}.txt").write_text(f"caption {n}")
        (place / f"{n:09d}.json").write_text(json.dumps({"url": "somewhere", "key": f"{n:09d}"}))
    for n in (0, 1):
        (folder / f"{n:05d}_stats.json").write_text("{}")
        (folder / f"{n:05d}.parquet").write_bytes(b"PAR1")
    return folder


def test_img2datasets_files_keep_keys_captions_and_facts(tmp_path: Path) -> None:
    source = open_source(downloaded(tmp_path / "web"))
    assert isinstance(source, Members) and len(source) == 3 and source.classes == ()
    assert [source.key(n, 99) for n in range(3)] == ["000000000", "000000001", "000010000"]
    raw = source.load(1)
    assert (raw.image, raw.members["txt"]) == (picture(1), b"caption 1")
    assert json.loads(raw.members["json"])["url"] == "somewhere"
    for stats in (tmp_path / "web").glob("*_stats.json"):
        stats.unlink()
    assert isinstance(open_source(tmp_path / "web"), Members), "recognised without its statistics too"


def test_img2datasets_tars_are_taken_when_they_are_finished(tmp_path: Path) -> None:
    for n in (0, 1):
        write_tar(tmp_path / f"{n:05d}.tar", [(f"{n:05d}0000.jpg", picture(n)), (f"{n:05d}0000.txt", b"text")])
        (tmp_path / f"{n:05d}.parquet").write_bytes(b"PAR1")
    (tmp_path / "00000_stats.json").write_text("{}")
    with pytest.raises(DataError, match=r"00001\.tar: has no 00001_stats\.json"):
        open_source(tmp_path)
    assert len(open_source(tmp_path, layout="shards")) == 2
    (tmp_path / "00001_stats.json").write_text("{}")
    source = open_source(tmp_path)
    assert [source.name(n) for n in range(2)] == ["00000.tar: 000000000", "00001.tar: 000010000"]


def test_keys_that_occur_again_get_a_number_and_scattered_members_come_together(tmp_path: Path) -> None:
    members = [("1.jpg", picture(1)), ("2.jpg", picture(2)), ("1.txt", b"far away"), ("3.jpg", picture(6)), ("1.jpg", picture(3))]
    write_tar(tmp_path / "a.tar", members)
    write_tar(tmp_path / "b.tar", [("1.jpg", picture(4)), ("1-1.jpg", picture(5)), ("lonely.txt", b"no picture")])
    source = open_source(str(tmp_path / "{a,b}.tar"))
    keys = [source.key(n, 0) for n in range(len(source))]
    assert keys == ["1", "2", "3", "1-2", "1-3", "1-1", "lonely"]
    assert source.load(0).members == {"txt": b"far away"}
    assert [source.load(n).image for n in range(6)] == [picture(n) for n in (1, 2, 6, 3, 4, 5)]
    with pytest.raises(SkippedSample, match="missing_image"):
        source.load(6)


@given(st.lists(st.sampled_from(["a", "a-1", "a-2", "a-1-1", "b"]), max_size=12))
def test_unique_keys_are_unique_and_the_first_of_each_stays(keys: list[str]) -> None:
    found = unique_keys(keys)
    assert len(set(found)) == len(keys)
    for key in set(keys):
        assert found[keys.index(key)] == key
    assert all(new == old or new.startswith(f"{old}-") for new, old in zip(found, keys, strict=True))


def test_a_picture_written_anew_stands_in_the_place_of_the_old(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("1.gif", picture(1, "GIF")), ("1.cls", b"3"), ("1.seg.png", b"map")])
    raw = open_source(tmp_path).load(0)
    png = picture(1, "PNG")
    assert raw.sample(png, inspect_header(png)) == {"png": png, "cls": b"3", "seg.png": b"map"}


@pytest.mark.parametrize(
    ("extension", "written"), [("jpe", "jpg"), ("heic", "jpg"), ("jfif", "jpg"), ("jpeg", "jpeg"), ("png", "png")]
)
def test_a_member_that_training_would_not_find_gets_the_extension_of_its_format(
    tmp_path: Path, extension: str, written: str
) -> None:
    write_tar(tmp_path / "a.tar", [(f"1.{extension}", picture(1)), ("1.cls", b"3")])
    raw = open_source(tmp_path).load(0)
    assert raw.sample(raw.image, inspect_header(raw.image)) == {written: picture(1), "cls": b"3"}
    raw = open_source(tmp_path / "a.tar").load(0)
    raw.members["jpg"] = b"another image"
    assert raw.sample(raw.image, inspect_header(raw.image)) == {extension: picture(1), "cls": b"3", "jpg": b"another image"}


def test_other_names_of_formats_that_are_read_are_images(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for n, extension in enumerate(("jfif", "pjpeg", "MPO", "jpe")):
        (tmp_path / "in" / f"{n}.{extension}").write_bytes(picture(n))
    (tmp_path / "in" / "4.pgm").write_bytes(b"P5 24 20 255\n" + bytes(480))
    report = pack(open_source(tmp_path / "in"), tmp_path / "out")
    assert (report.packed, report.skipped) == (5, ())


def test_a_cut_tar_is_refused_or_used_as_far_as_it_is_whole(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [(f"{n}.jpg", picture(n)) for n in range(4)])
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:5000])
    with pytest.raises(DataError, match="is truncated"):
        open_source(tmp_path)
    source = open_source(tmp_path, use_damaged=True)
    assert 0 < len(source) < 4 and source.load(0).image == picture(0)


def test_tars_that_are_not_read_are_told_from_other_files(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("1.jpg", picture(1))])
    (tmp_path / "more").mkdir()
    write_tar(tmp_path / "more" / "b.tar", [("2.jpg", picture(2))])
    (tmp_path / "README").write_text("x")
    assert open_source(tmp_path).left_out == [("README", "not_a_shard"), ("more/b.tar", "nested_shard")]


def test_the_digest_follows_the_listing(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(picture(1))
    first = open_source(folder)
    assert isinstance(first, ImageSource) and open_source(folder).digest == first.digest
    (folder / "b.jpg").write_bytes(picture(2))
    second = open_source(folder)
    (folder / "b.jpg").write_bytes(picture(2, size=(50, 50)))
    assert len({first.digest, second.digest, open_source(folder).digest}) == 3


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_table_gives_labels_captions_and_facts(tmp_path: Path, kind: str) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "a.jpg").write_bytes(picture(1))
    (tmp_path / "cat" / "b.jpg").write_bytes(picture(2))
    rows = [
        {"path": "a.jpg", "caption": 'a zebra,\n"striped"', "label": "zebra", "licence": "free"},
        {"path": "cat/b.jpg", "caption": None, "label": "cat", "licence": None},
        {"path": "cat/gone.jpg", "caption": "x", "label": "cat", "licence": None},
    ]
    table = tmp_path / f"table.{kind}"
    if kind == "jsonl":
        table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    else:
        first = 'a.jpg,"a zebra,\n""striped""",zebra,free'
        table.write_text(f"path,caption,label,licence\n{first}\ncat/b.jpg,,cat,\ncat/gone.jpg,x,cat,\n")
    source = open_source(table)
    assert source.classes == ("cat", "zebra")
    raw = source.load(0)
    assert raw.image == picture(1) and raw.members["cls"] == 1
    assert (raw.members["txt"], raw.members["json"]["licence"]) == ('a zebra,\n"striped"', "free")
    assert "txt" not in source.load(1).members
    with pytest.raises(SkippedSample, match="missing_file"):
        source.load(2)
    report = packed(table, tmp_path / "out")
    assert report.packed == 2 and report.skipped == (("cat/gone.jpg", "missing_file"),)
    assert "classes.txt" in contents(tmp_path / "out")


def test_several_captions_are_a_list_in_json_and_one_is_a_text(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(picture(1))
    table = tmp_path / "t.jsonl"
    table.write_text('{"path": "a.jpg", "caption": ["one", "two"]}\n{"path": "a.jpg", "caption": ["one"]}\n')
    several, single = (open_source(table).load(n).members for n in range(2))
    assert several["json"]["caption"] == ["one", "two"] and "txt" not in several
    assert single["txt"] == "one" and "caption" not in single["json"]


def test_what_is_no_source_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file.bin").write_bytes(b"")
    cases = {"gone": "does not exist", "file.bin": "neither a folder nor a table", "x-*.tar": "no shard matches"}
    for name, words in cases.items():
        with pytest.raises(DataError, match=words):
            open_source(str(tmp_path / name))


def test_file_names_with_the_separators_of_windows_are_remarked(tmp_path: Path) -> None:
    (tmp_path / "cat\\1.jpg").write_bytes(picture(1))
    source = open_source(tmp_path)
    assert source.classes == () and any("1 file names hold a backslash" in remark for remark in source.remarks)
