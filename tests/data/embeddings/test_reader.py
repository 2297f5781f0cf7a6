"""Folders of embeddings: what is written is read back by us, pyarrow and DuckDB; what others have made of it is refused."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from pipeline.data.embeddings import table
from pipeline.data.embeddings.document import FILE, EmbeddingSpec, file_name
from pipeline.data.embeddings.reader import Embeddings
from pipeline.errors import DataError, FoveaError
from tests.helpers.embeddings import columns, write
from tests.helpers.runs import ROOT, environment

CLS = EmbeddingSpec("cls", 12, "float16")
PATCHES = EmbeddingSpec("patches", 6, "float32", patches=3)


@pytest.mark.parametrize("spec", [CLS, PATCHES, EmbeddingSpec("mean", 1, "float32")])
def test_what_is_written_is_read_back(spec: EmbeddingSpec, tmp_path: Path) -> None:
    embeddings = write(tmp_path, spec, skipped=(3,))
    assert [shard.samples for shard in embeddings.shards] == [20, 0, 7]
    assert embeddings.rows.tolist() == [19 * spec.rows_per_sample, 0, 6 * spec.rows_per_sample]
    assert embeddings.document.counts["bad"] == 2
    names = table.column_names(spec)
    for number, size in enumerate((20, 0, 7)):
        expected = columns(spec, number, size, skipped=(3,))
        held = embeddings.read(number, names)
        assert list(held["key"]) == expected["key"] and held["embedding"].dtype == spec.dtype
        assert np.array_equal(held["embedding"], expected["embedding"].astype(spec.dtype))
        for name in set(names) - {"key", "embedding"}:
            assert np.array_equal(held[name], expected[name]) and held[name].dtype == expected[name].dtype, name
        pieces = list(embeddings.batches(number, ("row", "embedding"), rows=5))
        assert all(len(piece["row"]) <= 5 for piece in pieces)
        assert sum(len(piece["row"]) for piece in pieces) == len(expected["row"])


def test_equal_values_give_equal_bytes_and_no_secret_is_stored(tmp_path: Path) -> None:
    one, other = write(tmp_path / "one", CLS), write(tmp_path / "other", CLS)
    for shard in one.shards:
        assert (one.directory / shard.file).read_bytes() == (other.directory / shard.file).read_bytes()
    text = (tmp_path / "one" / FILE).read_text()
    assert text == (tmp_path / "other" / FILE).read_text() and "secret" not in text and "train-2.tar" in text


def test_keys_that_are_not_utf8_are_escaped(tmp_path: Path) -> None:
    assert table.text_of("a\udcffb") == "a\\udcffb"
    assert file_name(7, "a/b\n\x1b*.tar") == "00007-a_b___.parquet"
    assert len(file_name(0, "ü" * 255).encode()) < 255


@pytest.mark.parametrize("spec", [CLS, PATCHES])
def test_duckdb_reads_all_files_at_once(spec: EmbeddingSpec, tmp_path: Path) -> None:
    write(tmp_path, spec)
    query = f"SELECT key, embedding, hex(digest), width FROM '{tmp_path}/*.parquet' WHERE shard = 2 ORDER BY row, key"
    rows = duckdb.sql(query).fetchall()
    expected = columns(spec, 2, 7)
    assert [row[0] for row in rows] == expected["key"] and {row[3] for row in rows} == {40}
    assert np.array_equal(np.array([row[1] for row in rows], dtype=spec.dtype), expected["embedding"].astype(spec.dtype))
    assert bytes.fromhex(rows[0][2]) == expected["digest"][0].tobytes()
    similarity = "list_cosine_similarity(a.embedding, b.embedding)"
    names = f"'{tmp_path}/00000-train-0.parquet'"
    closest = duckdb.sql(f"SELECT a.row, max({similarity}) FROM {names} a JOIN {names} b USING (row) GROUP BY a.row").fetchall()
    assert len(closest) == 20 and all(value == pytest.approx(1, abs=1e-3) for _, value in closest)


def test_pyarrow_reads_fixed_size_lists(tmp_path: Path) -> None:
    write(tmp_path, CLS)
    held = parquet.read_table(tmp_path / "00000-train-0.parquet")
    assert held.schema.field("embedding").type == pyarrow.list_(pyarrow.field("element", pyarrow.float16(), False), 12)
    assert held.schema.field("digest").type == pyarrow.binary(16) and held.schema.field("label").type == pyarrow.int64()
    flat = held.column("embedding").combine_chunks().flatten().to_numpy().reshape(-1, 12)
    assert np.array_equal(flat, columns(CLS, 0, 20)["embedding"].astype(np.float16))


def test_the_reader_loads_no_torch(tmp_path: Path) -> None:
    write(tmp_path, CLS)
    code = (
        "import sys; from pipeline.data.embeddings.reader import Embeddings; "
        "e = Embeddings.open(sys.argv[1]); e.read(0); print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=environment(), cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.strip() == "False", done.stderr


def test_a_missing_pyarrow_is_one_error_with_the_extra_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, CLS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"pyarrow is not installed. Install it: pip install 'fovea\[parquet\]'"):
        Embeddings.open(tmp_path)


@pytest.mark.parametrize(("value", "dtype"), [(np.nan, "float32"), (np.inf, "float32"), (70000.0, "float16")])
def test_numbers_that_are_not_finite_are_not_written(value: float, dtype: Any, tmp_path: Path) -> None:
    spec = EmbeddingSpec("cls", 4, dtype)
    held = columns(spec, 0, 5)
    held["embedding"][2, 1] = value
    with pytest.raises(DataError, match="1 of 5 embeddings are not finite"):
        table.write(tmp_path / "x.parquet", spec, [held])
    assert not list(tmp_path.iterdir())


# ---- foreign folders -------------------------------------------------------------------------------------------------------


def described(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads((folder / FILE).read_text())
    change(document)
    (folder / FILE).write_text(json.dumps(document))


def replaced(folder: Path, data: bytes, number: int = 0) -> None:
    """Another file in the place of a shard's, with a description that fits it."""

    def change(document: dict[str, Any]) -> None:
        shard = document["shards"][number]
        (folder / shard["file"]).write_bytes(data)
        shard["bytes"], shard["sha256"] = len(data), hashlib.sha256(data).hexdigest()

    described(folder, change)


