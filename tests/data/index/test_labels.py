"""Labels: one rule for numbers, names and what is neither, whichever door they come through."""

from __future__ import annotations

import json
import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from pipeline.data.index.build import Fields, index_shard
from pipeline.data.index.labels import number_labels, read_label
from pipeline.data.pack.sources import Options, open_source
from pipeline.errors import DataError
from tests.data.pack.test_packer import picture
from tests.data.pack.test_sources import write_tar

RULE: list[tuple[Any, tuple[int | str | None, str]]] = [
    (3, (3, "")),
    (3.0, (3, "")),
    (Decimal("3.00"), (3, "")),
    ("3", (3, "")),
    (" 3\n", (3, "")),
    ("003", (3, "")),
    ("3.0", (3, "")),
    ("3.", (3, "")),
    ("3.000000000000000000e+00", (3, "")),
    ("+3", (3, "")),
    ("-0.0", (0, "")),
    (-1, (None, "negative_label")),
    (-1.0, (None, "negative_label")),
    ("-1", (None, "negative_label")),
    ("-100.0", (None, "negative_label")),
    (None, (None, "empty_label")),
    ("", (None, "empty_label")),
    (" \t", (None, "empty_label")),
    (math.nan, (None, "empty_label")),
    ("nan", (None, "empty_label")),
    ("NaN", (None, "empty_label")),
    (2.5, (None, "bad_label")),
    ("2.5", (None, "bad_label")),
    (math.inf, (None, "bad_label")),
    (-math.inf, (None, "bad_label")),
    (True, (None, "bad_label")),
    ([3], (None, "bad_label")),
    (10**9, (None, "bad_label")),
    ("1000000000", (None, "bad_label")),
    ("1e300", (None, "bad_label")),
    ("cat", ("cat", "")),
    ("n01440764", ("n01440764", "")),
    ("7up", ("7up", "")),
    ("\u0663", ("\u0663", "")),
    ("dog \ud83d", ("dog \\ud83d", "")),
    ("two\nlines", ("two\\x0alines", "")),
    ("cafe\u0301", ("caf\u00e9", "")),  # as macOS names folders
]


@pytest.mark.parametrize(("value", "expected"), RULE)
def test_the_rule(value: Any, expected: tuple[int | str | None, str]) -> None:
    assert read_label(value) == expected
    if isinstance(value, str):
        assert read_label(value.encode("utf-16", "surrogatepass")) == expected or "\ud83d" in value


def test_shards_read_cls_and_json_by_the_rule(tmp_path: Path) -> None:
    texts = [(value, expected) for value, expected in RULE if isinstance(value, str) and "\ud83d" not in value]
    plain = [(value, expected) for value, expected in RULE if not isinstance(value, Decimal)]
    members: list[tuple[str, bytes]] = []
    for n, (value, _) in enumerate(texts):
        members += [(f"cls{n}.jpg", picture(1)), (f"cls{n}.cls", value.encode())]
    for n, (value, _) in enumerate(plain):
        members += [(f"json{n}.jpg", picture(1)), (f"json{n}.json", json.dumps({"label": value}).encode())]
    write_tar(tmp_path / "a.tar", members)
    index = index_shard(str(tmp_path / "a.tar"), fields=Fields())
    expected = [label for _, (label, _) in (*texts, *plain)]
    assert index.columns["label"].tolist() == [label if isinstance(label, int) else -1 for label in expected]
    notes = [note or "bad_label" for _, (label, note) in (*texts, *plain) if not isinstance(label, int)]
    assert index.notes == {note: notes.count(note) for note in sorted(set(notes))}


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet", "folder"])
def test_every_door_of_packing_gives_the_same_numbers(tmp_path: Path, kind: str) -> None:
    labels = ["0", "10", "2.0", "-1", "nan"]
    for label in labels:
        path = tmp_path / "in" / (label if kind == "folder" else "") / f"{label}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(1))
    table = tmp_path / "in" / f"t.{kind}"
    values = [math.nan if label == "nan" else float(label) for label in labels]
    rows = [{"path": f"{label}.jpg", "label": value} for label, value in zip(labels, values, strict=True)]
    if kind == "jsonl":
        table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    elif kind != "folder":
        delimiter = "," if kind == "csv" else "\t"
        table.write_text(f"path{delimiter}label\n" + "".join(f"{label}.jpg{delimiter}{label}\n" for label in labels))
    source = open_source(tmp_path / "in" if kind == "folder" else table)
    actual = {Path(source.name(n)).stem: source.load(n).members.get("cls") for n in range(len(source))}
    assert actual == {"0": 0, "10": 10, "2.0": 2, "-1": None, "nan": None} and source.classes == ()
    assert sorted(note for _, note in source.notes) == ["empty_label", "negative_label"]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "folder"])
