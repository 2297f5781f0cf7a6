"""Columns of metadata: what a value is, hostile JSON, what a batch holds, which columns a data set has."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.data.index.build import build
from pipeline.data.index.manifest import Manifest
from pipeline.data.inspect.columns import columns_of
from pipeline.data.loader.columns import ColumnReader, JsonReader, parse_columns
from pipeline.data.loader.reader import Reader
from pipeline.data.storage import Storage
from pipeline.errors import DataError
from pipeline.untrusted import plain_value

HOSTILE: dict[str, bytes | None] = {
    "none": None,
    "empty": b"",
    "text": b"site: a",
    "list": b'["site", "a"]',
    "number": b"7",
    "cut": b'{"site": "a"',
    "deep": b'{"site": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "long": b'{"site": "' + b"a" * 1000 + b'"}',
    "huge": b'{"x": "' + b" " * (2 << 20) + b'", "site": "a"}',
    "digits": b'{"site": ' + b"9" * 10_000 + b"}",
    "nan": b'{"site": NaN}',
    "infinite": b'{"site": -Infinity}',
    "null": b'{"site": null}',
    "object": b'{"site": {"a": "a"}}',
    "unknown": b'{"site": "elsewhere"}',
    "escape": b'{"site": "\\u001b[2Ja"}',
    "surrogate": b'{"site": "\\ud800"}',
    "bytes": b'{"site": "\xff\xfe"}',
    "no column": b'{"place": "a"}',
}
FINE: dict[str, tuple[bytes, int]] = {
    "plain": (b'{"site": "a", "more": [1, 2]}', 0),
    "space, UTF-16": ('{"site": " b\\u00a0"}'.encode("utf-16"), 1),
    "three": (b'{"site": 3}', 2),
    "three as text": (b'{"site": "3"}', 2),
    "three as float": (b'{"site": 3.0}', 2),
    "true": (b'{"site": true}', 3),
    "twice": (b'{"site": "a", "site": "b"}', 1),
}
VALUES = ("a", "b", "3", "true")


def image() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (90, 120, 30)).save(buffer, "PNG")
    return buffer.getvalue()


def shards(folder: Path, members: dict[str, bytes | None]) -> Manifest:
    """A shard in which every second sample has its JSON in front of its image."""
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / "a.tar", "w") as tar:
        for number, data in enumerate(members.values()):
            parts = [("png", image()), *([("json", data)] if data is not None else [])]
            for extension, content in parts if number % 2 else parts[::-1]:
                info = tarfile.TarInfo(f"s{number:03d}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return build([str(folder / "a.tar")], folder / "index")


def test_values_are_numbered_and_hostile_json_is_a_missing_value(tmp_path: Path) -> None:
    members = {**HOSTILE, **{name: data for name, (data, _) in FINE.items()}}
    manifest = shards(tmp_path / "in", members)
    assert manifest.total == len(members)
    reader: ColumnReader = pickle.loads(pickle.dumps(ColumnReader(manifest, {"site": VALUES})))
    records = reader.fetch(manifest.ids(np.arange(manifest.total)))
    for name, record in zip(members, records, strict=True):
        assert record.image == image() and record.status == "ok", name
        assert not record.members, "bytes are not sent between processes"
        assert record.values == ({"site": FINE[name][1]} if name in FINE else {}), name


def test_without_columns_nothing_but_the_parts_is_read(tmp_path: Path) -> None:
    manifest = shards(tmp_path / "in", {"a": b'{"site": "a"}'})
    (record,) = Reader(manifest).fetch(manifest.ids(np.arange(1)))
    assert record.values == {} and record.members == {} and Reader.columns == ()
    (whole,) = JsonReader(manifest).fetch(manifest.ids(np.arange(1)))
    assert parse_columns(whole.members["json"]) == {"site": "a"}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (" a\n", "a"),
        ("e\u0301", "\u00e9"),
        (0, "0"),
        (-3, "-3"),
        (2.5, "2.5"),
        (1e300, "1e+300"),
        (False, "false"),
        ("x" * 200, "x" * 200),
        *((missing, None) for missing in ("", "  ", "x" * 201, float("nan"), float("inf"), 1 << 60, None, [], {}, b"a")),
    ],
)
def test_a_plain_value_is_text_and_reads_as_itself(value: Any, text: str | None) -> None:
    assert plain_value(value) == text
    if text is not None:
        assert plain_value(text) == text


def test_columns_of_a_data_set_are_counted_and_an_absent_one_is_refused_with_them(tmp_path: Path) -> None:
    about: dict[str, bytes | None] = {
        str(n): json.dumps({"site": "ab"[n % 2], "serial": n, "one": 1, "\x1b": 1, "k" * 100: 2}).encode() for n in range(300)
    }
    manifest = shards(tmp_path / "in", {**about, "none": None})
    seen = columns_of(manifest, Storage(), most=10_000)
    assert (seen.samples, seen.of) == (301, 301) and seen.values["site"] == {"a": 150, "b": 150}
    assert set(seen.values) == {"site", "serial", "one"} and len(seen.values["serial"]) == 257
    some = columns_of(manifest, Storage(), most=16)
    assert some.samples == 16 and sum(some.values["site"].values()) in (15, 16)
    with pytest.raises(
        DataError, match=r"no column 'scanner' in the JSON of 301 samples.*'one', 'serial', 'site'.*Choose one of 'site'"
    ):
        seen.require("scanner")
    with pytest.raises(DataError, match="there are none"):
        columns_of(shards(tmp_path / "bare", {"none": None}), Storage(), most=4).require("site")
