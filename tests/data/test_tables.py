"""Tables: the same rows in every format, odd values handled, mistakes named with their line."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from pipeline.data.labels import read_label
from pipeline.data.tables import rows
from pipeline.errors import DataError


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
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
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
        ("t.jsonl", '{"path": "a"\n', r"t\.jsonl:1: is no JSON"),
        ("t.parquet", "no parquet at all", "is no Parquet file"),
        ("t.xlsx", "", "is no table"),
    ],
)
def test_mistakes_are_named_with_their_place(tmp_path: Path, name: str, text: str, words: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=words):
        list(rows(tmp_path / name))
