"""A narrowed index is the one that would have been built, without reading a shard."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from pipeline.data import storage
from pipeline.data.index.build import build
from pipeline.data.index.fields import Fields
from pipeline.data.index.filters import narrow
from pipeline.data.index.manifest import Manifest
from pipeline.data.index.shard_table import Shard
from pipeline.errors import DataError
from tests.data.index.test_build import picture, shard


@pytest.fixture
def url(tmp_path: Path) -> str:
    members = [
        ("all.jpg", picture(seed=1)),
        ("all.txt", b"said"),
        ("all.cls", b"3"),
        ("mute.jpg", picture(seed=2)),
        ("mute.cls", b"4"),
        ("blank.jpg", picture(seed=3)),
        ("blank.txt", b" "),
        ("json.jpg", picture(seed=4)),
        ("json.json", b'{"caption": ["", "x"]}'),
        ("bad.jpg", b"no"),
        ("twice.jpg", picture(seed=5)),
        ("twice.jpg", picture(seed=5)),
    ]
    return shard(tmp_path / "a.tar", members)


@pytest.mark.parametrize("require", [("caption",), ("label",), ("caption", "label"), ("segmentation", "caption")])
def test_it_is_what_the_stricter_rules_would_have_built(url: str, tmp_path: Path, require: tuple[str, ...]) -> None:
    wide = build([url], tmp_path / "wide")
    if "segmentation" in require:
        with pytest.raises(DataError, match=r"no sample can be used: .* missing_segmentation"):
            narrow(wide, tmp_path / "wide" / "narrow", require)
        return
    strict = build([url], tmp_path / "strict", fields=Fields(require=require))
    os.remove(url)
    storage.forget()
    narrowed = narrow(wide, tmp_path / "wide" / "narrow", require)
    assert (narrowed.fingerprint, narrowed.counts, narrowed.fields) == (strict.fingerprint, strict.counts, strict.fields)
    assert Manifest.load(tmp_path / "wide" / "narrow").rows(0).keys == strict.rows(0).keys
    assert np.array_equal(narrowed.ids(), strict.ids())
    assert wide.rows(0).keys == Manifest.load(tmp_path / "wide").rows(0).keys
    assert wide.total > narrowed.total


def test_a_narrower_index_of_the_same_samples_is_kept(url: str, tmp_path: Path) -> None:
    wide = build([url], tmp_path / "wide")
    read: list[int] = []

    def progress(done: int, total: int, shard: Shard) -> None:
        read.append(done)

    first = narrow(wide, tmp_path / "wide" / "narrow", ("caption",), progress)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npz")}
    assert read == [1] and len(before) == 5
    again = narrow(wide, tmp_path / "wide" / "narrow", ("caption",), progress)
    assert read == [1] and again == first and again.rows(0).keys == ("all", "json")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npz")} == before
    (tmp_path / "wide" / "narrow" / "manifest.npz").write_bytes(b"damaged")
    assert narrow(wide, tmp_path / "wide" / "narrow", ("caption",)).rows(0).keys == ("all", "json")
    other = build([url], tmp_path / "wide", fields=Fields(min_side=8))
    assert narrow(other, tmp_path / "wide" / "narrow", ("caption",)).fields == Fields(min_side=8, require=("caption",))
