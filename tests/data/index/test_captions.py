"""Captions: one encoding rule for shards, files and tables; what cannot be read is replaced and counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.index.build import build
from pipeline.data.index.captions import clean_text, decode_text
from pipeline.data.index.fields import CAPTION_SOURCES
from pipeline.data.inspect.report import index_report
from pipeline.data.inspect.stats import statistics
from pipeline.data.loader.reader import Reader
from pipeline.data.pack.sources import open_source
from tests.data.pack.test_packer import packed, picture
from tests.data.pack.test_sources import write_tar

SAID = "une crème brûlée 🍮"
RULE: list[tuple[bytes, str, bool]] = [
    (SAID.encode(), SAID, False),
    (SAID.encode("utf-8-sig"), SAID, False),
    (SAID.encode("utf-16"), SAID, False),
    (b"\xfe\xff" + SAID.encode("utf-16-be"), SAID, False),
    (SAID.encode("utf-32"), SAID, False),
    ("crème".encode("latin-1"), "cr\ufffdme", True),
    ("“quoted”".encode("cp1252"), "\ufffdquoted\ufffd", True),
    ("猫".encode("shift_jis"), None, True),  # type: ignore[list-item]
    (SAID.encode()[:-1], "une crème brûlée \ufffd", True),
    (SAID.encode("utf-16")[:-2], "une crème brûlée \ufffd", True),
]


@pytest.mark.parametrize(("data", "text", "replaced"), RULE)
def test_every_door_reads_text_by_the_rule(tmp_path: Path, data: bytes, text: str | None, replaced: bool) -> None:
    actual, changed = decode_text(data)
    assert changed == replaced and text in (actual, None)
    write_tar(tmp_path / "a.tar", [("1.jpg", picture(1)), ("1.txt", data)])
    manifest = build([str(tmp_path / "a.tar")], tmp_path / "index")
    (record,) = Reader(manifest).fetch(manifest.ids())
    assert record.caption == actual.strip()
    assert manifest.notes == ({"caption_replaced": 1} if replaced else {})
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "1.jpg").write_bytes(picture(1))
    (tmp_path / "in" / "1.txt").write_bytes(data)
    report = packed(tmp_path / "in", tmp_path / "out")
    assert report.account.noted == ({"caption_replaced": 1} if replaced else {})
    packed_manifest = build(list(report.shards), tmp_path / "index2")
    (record,) = Reader(packed_manifest).fetch(packed_manifest.ids())
    assert record.caption == actual.strip() and packed_manifest.notes == {}


@pytest.mark.parametrize(
    ("document", "caption", "notes"),
    [
        (b'{"caption": "a dog \\ud83d"}', "a dog \ufffd", {"caption_replaced": 1}),
        (b'{"caption": ["fine", "a dog \\udc00"]}', "fine", {"caption_replaced": 1}),
        ('{"caption": "crème"}'.encode("latin-1"), "cr\ufffdme", {"caption_replaced": 1}),
        ('{"caption": "crème"}'.encode("utf-16"), "crème", {}),
        (b"\xef\xbb\xbf" + '{"caption": "crème"}'.encode(), "crème", {}),
        ('{"caption": "fine", "by": "crème"}'.encode("latin-1"), "fine", {}),
        (b'{"caption": "already \xef\xbf\xbd"}', "already \ufffd", {}),
        (b'{"caption": [{"text": "a dog"}]}', None, {"bad_caption": 1}),
        (b'{"caption": 7}', None, {"bad_caption": 1}),
        (b'{"caption": [null, " "]}', None, {}),
    ],
)
def test_captions_in_json_are_cleaned_and_counted(tmp_path: Path, document: bytes, caption: str | None, notes: Any) -> None:
    write_tar(tmp_path / "a.tar", [("1.jpg", picture(1)), ("1.json", document)])
    manifest = build([str(tmp_path / "a.tar")], tmp_path / "index")
    (record,) = Reader(manifest).fetch(manifest.ids())
    assert (record.caption, manifest.notes) == (caption, notes)


def test_a_byte_order_mark_alone_is_no_caption(tmp_path: Path) -> None:
    for number, data in enumerate((b"\xef\xbb\xbf", b"\xff\xfe", b"\xef\xbb\xbf \n")):
        write_tar(tmp_path / f"{number}.tar", [("1.jpg", picture(1)), ("1.txt", data), ("1.json", b'{"caption": "instead"}')])
        manifest = build([str(tmp_path / f"{number}.tar")], tmp_path / "index")
        assert Reader(manifest).fetch(manifest.ids())[0].caption == "instead"


def test_replaced_captions_are_in_the_report_and_in_the_statistics(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("1.jpg", picture(1)), ("1.txt", b"caf\xe9"), ("2.jpg", picture(2)), ("2.txt", b"fine")])
    manifest = build([str(tmp_path / "a.tar")], tmp_path / "index")
    (finding,) = index_report(tmp_path / "index" / "sidecars", manifest.shards).findings
    assert (finding.reason, finding.count, finding.examples) == ("caption_replaced", 1, (("a.tar", "1"),))
    assert finding.meaning and not finding.refused
    actual = statistics(manifest)
    assert actual.noted == {"caption_replaced": 1} and "caption_replaced 1" in actual.text()
    assert any("captions are not UTF-8" in sentence for sentence in actual.advice)


@pytest.mark.parametrize("column", ["caption", "captions", "by", "label"])
def test_half_an_emoji_in_a_table_is_cleaned_and_counted(tmp_path: Path, column: str) -> None:
    (tmp_path / "a.jpg").write_bytes(picture(1))
    table = tmp_path / "t.jsonl"
    value: Any = ["a dog \ud83d", "b"] if column == "captions" else "a dog \ud83d"
    table.write_text(json.dumps({"path": "a.jpg", column: value}) + '\n{"path": "a.jpg", "caption": "fine", "label": "dog"}\n')
    report = packed(table, tmp_path / "out")
    note = {"by": "text_replaced", "label": "label_replaced"}.get(column, "caption_replaced")
    assert report.account.noted == {note: 1} | ({} if column == "label" else {"empty_label": 1})
    assert (str(table) + ":1", note) in report.notes, "the row is named"
    for path in (tmp_path / "out").iterdir():
        path.read_bytes().decode("utf-8", "strict") if path.suffix != ".tar" else None
    manifest = build(list(report.shards), tmp_path / "index")
    assert manifest.counts == {"ok": 2} and manifest.notes == {}


@given(st.binary(max_size=40))
def test_any_bytes_become_text_that_can_be_written(data: bytes) -> None:
    text, replaced = decode_text(data)
    assert text.encode().decode() == text
    try:
        valid = data.decode("utf-8")
    except UnicodeDecodeError:
        assert replaced or data[:2] in (b"\xff\xfe", b"\xfe\xff") or data[:4] == b"\x00\x00\xfe\xff"
    else:
        assert not replaced and text in (valid, valid[1:]), "valid UTF-8 stays as it is but for its mark"


@given(st.text(alphabet=st.characters(exclude_categories=()), max_size=20))
def test_cleaning_changes_only_lone_surrogates(text: str) -> None:
    clean, changed = clean_text(text)
    assert clean.encode().decode() == clean and clean_text(clean) == (clean, False)
    assert changed == any("\ud800" <= letter <= "\udfff" for letter in text)
    if not changed:
        assert clean == text


def test_a_flat_folder_with_captions_keeps_them(tmp_path: Path) -> None:
    for name, text in {"a.jpg": None, "a.txt": "one", "b.JPG": None, "b.TXT": "two", "c.jpg": None, "c.jpg.txt": "three"}.items():
        (tmp_path / name).write_bytes(picture(1) if text is None else text.encode())
    (tmp_path / "d.jpg").write_bytes(picture(1))
    (tmp_path / "README.txt").write_text("no caption")
    source = open_source(tmp_path)
    captions = {source.name(n): source.load(n).members.get("txt") for n in range(len(source))}
    assert captions == {"a.jpg": "one", "b.JPG": "two", "c.jpg": "three", "d.jpg": None}
    assert source.left_out == [("README.txt", "text_without_image")]


def test_utf_16_without_a_mark_stays_as_it_is_and_is_counted(tmp_path: Path) -> None:
    data = "a dog".encode("utf-16-le")
    write_tar(tmp_path / "a.tar", [("1.jpg", picture(1)), ("1.txt", data)])
    manifest = build([str(tmp_path / "a.tar")], tmp_path / "index")
    assert Reader(manifest).fetch(manifest.ids())[0].caption == data.decode() and manifest.notes == {"caption_nul": 1}


def test_white_space_beyond_ascii_is_indexed_as_ever(tmp_path: Path) -> None:
    """The columns make the fingerprint: a run must find the data as they were when it began."""
    members = [("1.jpg", picture(1)), ("1.txt", "\u3000\x1c".encode()), ("1.json", b'{"caption": "instead"}')]
    write_tar(tmp_path / "a.tar", members)
    manifest = build([str(tmp_path / "a.tar")], tmp_path / "index")
    assert manifest.column(0, "caption_source").tolist() == [CAPTION_SOURCES.index("text")]
    assert Reader(manifest).fetch(manifest.ids())[0].caption is None
