"""Layouts: what can be read in one way is recognised, what can be read in two is refused with both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.data.pack.sources import ImageSource, Members, open_source
from pipeline.errors import ConfigError, DataError
from tests.data.pack.test_packer import picture
from tests.data.pack.test_sources import downloaded, write_tar


def folder(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".tar":
            write_tar(path, [("1.jpg", picture(1))])
        elif path.suffix in (".csv", ".jsonl"):
            path.write_text("path,label\n1.jpg,1\n" if path.suffix == ".csv" else '{"path": "1.jpg"}\n')
        elif path.suffix == ".json":
            path.write_text("{}")
        else:
            path.write_bytes(picture(1))
    return root


CASES = {
    "images and a tar": (
        ["1.jpg", "2.jpg", "old.tar"],
        ("1 tar file (--layout shards)", "2 images without classes (--layout flat)"),
    ),
    "class folders and a tar": (["cat/1.jpg", "old.tar"], ("--layout shards", "1 image in 1 class folder (--layout folder)")),
    "images beside class folders": (
        ["1.jpg", "cat/1.jpg", "bee/1.jpg"],
        ("2 images in 2 class folders and 1 image beside them without a class (--layout folder)", "3 images without classes"),
    ),
    "a table beside images": (["list.csv", "1.jpg"], ("list.csv (name the table: ", "--layout flat")),
    "JSON lines beside class folders": (["list.jsonl", "cat/1.jpg"], ("list.jsonl (name the table: ", "--layout folder")),
    "img2dataset and class folders": (
        ["00000/000000000.jpg", "00000/000000000.json", "00000_stats.json", "cat/1.jpg"],
        ("img2dataset's output with 1 image in numbered folders (--layout files)", "--layout folder"),
    ),
    "img2dataset and images at the top": (
        ["00000/000000000.jpg", "00000_stats.json", "cover.jpg"],
        ("--layout files", "--layout folder"),
    ),
    "numbered class folders with JSON": (
        ["10000/a.jpg", "10000/a.json", "10001/b.jpg"],
        ("--layout files", "2 images in 2 class folders (--layout folder)"),
    ),
    "splits": (["train/cat/1.jpg", "val/cat/1.jpg"], ("splits (train, val)", "--layout folder")),
    "splits without classes": (["train/1.jpg", "test/1.jpg"], ("splits (test, train)", "in/test", "2 images in 2 class folders")),
    "splits of COCO": (["train2017/1.jpg", "val2017/1.jpg", "annotations/captions.json"], ("splits (train2017, val2017)",)),
    "splits with a word": (["train_images/1.jpg", "Test_Images/1.jpg"], ("splits (Test_Images, train_images)",)),
    "one folder around the classes": (
        ["images/cat/1.jpg", "images/bee/1.jpg", "images.txt.json"],
        (
            "2 class folders in one folder (pack that: ",
            "in/images)",
            "--layout flat",
            "2 images in 1 class folder (--layout folder)",
        ),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_two_readings_are_refused_with_both(tmp_path: Path, name: str) -> None:
    names, words = CASES[name]
    with pytest.raises(DataError, match=r"fits \d layouts") as caught:
        open_source(folder(tmp_path / "in", *names))
    assert all(word in str(caught.value) for word in words), caught.value


def test_three_readings_are_all_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"3 layouts: 1 tar file.*the table t\.csv.*1 image without"):
        open_source(folder(tmp_path, "a.tar", "t.csv", "1.jpg"))


@pytest.mark.parametrize(
    ("names", "kind", "classes"),
    [
        (["1.jpg", "2.png"], ImageSource, ()),
        (["cat/1.jpg", "bee/deep/1.jpg"], ImageSource, ("bee", "cat")),
        (["a.tar", "b.tar", "list.csv", "cat/readme.json"], Members, ()),
        (["cat/1.jpg", "notes.json", "cat/a.tar"], ImageSource, ("cat",)),
        (["1.jpg", ".hidden/2.jpg", "__MACOSX/3.jpg"], ImageSource, ()),
        (["00001/a.jpg", "00002/b.jpg"], ImageSource, None),
        (["train/1.jpg", "list.json"], ImageSource, ("train",)),
        (["train/1.jpg", "trains/1.jpg"], ImageSource, ("train", "trains")),
        (["images/deep/1.jpg", "images/1.jpg"], ImageSource, ("images",)),
    ],
)
def test_one_reading_is_taken(tmp_path: Path, names: list[str], kind: type, classes: tuple[str, ...] | None) -> None:
    source = open_source(folder(tmp_path, *names))
    assert isinstance(source, kind)
    assert classes is None or source.classes == classes


def test_a_named_layout_is_taken_and_says_what_it_passes_over(tmp_path: Path) -> None:
    given = folder(tmp_path, "1.jpg", "cat/2.jpg", "old.tar", "list.csv", "cat/a.json")
    flat, classes, shards, files = (open_source(given, layout=layout) for layout in ("flat", "folder", "shards", "files"))
    assert (len(flat), flat.classes) == (2, ())
    assert flat.left_out == [("cat/a.json", "not_an_image"), ("list.csv", "not_an_image"), ("old.tar", "shard_file")]
    assert (len(classes), classes.classes) == (2, ("cat",)) and list(classes.notes) == [("1.jpg", "no_label")]
    assert len(shards) == 1 and {reason for _, reason in shards.left_out} == {"not_a_shard"} and len(shards.left_out) == 4
    assert len(files) == 5 and files.left_out == []


def test_tables_without_paths_are_counted_not_ambiguous(tmp_path: Path) -> None:
    folder(tmp_path, "1.jpg")
    (tmp_path / "classes.csv").write_text("id,name\n1,cat\n")
    (tmp_path / "meta.jsonl").write_text(json.dumps({"file_name": "1.jpg"}) + "\n")
    assert [name for name, _ in open_source(tmp_path).left_out] == ["classes.csv", "meta.jsonl"]


def test_a_folder_without_anything_to_pack_says_what_it_holds(tmp_path: Path) -> None:
    folder(tmp_path / "deep", "a/1.tar", "a/2.tar", "b.json")
    with pytest.raises(DataError, match=r"contains no images and no tars \(seen: 2 \.tar, 1 \.json\).*\*\*/\*\.tar"):
        open_source(tmp_path / "deep")
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="seen: nothing"):
        open_source(tmp_path / "none")


def test_img2datasets_bookkeeping_is_counted(tmp_path: Path) -> None:
    source = open_source(downloaded(tmp_path))
    assert {reason for _, reason in source.left_out} == {"bookkeeping"} and len(source.left_out) == 4


def test_options_that_a_layout_does_not_use_are_refused(tmp_path: Path) -> None:
    from pipeline.data.pack.sources import Options

    folder(tmp_path, "1.jpg")
    for options, words in ((Options(roots=(tmp_path,)), "--root"), (Options(labels="names"), "--labels")):
        with pytest.raises(ConfigError, match=words):
            open_source(tmp_path, options=options)


def test_a_table_in_utf_16_is_a_reading_too(tmp_path: Path) -> None:
    folder(tmp_path, "1.jpg")
    (tmp_path / "list.csv").write_bytes("path,label\n1.jpg,1\n".encode("utf-16"))
    with pytest.raises(DataError, match=r"2 layouts: the table list\.csv"):
        open_source(tmp_path)


def test_a_linked_cover_beside_shards_is_left_out(tmp_path: Path) -> None:
    folder(tmp_path, "in/a.tar", "cover.jpg")
    (tmp_path / "in" / "cover.jpg").symlink_to("../cover.jpg")
    assert open_source(tmp_path / "in").left_out == [("cover.jpg", "outside_link")]


def test_a_table_with_carriage_returns_beside_classes_is_looked_at(tmp_path: Path) -> None:
    folder(tmp_path, "cat/1.jpg", "dog/1.jpg")
    (tmp_path / "meta.csv").write_bytes(b"file,note\ra.jpg,x\r")
    assert open_source(tmp_path).classes == ("cat", "dog")


def test_folders_that_are_no_classes_have_a_hint(tmp_path: Path) -> None:
    folder(tmp_path, *(f"{name}/1.jpg" for name in ("0a", "12", "1e", "77")))
    with pytest.raises(DataError, match="--layout flat"):
        open_source(tmp_path)