def read_all(folder: Path) -> None:
    embeddings = Embeddings.open(folder)
    for number in range(len(embeddings.shards)):
        embeddings.read(number, table.column_names(embeddings.spec))


def shard_of(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda document: document["shards"][0].update(values)


def spec_of(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda document: document["spec"].update(values)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda document: document.update(format=2), "must be a description of embeddings of format 1"),
        (lambda document: document.update(extra=1), "is damaged"),
        (lambda document: document.pop("fingerprint"), "is damaged (fingerprint"),
        (lambda document: document["shards"].pop(), "its counts do not match its shards"),
        (lambda document: document["shards"].reverse(), "must begin with the shard's number"),
        (shard_of(file="00000-../../x.parquet"), "must be a plain file name"),
        (shard_of(file="/etc/passwd"), "must be a plain file name"),
        (shard_of(rows=10**15), "rows for 20 samples"),
        (shard_of(samples=-1), "is damaged (shards.0.samples"),
        (shard_of(samples=1 << 62, rows=1 << 62), "is damaged (shards.0.samples"),
        (shard_of(rows=True), "is damaged (shards.0.rows"),
        (shard_of(sha256="x"), "is damaged (shards.0.sha256"),
        (spec_of(dim=0), "is damaged (spec.dim"),
        (spec_of(dim=1 << 40), "is damaged (spec.dim"),
        (spec_of(dim=13), "has other columns than described"),
        (spec_of(dtype="float64"), "is damaged (spec.dtype"),
        (spec_of(dtype="float32"), "has other columns than described"),
        (spec_of(patches=2), "rows for 20 samples"),
        (spec_of(pooling="patches"), "0 patches do not fit the pooling patches"),
    ],
)
def test_a_description_that_was_changed_is_refused(change: Callable[[dict[str, Any]], None], text: str, tmp_path: Path) -> None:
    write(tmp_path, CLS)
    described(tmp_path, change)
    with pytest.raises(DataError) as raised:
        read_all(tmp_path)
    assert text in str(raised.value)


def test_an_incomplete_folder_and_a_changed_file_are_refused(tmp_path: Path) -> None:
    embeddings = write(tmp_path, CLS)
    path = tmp_path / embeddings.shards[0].file
    data = bytearray(path.read_bytes())
    data[500] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match="its SHA-256 differs"):
        embeddings.read(0)
    assert len(embeddings.read(2)["embedding"]) == 7
    path.write_bytes(bytes(data[:-1]))
    with pytest.raises(DataError, match="bytes, and"):
        Embeddings.open(tmp_path, verify=False).read(0)
    path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        Embeddings.open(tmp_path).read(0)
    (tmp_path / FILE).unlink()
    with pytest.raises(DataError, match="Run `fovea embed` again"):
        Embeddings.open(tmp_path)


def foreign(**options: Any) -> bytes:
    """A table with the columns and values of a shard, stored otherwise."""
    values = options.pop("values", columns(CLS, 0, 20))
    held = table.arrow_table(CLS, values, pyarrow, "")
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(
        options.pop("change", lambda one: one)(held), sink, **{"compression": "NONE", "use_dictionary": False, **options}
    )
    return bytes(sink.getvalue())


def with_column(name: str, array: Any) -> Callable[[Any], Any]:
    return lambda held: held.set_column(held.schema.names.index(name), name, array)


