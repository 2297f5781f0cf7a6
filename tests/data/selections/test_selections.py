"""A selection decides which samples of an index occur and how often; one of other data, or a changed one, is refused."""

from __future__ import annotations

import json
import os
import pickle
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from pipeline.config.load import load
from pipeline.data import ShardDataset
from pipeline.data.index.manifest import Manifest
from pipeline.data.indexing import Indexer
from pipeline.data.inputs import Inputs, data_identity, prepare
from pipeline.data.loader.reader import Reader
from pipeline.data.pack.members import Members
from pipeline.data.pack.sources import Options, open_source
from pipeline.data.selections.apply import Chosen, select
from pipeline.data.selections.file import Part, Selection, SelectionInfo, write_selection
from pipeline.data.selections.packed import selected_members
from pipeline.errors import DataError
from tests.helpers import library
from tests.helpers.runs import ROOT, TOY, command, environment, recorded, train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    library.make(folder)
    return folder


Inputs_of = Callable[..., Inputs]


@pytest.fixture
def inputs(folder: Path, tmp_path: Path) -> Inputs_of:
    """Prepares the data of a run over a-*.tar."""
    (tmp_path / "toy.yaml").write_text(TOY)

    def make(*overrides: str, shards: str = f"{folder}/a-*.tar", world: int = 2) -> Inputs:
        config = load(tmp_path / "toy.yaml", [f"data.shards={shards}", f"data.index={tmp_path / 'index'}", *overrides]).config
        return prepare(config, world)

    return make


def everything(manifest: Manifest) -> dict[int, np.ndarray]:
    return {shard: np.arange(n) for shard, n in enumerate(manifest.sizes.tolist())}


def save(path: Path, manifest: Manifest, rows: dict[int, list[int]], weight: float = 1.0) -> SelectionInfo:
    parts = [Part(shard, np.array(chosen), np.full(len(chosen), weight)) for shard, chosen in rows.items()]
    return write_selection(path, parts, fingerprint=manifest.fingerprint, total=manifest.total, made={"by": "a test"})


def keys(inputs: Inputs, steps: int) -> list[str]:
    reader = Reader(inputs.train, wants=())
    return [record.key for step in range(steps) for record in reader.fetch(inputs.order.batch(step).ids)]


ROWS = {0: [0, 3, 4, 19], 2: [1, 2, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 17]}


def test_only_selected_samples_occur_each_once_in_an_epoch(inputs: Inputs_of, tmp_path: Path) -> None:
    whole = inputs()
    save(tmp_path / "some.parquet", whole.train, ROWS)
    some = inputs(f"data.selection={tmp_path / 'some.parquet'}")
    expected = {whole.train.rows(shard).keys[row] for shard, rows in ROWS.items() for row in rows}
    assert some.train.total == 18 and some.train.counts["unselected"] == 53 - 18
    assert some.train.sizes.tolist() == [4, 0, 14]
    dataset = some.order.datasets[0]
    reader = Reader(some.train, wants=())
    ids, _ = dataset._ids(0, np.arange(dataset.total))
    assert Counter(record.key for record in reader.fetch(ids)) == Counter(expected)
    assert set(keys(some, 12)) <= expected
    assert some.train.fingerprint != whole.train.fingerprint


