"""Looking the order up: a step's keys, and a key's steps, are what training is given."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from launch.cli import shards_ls as ls
from pipeline.config.load import Loaded, load
from pipeline.data.inputs import prepare
from pipeline.data.loader.encoded_batches import StepDataset
from pipeline.data.loader.reader import Reader
from pipeline.data.pack import synthetic as scenes
from pipeline.errors import ConfigError, DataError
from tests.helpers.runs import TOY


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    scenes.write(folder, train=60, val=1, size=32, samples_per_shard=20)
    last = folder / "scenes-train-00002.tar"
    whole = last.rename(folder / "whole.tmp")
    with tarfile.open(whole) as source, tarfile.open(last, "w") as tar:
        entry = tarfile.TarInfo("broken.jpg")
        entry.size = 4
        tar.addfile(entry, io.BytesIO(b"nope"))
        for member in source:
            tar.addfile(member, source.extractfile(member))
    return folder


@pytest.fixture(params=["plain", "mixed"])
def loaded(request: pytest.FixtureRequest, shards: Path, tmp_path: Path) -> Loaded:
    (tmp_path / "toy.yaml").write_text(TOY)
    sets = (
        f"[{{name: few, shards: {shards}/scenes-train-00000.tar, repeat: 2}}, {{name: many, shards: '{shards}/*-0000[12].tar'}}]"
    )
    data = [f"data.shards={shards}/scenes-train-*.tar"] if request.param == "plain" else [f"data.sources={sets}"]
    return load(tmp_path / "toy.yaml", [*data, f"data.index={tmp_path / 'index'}", f"run.directory={tmp_path / 'run'}"])


def told(capsys: pytest.CaptureFixture[str], loaded: Loaded, **wanted: Any) -> Any:
    ls.run(loaded, as_json=True, **wanted)
    return json.loads(capsys.readouterr().out)


def test_a_step_lists_what_its_ranks_read(loaded: Loaded, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = prepare(loaded.config, 2)
    document = told(capsys, loaded, step=9)
    rows = document["samples"]
    assert (document["ranks"], document["fingerprint"]) == (2, inputs.train.fingerprint)
    assert [row["place"] for row in rows] == list(range(16))
    for rank in range(2):
        portion = StepDataset(Reader(inputs.train), inputs.order, (), seed=7, world=2, rank=rank)[9]
        mine = [row for row in rows if row["rank"] == rank]
        assert [(row["key"], row["id"]) for row in mine] == [(record.key, record.id) for record in portion.records]
        assert [row["epoch"] for row in mine] == portion.epochs.tolist()
        assert [row["shard"] for row in mine] == [record.shard_name for record in portion.records]
    assert [row["stream"] for row in rows] == [place // 4 for place in range(16)]
    sets = {row["set"] for row in rows}
    assert sets == ({"few", "many"} if inputs.sources else {None})
    assert all((row["set"] == "few") == (row["shard"] == "scenes-train-00000.tar") for row in rows if row["set"])
    four = told(capsys, loaded, step=9, ranks=4)["samples"]
    assert [row["key"] for row in four] == [row["key"] for row in rows]
    assert [row["rank"] for row in four] == [place // 4 for place in range(16)]


def test_a_key_is_found_in_the_steps_that_hold_it(loaded: Loaded, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = prepare(loaded.config, 2)
    steps = {step: told(capsys, loaded, step=step)["samples"] for step in range(11)}
    behind = inputs.train.rows(2).keys[3]  # behind a sample that was left out, which takes no number
    assert [row["step"] for row in told(capsys, loaded, key=behind, until=11)["seen"]] == [
        step for step, rows in steps.items() for row in rows if row["key"] == behind
    ]
    key = inputs.train.rows(0).keys[3]
    found = told(capsys, loaded, key=key, until=11)
    expected = [{"step": step, **row} for step, rows in steps.items() for row in rows if row["key"] == key]
    assert found["seen"] == expected
    assert len(expected) >= 3
    last = told(capsys, loaded, key=key, epochs=1)
    assert last["steps"] == -(-inputs.order.samples_per_epoch // 16)
    assert told(capsys, loaded, key=f"scenes-train-00000.tar/{key}", until=11)["seen"] == expected
    with pytest.raises(DataError, match="no shard has a sample with the key"):
        ls.run(loaded, key=f"scenes-train-00001.tar/{key}")


def test_what_was_left_out_or_replaced_is_told(loaded: Loaded, capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, loaded, key="broken")
    assert found["seen"] == []
    assert found["left_out"] == [{"shard": "scenes-train-00002.tar", "status": "not_image"}]
    row = told(capsys, loaded, step=2)["samples"][5]
    bad_samples = loaded.config.run.folder / "bad_samples" / "rank-1.jsonl"
    bad_samples.parent.mkdir(parents=True)
    bad_samples.write_text(json.dumps({"step": 2, "id": row["id"], "reason": "corrupt"}) + '\n{"step": 3, "i')
    assert [r["place"] for r in told(capsys, loaded, step=2)["samples"] if r["replaced"] == "corrupt"] == [5]
    assert [r["step"] for r in told(capsys, loaded, key=row["key"], until=9)["seen"] if r["replaced"]] == [2]


def test_tables_are_plain_and_aligned(loaded: Loaded, capsys: pytest.CaptureFixture[str]) -> None:
    ls.run(loaded, step=0)
    about, head, *rows = capsys.readouterr().out.splitlines()
    assert about.startswith("step 0: 16 samples of ")
    assert about.endswith("2 ranks")
    assert head.split() == [
        "place",
        "rank",
        "stream",
        *(["set"] if loaded.config.data.sources else []),
        "epoch",
        "shard",
        "row",
        "key",
    ]
    assert len(rows) == 16
    assert len({row.index("scenes-train") for row in rows}) == 1
    ls.run(loaded, key=rows[0].split()[-1], until=1)
    about, head, _ = capsys.readouterr().out.splitlines()
    assert about.endswith("seen 1 times in steps 0 to 0")
    ls.run(loaded, key="broken")
    (line,) = capsys.readouterr().out.splitlines()
    assert "left out of scenes-train-00002.tar by the index (not_image)" in line


def test_questions_that_make_no_sense_are_refused(loaded: Loaded) -> None:
    for wanted in ({}, {"step": 1, "key": "x"}):
        with pytest.raises(ConfigError, match="one of them"):
            ls.run(loaded, **wanted)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="negative"):
        ls.run(loaded, step=-1)
    with pytest.raises(ConfigError, match="3 ranks"):
        ls.run(loaded, step=1, ranks=3)


def test_keys_that_cannot_be_written_are_shown_with_escapes() -> None:
    lines = ls.table([{"step": 1, "key": "caf\udce9\x1b[31m"}], ("step", "key"))
    assert lines[1] == "   1  caf\\xe9\\x1b[31m"