def values(**changed: Any) -> dict[str, Any]:
    return {**columns(CLS, 0, 20), **changed}


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (foreign(compression="zstd"), "is not stored plainly"),
        (foreign(use_dictionary=["key"]), "is not stored plainly"),
        (foreign(change=lambda held: held.slice(1)), "claims 19 rows instead of 20"),
        (foreign(change=lambda held: held.drop_columns(["key"])), "has other columns than described"),
        (foreign(change=with_column("width", pyarrow.array([None, *range(19)], pyarrow.int32()))), "has other columns"),
        (foreign(change=with_column("key", pyarrow.array([b"\xff"] * 20))), "has other columns"),
        (foreign(values=values(row=np.zeros(20, np.int32))), "column row is not ascending"),
        (foreign(values=values(row=np.arange(1, 21, dtype=np.int32))), "column row has a value out of range"),
        (foreign(values=values(shard=np.ones(20, np.int32))), "column shard has a value out of range"),
        (foreign(values=values(width=np.zeros(20, np.int32))), "column width has a value out of range"),
        (foreign(values=values(label=np.full(20, -2))), "column label has a value out of range"),
        (foreign(values=values(embedding=np.zeros((20, 12)), row=np.arange(19, -1, -1))), "column row is not ascending"),
        (b"PAR1" * 2000, "is not readable Parquet"),
        (b"", "rows instead of|rows in|is not readable Parquet"),
    ],
)
def test_a_file_with_another_content_is_refused(data: bytes, text: str, tmp_path: Path) -> None:
    write(tmp_path, CLS)
    replaced(tmp_path, data)
    with pytest.raises(DataError) as raised:
        read_all(tmp_path)
    assert any(part in str(raised.value) for part in text.split("|"))


def test_patches_of_a_sample_are_in_order(tmp_path: Path) -> None:
    write(tmp_path, PATCHES)
    held = columns(PATCHES, 0, 20)
    held["patch"][[0, 1]] = 1, 0
    table.write(tmp_path / "other.parquet", PATCHES, [held])
    replaced(tmp_path, (tmp_path / "other.parquet").read_bytes())
    assert len(Embeddings.open(tmp_path).read(0)["embedding"]) == 60
    with pytest.raises(DataError, match="column patch is not ascending"):
        read_all(tmp_path)


def test_numbers_that_are_not_finite_are_not_read(tmp_path: Path) -> None:
    embeddings = write(tmp_path, CLS)
    path = tmp_path / embeddings.shards[0].file
    first = columns(CLS, 0, 20)["embedding"].astype(np.float16)[0].tobytes()
    data = path.read_bytes()
    assert data.count(first) == 1
    replaced(tmp_path, data.replace(first, np.full(12, np.nan, np.float16).tobytes()))
    with pytest.raises(DataError, match="1 of 20 embeddings are not finite"):
        Embeddings.open(tmp_path).read(0)


@pytest.mark.parametrize("seed", range(60))
def test_damaged_files_raise_one_error(seed: int, tmp_path: Path) -> None:
    """With a description that fits: no checksum protects the reader."""
    embeddings = write(tmp_path, CLS)
    rng = random.Random(seed)
    data = bytearray((tmp_path / embeddings.shards[0].file).read_bytes())
    for _ in range(rng.choice((1, 3, 30))):
        # Mostly in the file's own description at its end.
        at = rng.randrange(len(data) - 2500, len(data)) if rng.random() < 0.7 else rng.randrange(len(data))
        data[at] = rng.randrange(256)
    if rng.random() < 0.2:
        del data[rng.randrange(len(data)) :]
    replaced(tmp_path, bytes(data))
    try:
        read_all(tmp_path)
    except FoveaError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("seed", range(60))
def test_damaged_descriptions_raise_one_error(seed: int, tmp_path: Path) -> None:
    write(tmp_path, CLS)
    rng = random.Random(seed)
    document = json.loads((tmp_path / FILE).read_text())
    holders: list[tuple[Any, Any]] = []

    def collect(value: Any) -> None:
        for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            holders.append((value, key))
            collect(value[key])

    collect(document)
    for _ in range(rng.choice((1, 4))):
        holder, key = rng.choice(holders)
        holder[key] = rng.choice([None, -1, 1 << 70, 1e300, "", "x" * 5000, "\x1b[2J", [], {}, True, {"a": [1]}, "../x"])
    (tmp_path / FILE).write_text(json.dumps(document))
    try:
        read_all(tmp_path)
    except FoveaError as error:
        assert "\n" not in str(error) and "\x1b" not in str(error)
    else:  # only what is free text, or says nothing about the numbers, may be anything
        assert Embeddings.open(tmp_path).shards[0].samples == 20


def test_unknown_shards_and_columns_are_refused(tmp_path: Path) -> None:
    embeddings = write(tmp_path, CLS)
    with pytest.raises(DataError, match="there is no shard 3"):
        embeddings.read(3)
    with pytest.raises(DataError, match="there is no column 'patch'"):
        embeddings.read(0, ("patch",))