def test_a_part_of_a_packing_takes_of_a_selection_what_concerns_its_shards(
    inputs: Inputs_of, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = inputs().train
    save(tmp_path / "some.parquet", whole, ROWS, weight=2.0)
    source = open_source(f"{folder}/a-*.tar", options=Options(part=(1, 3)))
    assert isinstance(source, Members)
    read: list[int] = []
    column = Manifest.column
    monkeypatch.setattr(Manifest, "column", lambda own, shard, name: read.append(shard) or column(own, shard, name))
    packed = selected_members(source, whole, [tmp_path / "some.parquet"])
    assert read == [0] and sorted(packed.keys) == sorted(whole.rows(0).keys[row] for row in ROWS[0])
    assert packed.remarks[-1].startswith(f"{len(ROWS[0])} samples have a weight other than 1")


def test_the_files_of_shards_without_selected_samples_are_never_opened(inputs: Inputs_of, tmp_path: Path, folder: Path) -> None:
    whole = inputs()
    save(tmp_path / "some.parquet", whole.train, ROWS)
    some = inputs(f"data.selection={tmp_path / 'some.parquet'}")
    used = some.order.shards(0, 20)
    assert set(used) == {0, 2}


def test_weights_repeat_and_thin(inputs: Inputs_of, tmp_path: Path) -> None:
    whole = inputs()
    rows = {0: list(range(20)), 1: list(range(15))}
    parts = [Part(0, np.arange(20), np.full(20, 2.0)), Part(1, np.arange(15), np.full(15, 0.2 + 1 / 65536))]
    write_selection(tmp_path / "w.parquet", parts, fingerprint=whole.train.fingerprint, total=53, made={})
    some = inputs(f"data.selection={tmp_path / 'w.parquet'}")
    assert some.order.total == 43
    counter = Counter(keys(some, some.order.steps_per_epoch * 30))
    often, seldom = (sum(counter[whole.train.rows(s).keys[r]] for r in rows[s]) / len(rows[s]) for s in (0, 1))
    assert often / seldom == pytest.approx(10, rel=0.1)


def test_several_selections_are_what_all_of_them_select_with_multiplied_weights(inputs: Inputs_of, tmp_path: Path) -> None:
    whole = inputs()
    save(tmp_path / "a.parquet", whole.train, {0: list(range(10)), 1: list(range(15))}, 1.5)
    save(tmp_path / "b.parquet", whole.train, {0: list(range(5, 20)), 1: list(range(15))}, 2.0)
    both = inputs(f"data.selection=['{tmp_path / 'a.parquet'}','{tmp_path / 'b.parquet'}']")
    assert both.train.sizes.tolist() == [5, 15, 0]
    assert both.order.total == 60
    assert both.train.rows(0).keys == tuple(whole.train.rows(0).keys[5:10])


def test_a_selection_of_all_with_weight_one_is_the_order_without_it(inputs: Inputs_of, tmp_path: Path) -> None:
    whole = inputs()
    save(tmp_path / "all.parquet", whole.train, {s: r.tolist() for s, r in everything(whole.train).items()})
    same = inputs(f"data.selection={tmp_path / 'all.parquet'}")
    assert data_identity(same) == data_identity(whole)
    assert np.array_equal(same.order.batch(5).ids, whole.order.batch(5).ids)


def test_the_rows_mean_the_same_samples_when_captions_are_required(tmp_path: Path) -> None:
    members = {f"{n:02}": {"jpg": library.jpeg(n), **({"txt": b"x"} if n % 3 else {})} for n in range(12)}
    library.write(tmp_path / "c.tar", members)
    indexer = Indexer(load("clip/cifar10_small", [f"data.shards={tmp_path}/c.tar", f"data.index={tmp_path / 'index'}"]).config)
    wide = indexer.one([f"{tmp_path}/c.tar"])
    save(tmp_path / "s.parquet", wide, {0: [0, 1, 2, 3, 7]})
    chosen = select(wide, [Chosen(0, 1, (tmp_path / "s.parquet",))], ("caption",))
    assert chosen.rows(0).keys == ("01", "02", "07")
    assert chosen.counts == {"ok": 3, "missing_caption": 4, "unselected": 5}
    assert Manifest.load(chosen.directory).rows(0).keys == ("01", "02", "07")


def test_a_bad_sample_is_substituted_by_a_selected_one(inputs: Inputs_of, tmp_path: Path) -> None:
    save(tmp_path / "some.parquet", inputs().train, ROWS)
    some = inputs(f"data.selection={tmp_path / 'some.parquet'}")
    reader = Reader(some.train)
    chosen = {reader.substitute(2 << 32 | row, epoch, 0, 0) & 0xFFFFFFFF for row in range(14) for epoch in range(20)}
    assert chosen == set(range(14))


def test_each_data_set_of_a_mixture_has_its_own(inputs: Inputs_of, tmp_path: Path, folder: Path) -> None:
    b = inputs(shards=f"{folder}/b-*.tar", world=1).train
    save(tmp_path / "b.parquet", b, {0: [2, 4, 6, 8]}, 2.5)
    sources = [
        {"name": "a", "shards": [f"{folder}/a-*.tar"]},
        {"name": "b", "shards": [f"{folder}/b-*.tar"], "selection": str(tmp_path / "b.parquet")},
    ]
    mixed = inputs("data.shards=[]", f"data.sources={json.dumps(sources)}")
    assert mixed.train.sizes.tolist() == [20, 15, 18, 4]
    assert mixed.order.samples_per_epoch == 52 + 8  # 53 and 10 samples in four streams
    assert data_identity(mixed)["selection"]
    wrong = [sources[0] | {"selection": str(tmp_path / "b.parquet")}, sources[1]]
    with pytest.raises(DataError, match="belongs to other data"):
        inputs("data.shards=[]", f"data.sources={json.dumps(wrong)}")


def test_the_loader_as_a_library_obeys_it_and_keeps_its_place(folder: Path, tmp_path: Path, inputs: Inputs_of) -> None:
    save(tmp_path / "some.parquet", inputs().train, ROWS)

    def make(**selection: Any) -> ShardDataset:
        options = {"index": tmp_path / "index", "canonical_streams": 2, **selection}
        return ShardDataset(f"{folder}/a-*.tar", global_batch_size=4, seed=1, **options)

    chosen = {"selection": tmp_path / "some.parquet"}
    first = [sample["__key__"] for sample in make(**chosen)]
    assert (
        len(first) == 20
        and len(set(first)) == 18
        and set(first) <= set(keys(inputs(f"data.selection={tmp_path / 'some.parquet'}"), 30))
    )
    dataset = make(**chosen)
    stream = iter(dataset)
    taken = [next(stream)["__key__"] for _ in range(5)]
    other = make(**chosen)
    other.load_state_dict(dataset.state_dict())
    assert taken + [sample["__key__"] for sample in other] == first
    with pytest.raises(DataError, match="selection or sources"):
        make().load_state_dict(dataset.state_dict())


def test_other_data_are_refused(inputs: Inputs_of, tmp_path: Path, folder: Path) -> None:
    save(tmp_path / "b.parquet", inputs(shards=f"{folder}/b-*.tar", world=1).train, {0: list(range(18))})
    with pytest.raises(DataError, match=r"the selection belongs to other data: an index of 20 samples .* not 53"):
        inputs(f"data.selection={tmp_path / 'b.parquet'}")


def test_too_few_selected_samples_are_refused(inputs: Inputs_of, tmp_path: Path) -> None:
    save(tmp_path / "few.parquet", inputs().train, {0: [1, 2]})
    with pytest.raises(DataError, match="2 usable samples are fewer than one global batch of 16"):
        inputs(f"data.selection={tmp_path / 'few.parquet'}")


def _rewritten(path: Path, change: Callable[[pyarrow.Table], pyarrow.Table]) -> None:
    table = parquet.read_table(path)
    metadata = parquet.ParquetFile(path).metadata.metadata
    parquet.write_table(change(table).replace_schema_metadata(metadata), path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.slice(1), "checksum"),
        (lambda t: t.take(list(range(len(t)))[::-1]), "in order"),
        (lambda t: pyarrow.concat_tables([t.slice(0, 1), t]), "in order"),
        (lambda t: t.set_column(2, "weight", pyarrow.array([2.0] * len(t))), "checksum"),
        (lambda t: t.set_column(2, "weight", pyarrow.array([float("nan")] * len(t))), "weights must lie between"),
        (lambda t: t.set_column(2, "weight", pyarrow.array([-1.0] * len(t))), "weights must lie between"),
        (lambda t: t.set_column(2, "weight", pyarrow.array(["1"] * len(t))), "unexpected type"),
        (lambda t: t.set_column(1, "row", pyarrow.array([None] * len(t), pyarrow.int64())), "missing"),
        (lambda t: t.set_column(1, "row", pyarrow.array(range(100, 100 + len(t)), pyarrow.int64())), "does not exist"),
        (lambda t: t.set_column(0, "shard", pyarrow.array([7] * len(t), pyarrow.int32())), "does not exist|in order"),
        (lambda t: t.drop_columns(["weight"]), "must be a selection"),
    ],
)
def test_a_changed_file_is_refused(
    inputs: Inputs_of, tmp_path: Path, change: Callable[[pyarrow.Table], pyarrow.Table], message: str
) -> None:
    path = tmp_path / "some.parquet"
    save(path, inputs().train, ROWS)
    _rewritten(path, change)
    with pytest.raises(DataError, match=message):
        inputs(f"data.selection={path}")


