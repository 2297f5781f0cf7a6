"""``fovea shards dedup``, ``balance``, ``retrieve`` and ``select``, and what reads their selections."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.data.index.manifest import Manifest
from pipeline.data.indexing import Indexer
from pipeline.data.sample_source import data_settings
from pipeline.data.selections.file import Selection
from tests.data.curation.test_balance import blobs
from tests.helpers import library, vector_sets
from tests.helpers.commands import fovea


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


class _Settings:
    def __init__(self, shards: str) -> None:
        self.data = data_settings(shards, None, {})


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    """53 samples in three shards."""
    (tmp_path / "set").mkdir()
    library.make(tmp_path / "set")
    return Indexer(_Settings(f"{tmp_path}/set/a-*.tar")).one([f"{tmp_path}/set/a-*.tar"])


@pytest.fixture
def embedded(manifest: Manifest, tmp_path: Path) -> Callable[..., Path]:
    """Embeddings of those samples, of given vectors."""

    def make(values: NDArray[np.float32], **options: object) -> Path:
        from pipeline.data.embeddings.document import EmbeddingSpec, WeightsSpec
        from pipeline.data.embeddings.reader import finish, write_shard

        spec, done, first = EmbeddingSpec("cls", values.shape[1], "float32", weights=WeightsSpec("x", "x", "a" * 64)), [], 0
        for number, shard in enumerate(manifest.shards):
            rows = manifest.rows(number)
            n = len(rows.keys)
            columns = {
                "key": list(rows.keys),
                "shard": np.full(n, number, dtype=np.int32),
                "row": np.arange(n, dtype=np.int32),
                "embedding": values[first : first + n],
                "width": rows.columns["width"],
                "height": rows.columns["height"],
                "label": rows.columns["label"],
                "caption_bytes": rows.columns["caption_size"].astype(np.int32),
                "image_bytes": rows.columns["image_size"].astype(np.int32),
                "digest": np.frombuffer(np.arange(2 * first, 2 * (first + n), dtype=np.int64).tobytes(), np.uint8).reshape(
                    -1, 16
                ),
            }
            done.append(write_shard(tmp_path / "emb", spec, number, columns, url=shard.url, digest=shard.digest, samples=n))
            first += n
        finish(tmp_path / "emb", spec, manifest.fingerprint, done)
        return tmp_path / "emb"

    return make


def test_dedup_writes_a_selection_and_a_page_and_leaves_no_work(
    embedded: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = np.random.default_rng(0).normal(size=(43, 16)).astype(np.float32)
    folder = embedded(np.concatenate([values, values[:10]]))
    assert (
        fovea(
            "shards", "dedup", folder, "--out", "u.parquet", "--preview", "u.html", "--shards", "set/a-*.tar", "--threshold", 0.99
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "43 of 53 samples selected, 43 in an epoch: u.parquet" in out and "near duplicate" in out
    assert not Path("u.parquet.work").exists()
    page = Path("u.html").read_text()
    assert "fovea shards dedup" in page and page.count("data:image/png") >= 2 and "cosine 1.000" in page
    assert Selection("u.parquet").info.made["command"] == "fovea shards dedup"


def test_balance_takes_shares_levels_and_an_earlier_selection(
    embedded: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    values, _ = blobs([30, 20, 3])
    folder = embedded(values)
    assert (
        fovea(
            "shards",
            "balance",
            folder,
            "--out",
            "b.parquet",
            "--levels",
            "9,3",
            "--target",
            "50%",
            "--preview",
            "b.html",
            "--shards",
            "set/a-*.tar",
        )
        == 0
    )
    assert "26 of 53 samples selected" in capsys.readouterr().out
    assert "<h2>Clusters</h2>" in Path("b.html").read_text()
    words = ("--target", "10", "--selection", "b.parquet", "--mode", "weights")
    assert fovea("shards", "balance", folder, "--out", "c.parquet", "--levels", "9,3", *words) == 0
    info = Selection("c.parquet").info
    assert info.samples == 26 and info.weight == pytest.approx(10, abs=0.1)


def test_retrieve_takes_images_like_others(
    embedded: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values, labels = blobs([30, 20, 3])
    folder = embedded(values)
    vector_sets.make(tmp_path / "like", values[labels == 2], shards=1, dtype="float32")
    assert fovea("shards", "retrieve", folder, "--like", "like", "--out", "r.parquet", "--k", 3) == 0
    assert "3 of 53 samples selected" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("balance", "EMB", "--out", "x", "--target", "0"), "names no target"),
        (("balance", "EMB", "--out", "x", "--target", "many%"), "names no target"),
        (("balance", "EMB", "--out", "x", "--target", "nan"), "names no target"),
        (("balance", "EMB", "--out", "x", "--target", "inf%"), "names no target"),
        (("balance", "EMB", "--out", "x", "--target", "54"), "more than the 53 samples"),
        (("balance", "EMB", "--out", "x", "--target", "5", "--levels", "a,b"), "names no levels"),
        (("dedup", "EMB", "--out", "x", "--only-against"), "there is no set to compare with"),
        (("dedup", "EMB", "--out", "x", "--part", "5/4"), "names no part"),
        (("dedup", "EMB", "--out", "x", "--preview", "p.html"), "needs the images"),
        (("dedup", "EMB", "--out", "x", "--preview", "p.html", "--shards", "set/b-*.tar"), "names other shards"),
        (("dedup", "EMB", "--out", "x", "--only-against", "--against", "EMB", "--part", "1/4"), "found in parts"),
        (("dedup", "EMB", "--out", "EMB"), "is a folder"),
        (("dedup", "EMB", "--out", "x", "--preview", "EMB"), "is a folder"),
        (("balance", "EMB", "--out", "emb/embeddings.json", "--target", "5"), "is not a selection"),
        (("dedup", "absent", "--out", "x"), "cannot be read"),
        (("dedup", "EMB", "--out", "s3://bucket/x"), "s3"),
        (("retrieve", "EMB", "--like", "absent", "--out", "x"), "cannot be read"),
    ],
)
def test_mistakes_are_errors_with_a_hint(
    embedded: Callable[..., Path], words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = embedded(blobs([53])[0])
    assert fovea("shards", *(str(folder) if word == "EMB" else word for word in words)) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_select_takes_keys_and_weights_from_a_table(
    manifest: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("keys.csv").write_text("key,weight\na-0/0001,2.5\na-2/0040,\nunknown,1\na-1/0022,0.5\n")
    shards = f"{tmp_path}/set/a-*.tar"
    assert fovea("shards", "select", shards, "--keys", "keys.csv", "--out", "s.parquet") == 0
    out = capsys.readouterr().out
    assert "1 keys of keys.csv are those of no sample" in out and "3 of 53 samples selected, 4 in an epoch" in out
    parts = {part.shard: (part.rows.tolist(), part.weights.tolist()) for part in Selection("s.parquet").parts()}
    assert parts == {0: ([1], [2.5]), 1: ([2], [0.5]), 2: ([5], [1.0])}
    assert fovea("shards", "select", shards, "--keys", "keys.csv", "--out", "others.parquet", "--exclude") == 0
    assert Selection("others.parquet").info.samples == 50
    for text, message in (
        ("key\na-0/0001\na-0/0001\n", "occurs twice"),
        ("key,weight\na-0/0001,-1\n", "must lie between"),
        ("key\nx\ny\n", "2 of 2 keys are those of no sample: "),
        ("path\nx\n", "has no column 'key'"),
        ("key\n", "has no rows"),
    ):
        Path("bad.csv").write_text(text)
        assert fovea("shards", "select", shards, "--keys", "bad.csv", "--out", "x.parquet") == 2
        assert message in capsys.readouterr().err
    assert not Path("x.parquet").exists()


def test_select_refuses_a_shard_name_that_several_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, folder in enumerate("ab"):
        (tmp_path / folder).mkdir()
        library.write(tmp_path / folder / "0.tar", {f"k{n}": {"jpg": library.jpeg(n + 9 * number)} for n in range(3)})
    Path("keys.csv").write_text("key,shard\nk0,0.tar\n")
    assert fovea("shards", "select", f"{tmp_path}/?/0.tar", "--keys", "keys.csv", "--out", "s.parquet") == 2
    assert "2 shards are named 0.tar" in capsys.readouterr().err and not Path("s.parquet").exists()


def test_pack_and_stats_obey_a_selection(manifest: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("keys.jsonl").write_text(
        "".join(json.dumps({"key": f"a-0/{n:04d}", "weight": 1 + n % 2}) + "\n" for n in range(0, 20, 3))
    )
    shards = f"{tmp_path}/set/a-*.tar"
    assert fovea("shards", "select", shards, "--keys", "keys.jsonl", "--out", "s.parquet") == 0
    capsys.readouterr()
    assert fovea("shards", "stats", shards, "--selection", "s.parquet", "--json") == 0
    stats = json.loads(capsys.readouterr().out)
    assert stats["samples"] == 7 and stats["left_out"]["unselected"] == 46
    assert fovea("shards", "pack", shards, "out", "--selection", "s.parquet") == 0
    printed = capsys.readouterr().out
    assert "unselected" in printed and "3 samples have a weight other than 1" in printed
    with tarfile.open("out/train-00000.tar") as tar:
        names = {name.partition(".")[0] for name in tar.getnames()}
    assert names == {f"a-0/{n:04d}" for n in range(0, 20, 3)}
    Path("flat").mkdir()
    Path("flat/a.jpg").write_bytes(library.jpeg(1))
    assert fovea("shards", "pack", "flat", "out2", "--selection", "s.parquet") == 2
    assert "applies to shards only" in capsys.readouterr().err


def test_ls_prints_the_order_of_a_selection(manifest: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("keys.csv").write_text("key\n" + "".join(f"a-0/{n:04d}\n" for n in range(18)))
    shards = f"{tmp_path}/set/a-*.tar"
    assert fovea("shards", "select", shards, "--keys", "keys.csv", "--out", "s.parquet") == 0
    capsys.readouterr()
    config = (
        "simclr/cifar10_small",
        f"data.shards={shards}",
        "data.selection=s.parquet",
        "train.global_batch_size=16",
        "schedule.lr.warmup=0 steps",
    )
    words = (*config, "evaluation.knn.enabled=false", "--step", "3", "--json")
    assert fovea("shards", "ls", *words) == 0
    out = capsys.readouterr().out
    assert "a-0/" in out and "a-1/" not in out and "a-2/" not in out