def test_names_among_numbers_are_refused_with_examples_or_taken_for_names(tmp_path: Path, kind: str) -> None:
    for label in ("1", "cat", "10"):
        path = tmp_path / "in" / (label if kind == "folder" else "") / f"{label}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(1))
    table = tmp_path / "in" / f"t.{kind}"
    if kind == "csv":
        table.write_text("path,label\n1.jpg,1\ncat.jpg,cat\n10.jpg,10\n")
    elif kind == "jsonl":
        lines = [{"path": "1.jpg", "label": 1}, {"path": "cat.jpg", "label": "cat"}, {"path": "10.jpg", "label": 10}]
        table.write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = tmp_path / "in" if kind == "folder" else table
    with pytest.raises(DataError, match=r"labels mix 1 names \('cat' in .*\) with 2 numbers \(.*1.*--labels names") as caught:
        open_source(given)
    if kind == "csv":
        assert "t.csv:3" in str(caught.value)
    source = open_source(given, options=Options(labels="names"))
    assert source.classes == ("1", "10", "cat")


def test_bad_labels_of_tables_are_refused_with_their_rows(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("path,label\na.jpg,1\nb.jpg,2.5\nc.jpg,9999999999\n")
    with pytest.raises(DataError, match=r"2 of 3 labels are neither.*t\.csv:3.*t\.csv:4"):
        open_source(table)


def test_folders_of_one_number_are_not_put_together_silently(tmp_path: Path) -> None:
    for name in ("3", "03"):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "a.jpg").write_bytes(picture(1))
    with pytest.raises(DataError, match=r"folders '03' and '3' are the same class"):
        open_source(tmp_path / "in")
    assert open_source(tmp_path / "in", options=Options(labels="names")).classes == ("03", "3")


def test_names_outside_the_given_classes_are_refused() -> None:
    labels = [("row 2", "cat"), ("row 3", "dog"), ("row 4", None)]
    numbers, names, _ = number_labels(labels, where="t", classes=("dog", "bird", "cat"))
    assert (numbers, names) == ([2, 0, None], ("dog", "bird", "cat"))
    with pytest.raises(DataError, match="not among the 1 classes of --classes: 'dog' in row 3"):
        number_labels(labels, where="t", classes=("cat",))


@given(st.lists(st.one_of(st.none(), st.integers(), st.floats(), st.text(), st.booleans()), max_size=6))
def test_any_labels_are_numbered_or_refused(values: list[Any]) -> None:
    labels = [(f"row {n}", value) for n, value in enumerate(values)]
    for mode in ("auto", "names"):
        try:
            numbers, names, notes = number_labels(labels, where="t", mode=mode)
        except DataError:
            continue
        assert len(numbers) == len(values) and all(number is None or 0 <= number < 10**9 for number in numbers)
        assert not names or {number for number in numbers if number is not None} == set(range(len(names)))
        assert {place for place, note in notes if note != "label_replaced"} == {
            f"row {n}" for n, number in enumerate(numbers) if number is None
        }
        "\n".join(names).encode()
        assert all(len(name.splitlines()) == 1 for name in names)


def test_names_that_unicode_takes_for_the_same_are_one_class(tmp_path: Path) -> None:
    composed, apart = "caf\u00e9", "cafe\u0301"
    labels = [("r1", composed), ("r2", apart), ("r3", "zoo")]
    assert number_labels(labels, where="t") == ([0, 0, 1], (composed, "zoo"), [])
    assert number_labels(labels, where="t", classes=("zoo", apart)) == ([1, 1, 0], ("zoo", composed), [])
    for name in (composed, apart):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.jpg").write_bytes(picture(1))
    with pytest.raises(DataError, match=r"are the same class, number 0\. Rename one of them, or join them$"):
        open_source(tmp_path)


def test_folder_names_that_cannot_be_written_are_noted(tmp_path: Path) -> None:
    (tmp_path / "two\nlines").mkdir()
    (tmp_path / "two\nlines" / "1.jpg").write_bytes(picture(1))
    source = open_source(tmp_path)
    assert source.classes == ("two\\x0alines",) and [note for _, note in source.notes] == ["label_replaced"]


def test_names_that_may_mean_no_label_are_remarked(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("path,label\na.jpg,None\nb.jpg,cat\nc.jpg,NULL\n")
    assert open_source(tmp_path / "t.csv").remarks == [
        "class names that may mean no label: NULL, None; leave such labels empty if they do"
    ]