def test_a_file_that_is_changed_after_its_first_use_is_refused(inputs: Inputs_of, tmp_path: Path) -> None:
    path = tmp_path / "some.parquet"
    save(path, inputs().train, ROWS)
    some = inputs(f"data.selection={path}")
    assert data_identity(inputs(f"data.selection={path}")) == data_identity(some)
    _rewritten(path, lambda table: table.slice(1))
    with pytest.raises(DataError, match="checksum"):
        inputs(f"data.selection={path}")


def test_no_more_rows_are_read_than_a_file_claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.data.selections.file._CHUNK", 4)
    path = tmp_path / "s.parquet"
    write_selection(path, [Part(0, np.arange(8), np.ones(8))], fingerprint="a", total=8, made={})
    _rewritten(path, lambda t: t.take([0] * 100).set_column(1, "row", pyarrow.array(range(100), pyarrow.int64())))
    read: list[int] = []
    chunks = Selection._chunks
    counted = lambda self: (read.append(len(chunk[0])) or chunk for chunk in chunks(self))  # noqa: E731
    monkeypatch.setattr(Selection, "_chunks", counted)
    with pytest.raises(DataError, match="checksum"):
        Selection(path).verify()
    assert sum(read) == 12
    with pytest.raises(DataError, match="8 samples of 7"):
        write_selection(path, [Part(0, np.arange(8), np.ones(8))], fingerprint="a", total=7, made={})
        Selection(path)


