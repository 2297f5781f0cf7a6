"""Statistics: counted rightly, duplicates as a plain count finds them, and advice where there is something to advise."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.index.build import build
from pipeline.data.index.fields import FORMATS, Fields
from pipeline.data.index.manifest import Manifest
from pipeline.data.index.shard_table import Shard, ShardTable
from pipeline.data.index.sidecar import COLUMNS, Keys, ShardIndex, make_columns
from pipeline.data.inspect.stats import PERCENTILES, statistics
from pipeline.data.pack.shard_writer import ShardWriter
from tests.data.pack.test_packer import picture


def of_rows(folder: Path, *shards: list[dict[str, int]], size: int = 300_000_000) -> Manifest:
    """A manifest of samples that were never in a shard."""
    made = []
    for number, rows in enumerate(shards):
        url = str(folder / f"s{number}.tar")
        usual = dict.fromkeys(COLUMNS, 0) | {"width": 30, "height": 20, "image_size": 1000, "format": 1, "label": -1}
        filled = [usual | row for row in rows]
        keys = Keys.of([f"{number}_{n}" for n in range(len(rows))])
        index = ShardIndex(url, size, "", Fields(), "", {}, keys, make_columns(filled))
        index.save(folder / "sidecars" / index.sidecar)
        made.append(Shard.of(index))
    return Manifest(str(folder), ShardTable.of(made, Fields()))


def test_everything_is_counted_once_and_rightly(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "x", samples_per_shard=3) as writer:
        samples: list[dict[str, Any]] = [
            {"jpg": picture(1, size=(40, 20)), "cls": 0, "txt": "four"},
            {"png": picture(2, "PNG", size=(20, 20)), "cls": 2, "txt": "größe"},
            {"jpg": picture(3, size=(20, 80)), "cls": 2, "json": {"caption": "in json"}},
            {"jpg": picture(1, size=(40, 20)), "cls": 1},
            {"jpg": b"no picture"},
        ]
        for n, sample in enumerate(samples):
            writer.write({"__key__": str(n), **sample})
    found = statistics(build(writer.shards, tmp_path / "index"), global_batch=2)
    assert (found.shards, found.samples, found.left_out) == (2, 4, {"not_image": 1})
    assert found.formats == {"jpeg": 3, "png": 1}
    assert found.captions == {"text": 2, "none": 1, "json": 1}
    assert (found.labelled, found.classes, found.empty_classes) == (4, 3, 0)
    assert found.largest == ((2, 2), (0, 1), (1, 1))
    assert found.spreads["width"].percentiles[0] == 20 and found.spreads["width"].percentiles[-1] == 40
    assert found.spreads["aspect"].percentiles[0] == 0.25 and found.spreads["aspect"].percentiles[-1] == 2
    assert found.spreads["caption"].percentiles[0] == 4 and found.spreads["caption"].percentiles[-1] == len("größe".encode())
    assert found.spreads["area"].mean == pytest.approx(900e-6)
    assert (found.duplicates.pictures, found.duplicates.superfluous, found.duplicates.labels_differ) == (1, 1, 1)
    assert found.duplicates.examples == ((("x-00000.tar", "0"), ("x-00001.tar", "3")),)
    assert (found.order["streams"], found.order["ranks"], found.order["steps_per_epoch"]) == (2, [1, 2], 2)
    text, document = found.text(), json.loads(json.dumps(found.document()))
    assert "x-00000.tar 0  =  x-00001.tar 3" in text and "4 samples in 2 shards" in text
    assert document["spreads"]["height"]["50"] == 20 and len(document["spreads"]["height"]) == len(PERCENTILES) + 2


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 2), st.integers(0, 1)), max_size=8), min_size=1, max_size=4))
def test_duplicates_are_those_of_a_plain_count(tmp_path_factory: Any, shards: list[list[tuple[int, int, int]]]) -> None:
    if not any(shards):
        return
    folder = tmp_path_factory.mktemp("stats")
    rows = [[{"crc32": crc, "image_size": size, "label": label} for crc, size, label in shard] for shard in shards]
    found = statistics(of_rows(folder, *rows)).duplicates
    groups = Counter((crc, size) for shard in shards for crc, size, _ in shard)
    several = {identity for identity, n in groups.items() if n > 1}
    labels = {i: {label for shard in shards for crc, size, label in shard if (crc, size) == i} for i in several}
    assert (found.pictures, found.superfluous) == (len(several), sum(groups[i] - 1 for i in several))
    assert found.labels_differ == sum(len(numbers) > 1 for numbers in labels.values())
    named = [(int(key.split("_")[0]), int(key.split("_")[1])) for places in found.examples for _, key in places]
    for places in found.examples:
        at = [tuple(map(int, key.split("_"))) for _, key in places]
        assert len({shards[shard][row][:2] for shard, row in at}) == 1 and at == sorted(at)
    assert len(named) == len(set(named))


def test_advice_is_given_where_there_is_something_to_say(tmp_path: Path) -> None:
    rows = [[{"crc32": 8 * shard + n, "label": 0} for n in range(8)] for shard in range(8)]
    fine = statistics(of_rows(tmp_path, *rows), global_batch=32)
    assert fine.advice == () and fine.order["streams"] == 32
    small = statistics(of_rows(tmp_path, *rows, size=30_000_000), global_batch=32)
    assert any("shards of 30 MB are small" in sentence for sentence in small.advice)
    large = statistics(of_rows(tmp_path, *rows, size=3_000_000_000), global_batch=32)
    assert any("shards of 3 GB are large" in sentence for sentence in large.advice)
    assert any("with 2 shards" in sentence for sentence in statistics(of_rows(tmp_path, *rows[:2]), global_batch=4).advice)
    assert any(
        "3 streams only" in s or "1 streams only" in s for s in statistics(of_rows(tmp_path, *rows), global_batch=33).advice
    )
    assert any("do not make one global batch" in s for s in statistics(of_rows(tmp_path, *rows), global_batch=100).advice)
    manifest = of_rows(tmp_path, *rows)
    broken = replace(manifest.shards[0], counts={"ok": 8, "truncated": 5})
    told = statistics(replace(manifest, shards=ShardTable.of((broken, *manifest.shards[1:]), Fields())), global_batch=32)
    assert told.left_out == {"truncated": 5} and any("5 samples cannot be used" in sentence for sentence in told.advice)


def test_formats_are_called_by_their_names(tmp_path: Path) -> None:
    found = statistics(of_rows(tmp_path, [{"format": FORMATS.index("webp"), "crc32": 1}, {"format": FORMATS.index("png")}]))
    assert found.formats == {"png": 1, "webp": 1}
