"""Tables: the same rows in every format, odd values handled, mistakes named with their line."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import sys
from pathlib import Path

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from pipeline.data.index.captions import clean_text
from pipeline.data.index.labels import read_label
from pipeline.data.pack.packer import pack
from pipeline.data.pack.sources import Options, open_source
from pipeline.data.pack.tables import rows
from pipeline.errors import DataError
from pipeline.untrusted import UNPRINTABLE
from tests.data.pack.test_packer import picture


def test_captions_may_be_lists(tmp_path: Path) -> None:
    table = tmp_path / "t.jsonl"
    lines = [
        {"path": "a", "caption": ["one", "", "two", "one"]},
        {"path": "b", "caption": "one", "captions": ["two"]},
        {"path": "c", "caption": " "},
    ]
    table.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [row.captions for row in rows(table)] == [("one", "two"), ("one", "two"), ()]


def test_numbers_that_became_floats_for_a_gap_are_labels_still(tmp_path: Path) -> None:
    table = tmp_path / "t.parquet"
    columns = {"path": ["a", "b"], "label": [3.0, math.nan], "captions": [["x", "y"], None], "score": [math.inf, 0.5]}
    parquet.write_table(pyarrow.table(columns), table)
    found = list(rows(table))
    assert [read_label(row.label) for row in found] == [(3, ""), (None, "empty_label")]
    assert [row.captions for row in found] == [("x", "y"), ()]
    assert [row.extra for row in found] == [{"score": None}, {"score": 0.5}]


def test_line_separators_inside_a_caption_end_no_row(tmp_path: Path) -> None:
    table = tmp_path / "t.jsonl"
    table.write_text(json.dumps({"path": "a", "caption": "one\u2028two\x0bthree"}, ensure_ascii=False) + "\n", encoding="utf-8")
    (row,) = rows(table)
    assert row.captions == ("one\u2028two\x0bthree",)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("t.csv", "file,label\n1,2\n", "has no column 'path'"),
        ("t.csv", "url,label\n1,2\n", "img2dataset"),
        ("t.csv", "path,label\na,1\n,2\n", r"t\.csv:3: has no path"),
        ("t.tsv", "file\tlabel\na\t1\n", "has no column 'path'"),
        ("t.jsonl", '{"path": "a"}\n{"nope": 1}\n', r"t\.jsonl:2: has no path"),
        ("t.jsonl", '{"path": "a"\n', r"t\.jsonl:1: is not JSON"),
        ("t.parquet", "no parquet at all", "is not a Parquet file"),
        ("t.xlsx", "", "is not a table"),
    ],
)
def test_mistakes_are_named_with_their_place(tmp_path: Path, name: str, text: str, words: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=words):
        list(rows(tmp_path / name))


def texts(table: Path) -> list[tuple[str, tuple[str, ...]]]:
    return [(row.path, row.captions) for row in rows(table)]


LONE = '"the best seat in the house'


@pytest.mark.parametrize(
    ("lines", "captions"),
    [
        (["a.jpg\tone", f"b.jpg\t{LONE}", "c.jpg\tthree"], ["one", LONE, "three"]),
        (["a.jpg\tone", f"b.jpg\t{LONE}", 'c.jpg\t"we loved it', "d.jpg\tfour"], ["one", LONE, '"we loved it', "four"]),
        (["a.jpg\tone", f"b.jpg\t{LONE}", 'c.jpg\tand it ends"', "d.jpg\tfour"], ["one", LONE, 'and it ends"', "four"]),
        (['a.jpg\t5" pipe', 'b.jpg\t"quoted" and not', "c.jpg\tx"], ['5" pipe', '"quoted" and not', "x"]),
        (['a.jpg\t"one\ttab"', 'b.jpg\t"a ""b"" c"', "c.jpg\tplain"], ["one\ttab", 'a "b" c', "plain"]),
        (['a.jpg\t"two', 'lines"', "b.jpg\tplain"], ["two\nlines", "plain"]),
        (['a.jpg\t"one"', f"b.jpg\t{LONE}"], ['"one"', LONE]),
    ],
)
def test_quotes_of_a_tsv_are_letters_unless_all_of_them_close(tmp_path: Path, lines: list[str], captions: list[str]) -> None:
    (tmp_path / "t.tsv").write_text("path\tcaption\n" + "\n".join(lines) + "\n")
    assert [caption for _, (caption,) in texts(tmp_path / "t.tsv")] == captions


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        (
            "t.csv",
            "path,caption\na.jpg,x\nb.jpg,a dog, running\nc.jpg,a cat, asleep, here\n",
            r"t\.csv:3: 2 of 3 rows.*line 3 has 3",
        ),
        ("t.csv", "path,caption,label\na.jpg,x\n", r"t\.csv:2: 1 of 1 rows do not have the 3 fields.*line 2 has 2"),
        ("t.csv", "path,caption\n" + "a.jpg,x,y\n" * 9, r"9 of 9 rows.*line 6 has 3 …"),
        (
            "t.csv",
            f"path,caption\na.jpg,x\nb.jpg,{LONE}\nc.jpg,y\n",
            r"t\.csv:3: the row that starts here has a quote that never",
        ),
        ("t.csv", f'path,caption\nb.jpg,{LONE}\nc.jpg,y\nd.jpg,he said no"\ne.jpg,z\n', r"t\.csv:2: .*closes in another row"),
        ("t.csv", f'caption,path\n{LONE},b.jpg\ny,c.jpg\nno",d.jpg\n', r"t\.csv:2: .*closes in another row"),
        ("t.csv", 'path,caption\na.jpg,"x" y\n', r"t\.csv:2: .*does not close at the end of its field"),
        ("t.csv", "path,label,label\na.jpg,1,2\n", "has 1 column names twice, such as 'label'"),
        ("t.csv", "path,path \na.jpg,b.jpg\n", "column names twice"),
        ("t.csv", "path,caption\n,\n", r"t\.csv:2: has no path"),
        ("t.csv", 'path\na.jpg\n""\nb.jpg\n', r"t\.csv:3: has no path"),  # as pandas writes a missing path
        ("t.csv", "path,Label\na.jpg,3\n", r"t\.csv: column 'Label' must be spelled 'label'"),
        ("t.jsonl", '{"path": "a"}\n{"path": "b", "Caption": "x"}\n', r"t\.jsonl:2: column 'Caption' must be spelled 'caption'"),
        ("t.csv", "path\nhttps://u:secret@h/a.jpg\n", r"t\.csv:2: .*not the address https://\*\*\*@h/a\.jpg.*img2dataset"),
        ("t.csv", "path\nfile:///a.jpg\n", r"t\.csv:2: .*without file://"),
        ("t.tsv", "a bus\thttp://h/a.jpg\nb\thttp://h/b.jpg\n", r"has no column 'path'.*img2dataset"),
        ("t.jsonl", '[{"path": "a"}]\n', r"t\.jsonl:1: must be an object, not list"),
        ("t.csv", "path,caption\n\n\na.jpg,x,y\n", r"t\.csv:4: "),
        ("t.csv", 'path,caption\na.jpg,"two\nlines"\nb.jpg\n', r"t\.csv:4: .*line 4 has 1"),
        ("t.csv", "path,caption\na.jpg," + "x" * (17 << 20) + "\n", r"t\.csv:2: .*more than 16777216 characters"),
        ("t.csv", "path,caption\n" + "a\0b.jpg,x\n", r"t\.csv:2: the path must be text"),
        ("t.csv", "", "has no column 'path'"),
        ("t.tsv", "path\tcaption\na.jpg\tx\ty\n", r"t\.tsv:2: 1 of 1 rows"),
        ("t.jsonl", '{"path": "a", "path": "b"}\n', r"t\.jsonl:1: is not JSON \(the key 'path' occurs twice"),
        ("t.jsonl", '{"path": "a"}\n\n{"path": 7}\n', r"t\.jsonl:3: the path must be text, not int"),
        ("t.jsonl", '{"path": "a", "caption": {"text": "x"}}\n', r"t\.jsonl:1: the caption must be text, not dict"),
        ("t.jsonl", '{"path": "a", "caption": [["x"]]}\n', r"t\.jsonl:1: the caption must be text, not list"),
        ("t.jsonl", '{"path": "a"}\n' + '{"a":' * 100_000 + "\n", r"t\.jsonl:2: is not JSON \(nested too deeply"),
        ("t.jsonl", '{"path": "a", "b": ' + "[" * 80 + "]" * 80 + "}\n", r"t\.jsonl:1: column 'b' is nested too deeply"),
        ("t.jsonl", '[{"path": "a"},\n{"path": "b"}]\n', r"t\.jsonl:1: is not JSON"),
    ],
)
def test_rows_that_do_not_fit_are_refused_with_their_line(tmp_path: Path, name: str, text: str, words: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=words):
        list(rows(tmp_path / name))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_tables_are_read_in_utf_8_or_by_their_byte_order_mark(tmp_path: Path, kind: str, encoding: str) -> None:
    delimiter = "\t" if kind == "tsv" else ","
    text = f"path{delimiter}caption\nä.jpg{delimiter}crème\n"
    if kind == "jsonl":
        text = json.dumps({"path": "ä.jpg", "caption": "crème"}, ensure_ascii=False) + "\n"
    (tmp_path / f"t.{kind}").write_bytes(text.encode(encoding))
    assert texts(tmp_path / f"t.{kind}") == [("ä.jpg", ("crème",))]


def test_other_encodings_are_refused_with_the_line(tmp_path: Path) -> None:
    for kind, first in (("csv", "path,caption"), ("jsonl", '{"path": "x"}')):
        line = "a.jpg,café" if kind == "csv" else '{"path": "a.jpg", "caption": "café"}'
        table = tmp_path / f"t.{kind}"
        table.write_bytes(f"{first}\n".encode() + b"b.jpg,x\n" * (kind == "csv") + f"{line}\n".encode("latin-1"))
        with pytest.raises(DataError, match=rf"t\.{kind}:{3 if kind == 'csv' else 2}: is not UTF-8 \(byte 0xe9\).*iconv"):
            list(rows(table))
    (tmp_path / "u.csv").write_bytes("path,caption\na.jpg,x\n".encode("utf-16-le"))
    with pytest.raises(DataError, match=r"NUL characters.*UTF-16"):
        list(rows(tmp_path / "u.csv"))
    (tmp_path / "cut.csv").write_bytes("path,caption\na.jpg,x\n".encode("utf-16")[:-1])
    with pytest.raises(DataError, match="is not valid UTF-16"):
        list(rows(tmp_path / "cut.csv"))


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("t.csv", "path, caption, label\na.jpg, c0, 3\n", ("a.jpg", ("c0",))),
        ("t.csv", 'path, caption\na.jpg, "b, c"\n', ("a.jpg", ("b, c",))),
        ("t.csv", " path ,caption \na.jpg,x\n", ("a.jpg", ("x",))),
        ("t.csv", "path;caption\na.jpg;x, y\n", ("a.jpg", ("x, y",))),
        ("t.csv", "path\tcaption\na.jpg\tx, y\n", ("a.jpg", ("x, y",))),
        ("t.csv", 'path| n| caption\na.jpg| 0| A "dog", running\n', ("a.jpg", ('A "dog", running',))),  # as Flickr30k's
        ("t.csv", 'path|caption\na.jpg|"the best seat\n', ("a.jpg", ('"the best seat',))),
        ("t.csv", "path,caption,Url,labels\na.jpg,x,http://h/a,3\n", ("a.jpg", ("x",))),
        ("t.csv", "path,caption\r\na.jpg,x\r\n", ("a.jpg", ("x",))),
        ("t.csv", "path,caption\ra.jpg,x\r", ("a.jpg", ("x",))),
        ("t.csv", "path,caption\na.jpg,x", ("a.jpg", ("x",))),
        ("t.csv", '"path","caption"\n"a.jpg","two\nlines"\n', ("a.jpg", ("two\nlines",))),
        ("t.csv", "path\na.jpg\n", ("a.jpg", ())),
        ("t.jsonl", '{"path": "a.jpg", "caption": "x"}\r\n', ("a.jpg", ("x",))),
    ],
)
def test_usual_tables_are_read(tmp_path: Path, name: str, text: str, expected: tuple[str, tuple[str, ...]]) -> None:
    (tmp_path / name).write_bytes(text.encode())
    assert texts(tmp_path / name) == [expected]


def test_a_long_caption_is_kept_whole(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(f"path,caption\na.jpg,{'word ' * 40_000}\n")
    assert [len(captions[0]) for _, captions in texts(tmp_path / "t.csv")] == [200_000]
    assert csv.field_size_limit() == 131_072, "the limit of the process is as before"


def test_parquet_types_that_are_no_table_are_refused(tmp_path: Path) -> None:
    table = tmp_path / "t.parquet"

    def write(names: list[str], *columns: object) -> None:
        parquet.write_table(pyarrow.Table.from_arrays([pyarrow.array(column) for column in columns], names=names), table)

    cases = {
        "column 'path' must contain text": (["path"], [1, 2]),
        r"row 2: has no path": (["path"], ["a", None]),
        "column names twice": (["path", "label", "label"], ["a"], [1], [2]),
        "the caption must be text, not dict": (["path", "caption"], ["a"], [{"text": "x"}]),
        "column 'image' contains bytes": (["path", "image"], ["a"], [b"\xff\xd8"]),
        "has no column 'path' \\(it has: image\\)": (["image"], [{"bytes": b"x", "path": "a"}]),
    }
    for words, (names, *columns) in cases.items():
        write(names, *columns)
        with pytest.raises(DataError, match=words):
            list(rows(table))
    write(["path", "caption", "label"], pyarrow.array(["a", "b"]).dictionary_encode(), ["x", None], [None, None])
    assert [(row.path, row.captions, row.label) for row in rows(table)] == [("a", ("x",), None), ("b", (), None)]


def test_a_table_that_is_no_file_does_not_hang(tmp_path: Path) -> None:
    for name in ("t.csv", "t.jsonl", "t.parquet"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(DataError, match="must be a regular file"):
            list(rows(tmp_path / name))


PIECES = st.sampled_from(
    [
        *("path", "caption", "label", ",", "\t", ";", '"', '""', "\n", "\r\n", "a.jpg", "b.jpg", " ", "1", "-1", "nan", "x, y"),
        *("{", "}", '{"path": "a.jpg"}', '"label": 1', "[", "]", ":", "\\ud83d", "\0", "\ufeff", "é", "\u2028"),
    ]
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(["csv", "tsv", "jsonl"]),
    data=st.one_of(
        st.binary(max_size=60),
        st.lists(PIECES, max_size=30).map(lambda parts: "".join(parts).encode()),
        st.lists(PIECES, max_size=20).map(lambda parts: ("path,caption\n" + "".join(parts)).encode()),
        st.lists(PIECES, max_size=20).map(lambda parts: ("path\tcaption\n" + "".join(parts)).encode("utf-16")),
    ),
)
def test_any_bytes_are_refused_or_every_row_is_accounted_for(tmp_path: Path, kind: str, data: bytes) -> None:
    (tmp_path / "a.jpg").write_bytes(picture(1))
    (tmp_path / f"t.{kind}").write_bytes(data)
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    try:
        read = list(rows(tmp_path / f"t.{kind}"))
        report = pack(open_source(tmp_path / f"t.{kind}"), tmp_path / "out")
    except DataError as error:
        assert not UNPRINTABLE.search(str(error))  # unassigned code points are shown as they are
        return
    assert report.account.balances and report.account.seen == len(read)
    assert report.packed == sum(row.path == "a.jpg" for row in read)


@given(
    lines=st.lists(
        st.tuples(st.sampled_from(["a.jpg", "d/b.png", "c.webp"]), st.text(max_size=12), st.sampled_from(["", "1", "cat"])),
        max_size=8,
    ),
    delimiter=st.sampled_from([",", ";", "\t"]),
)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_a_csv_writer_writes_is_read_back_or_refused_but_never_changed(
    tmp_path: Path, lines: list[tuple[str, str, str]], delimiter: str
) -> None:
    lines = [(path, clean_text(caption)[0], label) for path, caption, label in lines]
    table = tmp_path / "t.csv"
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter, quoting=csv.QUOTE_ALL)
        writer.writerows([("path", "caption", "label"), *lines])
    try:
        read = [(row.path, row.captions, row.label) for row in rows(table)]
    except DataError:
        assert any('"' in caption or "\n" in caption or "\r" in caption for _, caption, _ in lines), "plain text is always read"
        return
    assert read == [(path, (caption,) if caption.strip() else (), label) for path, caption, label in lines]


def test_columns_that_are_not_read_and_captions_in_brackets_are_named(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("path,caption,text,width,\na.jpg,\"['x', 'y']\",z,9,\nb.jpg,[sic] 'x',z,9,\n")
    source = open_source(tmp_path / "t.csv")
    assert source.remarks == ["columns kept in .json alone: text, (without a name)"]
    assert source.notes == [(f"{tmp_path / 't.csv'}:2", "caption_list")]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("path\nb/1.jpg\n", "1 missing_file.*relative paths start at the table's folder, or at one that --root names"),
        ("path\na\\1.jpg\n", "1 missing_file.*Windows paths must be written with forward slashes"),
    ],
)
def test_paths_that_lead_nowhere_have_a_hint(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(DataError, match=words):
        pack(open_source(tmp_path / "t.csv"), tmp_path / "out")


def test_a_table_without_rows_is_named(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("path,label\n")
    with pytest.raises(DataError, match=r"t\.csv: has no rows below its header"):
        open_source(tmp_path / "t.csv")


def test_a_quote_that_never_closes_costs_one_pass(tmp_path: Path) -> None:
    rows_of = "".join(f"im/{n}.jpg\tcaption {n}\t\n" for n in range(50_000))  # a scan for each row would take an hour
    (tmp_path / "t.tsv").write_text(f'path\tcaption\nim/x.jpg\t"never closed\n{rows_of}')
    with pytest.raises(DataError, match="do not have the 2 fields"):
        list(rows(tmp_path / "t.tsv"))


def test_a_line_that_ends_in_an_escaped_quote_goes_on(tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_text('path\tcaption\nim/a.jpg\t"he said ""hi""\nand left"\nim/b.jpg\t"x"\n')
    assert texts(tmp_path / "t.tsv") == [("im/a.jpg", ('he said "hi"\nand left',)), ("im/b.jpg", ("x",))]


def test_lines_of_a_caption_that_look_like_rows_are_part_of_it(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('path,caption\nim/abc,"Hello\nA dog, running\nfast"\nim/d,x\n')
    assert texts(tmp_path / "t.csv") == [("im/abc", ("Hello\nA dog, running\nfast",)), ("im/d", ("x",))]


def test_following_links_opens_no_path_that_a_table_writes(tmp_path: Path) -> None:
    for name in ("tab/in/a.jpg", "priv/secret.jpg", "store/b.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(picture(1))
    (tmp_path / "tab" / "linked").symlink_to("../store")
    table, options = tmp_path / "tab" / "t.csv", Options(follow_links=True)
    table.write_text("path\nin/a.jpg\n../priv/secret.jpg\n")
    with pytest.raises(DataError, match="--root"):
        open_source(table, options=options)
    table.write_text("path\nin/a.jpg\nlinked/b.jpg\n")
    assert pack(open_source(table, options=options), tmp_path / "out").packed == 2


@pytest.mark.parametrize("version", [None, "14.0.0"])
def test_a_missing_or_old_pyarrow_is_one_error_with_the_extra_to_install(
    version: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    if version is None:
        monkeypatch.setitem(sys.modules, "pyarrow", None)
    else:
        monkeypatch.setattr(pyarrow, "__version__", version)
    with pytest.raises(DataError, match=r"t\.parquet: pyarrow .*pip install 'fovea\[parquet\]'"):
        list(rows(tmp_path / "t.parquet"))