def test_random_bytes_in_a_file_are_reported_or_harmless(inputs: Inputs_of, tmp_path: Path) -> None:
    path = tmp_path / "some.parquet"
    save(path, inputs().train, ROWS)
    content, draw = path.read_bytes(), random.Random(0)
    whole = [(part.shard, part.rows.tolist(), part.weights.tolist()) for part in Selection(path).parts()]
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(draw.choice([1, 1, 4])):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        path.write_bytes(bytes(damaged[: draw.choice([len(damaged), len(damaged), draw.randrange(len(damaged))])]))
        try:
            read = [(part.shard, part.rows.tolist(), part.weights.tolist()) for part in Selection(path).parts()]
        except DataError:
            continue
        assert read == whole


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" * 100, b"shard,row\n0,1\n"])
def test_what_is_no_selection_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.parquet"
    path.write_bytes(content)
    with pytest.raises(DataError):
        Selection(path)
    with pytest.raises(DataError, match="cannot be read"):
        Selection(tmp_path / "absent.parquet")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="regular file"):
        Selection(tmp_path / "pipe")


def test_nothing_selected_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing would be selected"):
        write_selection(tmp_path / "x.parquet", [], fingerprint="a", total=1, made={})
    assert not list(tmp_path.iterdir())


def test_lost_or_damaged_derived_rows_are_made_again_or_reported(inputs: Inputs_of, tmp_path: Path) -> None:
    path = tmp_path / "some.parquet"
    save(path, inputs().train, ROWS, 1.5)
    some = inputs(f"data.selection={path}")
    some.train.selected_file.unlink()
    again = inputs(f"data.selection={path}")
    assert data_identity(again) == data_identity(some)
    content = bytearray(again.train.selected_file.read_bytes())
    at = content.index(np.array(ROWS[2], dtype=np.uint32).tobytes())
    content[at] ^= 1
    again.train.selected_file.write_bytes(content)
    with pytest.raises(DataError, match="rows of the selection are missing or damaged"):
        pickle.loads(pickle.dumps(again.train)).rows(2)


def test_a_run_resumes_on_its_selection_and_not_on_another(shards: str, config: Path, tmp_path: Path) -> None:
    manifest = Indexer(load(config, [f"data.shards={shards}", f"data.index={tmp_path / 'index'}"]).config).one([shards])
    half = {shard: list(range(0, n, 2)) for shard, n in enumerate(manifest.sizes.tolist())}
    save(tmp_path / "half.parquet", manifest, half, 1.5)
    save(tmp_path / "other.parquet", manifest, half, 1.25)
    with_half = f"data.selection={tmp_path / 'half.parquet'}"
    straight = train(config, shards, tmp_path / "straight", with_half)
    assert straight.returncode == 0, straight.stderr + straight.stdout
    run = tmp_path / "run"
    words = command(config, shards, run, with_half, "launch.num_processes=1")
    with subprocess.Popen(words, env=environment(), cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as first:
        while first.poll() is None and max(recorded(run, 0), default=0) < 8:
            time.sleep(0.01)
        first.terminate()
    refused = train(config, shards, run, f"data.selection={tmp_path / 'other.parquet'}")
    assert refused.returncode != 0 and "selection was" in refused.stderr, refused.stderr + refused.stdout
    every = train(config, shards, run, "data.selection=[]")
    assert every.returncode != 0 and "the data of this run have changed" in every.stderr, every.stderr
    second = train(config, shards, run, with_half)
    assert second.returncode == 0, second.stderr + second.stdout

    page = tmp_path / "page.html"
    words = [sys.executable, "-m", "launch.cli.main", "report", str(run), "--out", str(page)]
    drawn = subprocess.run(words, env=environment(), cwd=ROOT, capture_output=True, text=True, check=False)
    assert drawn.returncode == 0, drawn.stderr
    assert "half.parquet: 60 of 120 samples, 90 in an epoch" in page.read_text()

    def batches(folder: Path) -> dict[int, list[str]]:
        steps: dict[int, list[str]] = {}
        for rank in (0, 1):
            for step, row in recorded(folder, rank).items():
                steps.setdefault(step, []).extend(row["keys"])
        return steps

    assert len(batches(run)) == 24
    assert {step: sorted(keys) for step, keys in batches(run).items()} == {
        step: sorted(keys) for step, keys in batches(tmp_path / "straight").items()
    }
