"""What is embedded: the features of evaluations, every sample once, whatever the weights; what cannot be embedded is counted."""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from launch.cli.eval_ranks import world_here
from pipeline.config.load import Loaded, load
from pipeline.config.schema import Config
from pipeline.data.augment.views import Normalize
from pipeline.data.embeddings.reader import Embeddings
from pipeline.data.embeddings.work import digest_of
from pipeline.data.loader.reader import Reader
from pipeline.errors import CheckpointError, ConfigError, DataError, TrainingError
from pipeline.evaluation.embedding import EmbedRequest, EmbedResult, check_request, embed, index_shards, weights_digest
from pipeline.evaluation.embedding_worker import EmbedProgress, chosen_patches
from pipeline.evaluation.runner import eval_model_of
from pipeline.evaluation.standalone import settings_for_weights
from pipeline.methods.base import Method
from pipeline.methods.registry import build_seeded_method
from pipeline.models.eval_model import EvalModel
from pipeline.weights import pretrained
from pipeline.weights.export.networks import read as networks
from pipeline.weights.export.write import write as export
from tests.helpers.embeddings import content
from tests.helpers.evaluation import CPU, changed, image_set, toy, write_checkpoint
from tests.helpers.exported import CLIP, DINO, checkpoint, settings
from tests.helpers.library import jpeg, sample, write
from tests.helpers.rank_pool import pool

GLOO = "launch.backend=gloo"
ALL = ("key", "shard", "row", "embedding", "width", "height", "label", "caption_bytes", "image_bytes", "digest")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Loaded, Method]:
    """A run with a checkpoint, and its method; 40 scenes of 32 pixels."""
    loaded = toy(tmp_path_factory.mktemp("embedded"), GLOO)
    method = changed(build_seeded_method(loaded.config, CPU), 1)
    write_checkpoint(loaded.config.run.folder, method)
    return loaded, method


def request_of(loaded: Loaded, out: Path, **options: Any) -> EmbedRequest:
    run = loaded.config.run.folder
    return EmbedRequest(out, str(run), run=run, **{"batch_size": 16, "dtype": "float32", **options})


def embedded(request: EmbedRequest, config: Config, **options: Any) -> EmbedResult:
    with world_here(config) as world:
        return embed(request, config, world, **options)


def features(config: Config, model: EvalModel, size: int, function: Callable[[Any], Tensor]) -> NDArray[np.float32]:
    """Features of all samples by the images of evaluations, in batches of 16."""
    with world_here(config), torch.inference_mode():
        torch.set_num_threads(1)
        images = image_set(index_shards(config), size=size, batch_size=16, normalize=Normalize(model.mean, model.std))
        return torch.cat([function(model.tokens(batch.images)).float() for batch in images]).numpy()


@pytest.mark.parametrize("pooling", ["cls", "mean", "patches"])
def test_features_are_those_of_evaluations(trained: tuple[Loaded, Method], pooling: Any, tmp_path: Path) -> None:
    loaded, method = trained
    result = embedded(request_of(loaded, tmp_path / "out", pooling=pooling, patches=3), loaded.config)
    embeddings = Embeddings.open(tmp_path / "out")
    assert result.state == "finished" and result.document == embeddings.document
    (shard,) = embeddings.shards
    patch = ("patch",) if pooling == "patches" else ()
    held = embeddings.read(0, (*ALL, *patch))
    model = eval_model_of(method, loaded.config, CPU)
    manifest = index_shards(loaded.config)
    if pooling == "patches":
        chosen = chosen_patches(manifest.ids(), 3, 16)
        every = features(loaded.config, model, 32, lambda tokens: tokens.patches)
        expected = np.take_along_axis(every, chosen[:, :, None].astype(np.int64), axis=1).reshape(120, -1)
        assert np.array_equal(held["patch"], chosen.reshape(-1)) and shard.rows == 120
    else:
        expected = features(loaded.config, model, 32, lambda t: t.cls if pooling == "cls" else t.patches.mean(1))
    assert np.array_equal(held["embedding"], expected)
    each = embeddings.spec.rows_per_sample
    rows = manifest.rows(0)
    assert held["key"].tolist() == [key for key in rows.keys for _ in range(each)]
    assert held["row"].tolist() == np.repeat(np.arange(40), each).tolist()
    for name in ("width", "height", "label"):
        assert np.array_equal(held[name], np.repeat(rows.columns[name], each)), name
    assert (
        np.array_equal(held["caption_bytes"], np.repeat(rows.columns["caption_size"], each)) and held["caption_bytes"].min() > 0
    )
    records = Reader(manifest, wants=("image",)).fetch(manifest.ids())
    assert [one.tobytes() for one in held["digest"][::each]] == [digest_of(record.image or b"") for record in records]
    spec = embeddings.spec
    assert (spec.weights.name, spec.image.size, spec.precision, spec.device) == ("step_000000024", 32, "fp32", "cpu")
    assert spec.weights.digest == weights_digest(model) and embeddings.fingerprint == manifest.fingerprint


def test_half_precision_is_the_rounded_single_precision(trained: tuple[Loaded, Method], tmp_path: Path) -> None:
    loaded, _ = trained
    halves = [embedded(request_of(loaded, tmp_path / dtype, dtype=dtype), loaded.config) for dtype in ("float16", "float32")]
    assert all(one.state == "finished" for one in halves)
    half, single = (Embeddings.open(tmp_path / dtype).read(0)["embedding"] for dtype in ("float16", "float32"))
    assert half.dtype == np.float16 and np.array_equal(half, single.astype(np.float16)) and not np.array_equal(half, single)


def test_another_size_and_checkpoint(trained: tuple[Loaded, Method], tmp_path: Path) -> None:
    loaded, _ = trained
    older = write_checkpoint(tmp_path / "older", build_seeded_method(loaded.config, CPU), step=12)
    embedded(request_of(loaded, tmp_path / "out", checkpoint=older, size=48), loaded.config)
    embeddings = Embeddings.open(tmp_path / "out")
    model = eval_model_of(build_seeded_method(loaded.config, CPU), loaded.config, CPU)
    assert np.array_equal(embeddings.read(0)["embedding"], features(loaded.config, model, 48, lambda tokens: tokens.cls))
    assert (embeddings.spec.weights.name, embeddings.spec.image.size) == ("step_000000012", 48)
    with pytest.raises(ConfigError, match="50 must be a multiple of the patch size 8"):
        embedded(request_of(loaded, tmp_path / "other", size=50), loaded.config)


def test_patches_are_a_pure_function_of_the_sample() -> None:
    ids = np.array([0, 1, 5, 1 << 32, (7 << 32) | 5], dtype=np.uint64)
    chosen = chosen_patches(ids, 4, 196)
    assert chosen.shape == (5, 4) and (np.diff(chosen, axis=1) > 0).all() and chosen.min() >= 0 and chosen.max() < 196
    assert np.array_equal(chosen[[3, 0]], chosen_patches(ids[[3, 0]], 4, 196))
    assert len({tuple(row) for row in chosen.tolist()}) == 5
    assert np.array_equal(chosen_patches(ids, 9, 9), np.tile(np.arange(9), (5, 1)))
    counts = np.bincount(chosen_patches(np.arange(4000, dtype=np.uint64), 4, 16).reshape(-1), minlength=16)
    assert counts.min() > 850 and counts.max() < 1150  # each 1000 times on average


@pytest.mark.parametrize("layout", ["timm", "huggingface", "open_clip"])
def test_weights_of_other_libraries(layout: str, trained: tuple[Loaded, Method], tmp_path: Path) -> None:
    saved, _ = checkpoint(tmp_path / "run", settings(CLIP if layout == "open_clip" else DINO))
    folder = export(networks(saved), layout, tmp_path / layout)
    shards = f"data.shards={trained[0].config.data.shards[0]}"
    config = settings_for_weights([shards, f"data.index={tmp_path}/index", GLOO])
    embedded(EmbedRequest(tmp_path / "out", str(folder), dtype="float32", batch_size=16), config)
    embeddings = Embeddings.open(tmp_path / "out")
    loaded = pretrained.load(str(folder), model=None, device=CPU)
    assert np.array_equal(
        embeddings.read(0)["embedding"], features(config, loaded.subject, loaded.size, lambda tokens: tokens.cls)
    )
    spec = embeddings.spec
    assert spec.image.mean == tuple(loaded.subject.mean) and spec.image.size == loaded.size
    assert spec.weights.digest == weights_digest(loaded.subject)


def test_a_weights_file_with_its_timm_name(trained: tuple[Loaded, Method], tmp_path: Path) -> None:
    import timm

    torch.manual_seed(0)
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
    torch.save(network.state_dict(), tmp_path / "tiny.pth")
    config = settings_for_weights([f"data.shards={trained[0].config.data.shards[0]}", f"data.index={tmp_path}/index", GLOO])
    request = EmbedRequest(tmp_path / "out", str(tmp_path / "tiny.pth"), dtype="float32", batch_size=16, size=64)
    with pytest.raises(ConfigError, match="a file does not name its architecture"):
        embedded(request, config)
    embedded(replace(request, timm_name="vit_tiny_patch16_224"), config)
    assert Embeddings.open(tmp_path / "out").dim == 192


# ---- bad samples -----------------------------------------------------------------------------------------------------------


def undecodable() -> bytes:
    """A PNG with a header, an end, and no pixels between."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = (20).to_bytes(4, "big") + (20).to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"no pixels") + chunk(b"IEND", b"")


@pytest.fixture
def with_bad(tmp_path: Path) -> Path:
    """Two shards: 30 samples of which 0, 7 and 29 cannot be decoded, and two of which none can."""
    samples = {f"{number:03d}": sample(number) for number in range(30)}
    for number in (0, 7, 29):
        samples[f"{number:03d}"] = {"png": undecodable(), "txt": b"bad"}
    write(tmp_path / "a.tar", samples)
    write(tmp_path / "b.tar", {name: {"png": undecodable()} for name in ("x", "y")})
    return tmp_path


def test_bad_samples_are_left_out_counted_and_named(trained: tuple[Loaded, Method], with_bad: Path) -> None:
    loaded, _ = trained
    config = reconfigured(loaded, f"data.shards={with_bad}/*.tar", f"data.index={with_bad}/index", "data.max_bad_fraction=0.5")
    seen: list[EmbedProgress] = []
    result = embedded(request_of(loaded, with_bad / "out"), config, report=seen.append)
    assert result.reasons == {"undecodable": 5} and result.document is not None
    assert result.document.counts == {"samples": 32, "embedded": 27, "rows": 27, "bad": 5}
    assert (seen[-1].done, seen[-1].total, seen[-1].bad) == (32, 32, 5)
    embeddings = Embeddings.open(with_bad / "out")
    held = embeddings.read(0, ("key", "row", "embedding"))
    kept = [row for row in range(30) if row not in (0, 7, 29)]
    assert held["row"].tolist() == kept and held["key"].tolist() == [f"{row:03d}" for row in kept]
    assert len(embeddings.read(1)["embedding"]) == 0
    lines = [json.loads(line) for line in (with_bad / "out" / "bad_samples.jsonl").read_text().splitlines()]
    named = [(0, 0, "000"), (0, 7, "007"), (0, 29, "029"), (1, 0, "x"), (1, 1, "y")]
    assert lines == [{"key": key, "shard": shard, "row": row, "reason": "undecodable"} for shard, row, key in named]
    # The same set without bad ones: what stands in their place in a batch changes no other row.
    (with_bad / "good").mkdir()
    write(with_bad / "good" / "a.tar", {f"{row:03d}": sample(row) for row in range(30)})
    good = reconfigured(loaded, f"data.shards={with_bad}/good/a.tar", f"data.index={with_bad}/index")
    embedded(request_of(loaded, with_bad / "out2"), good)
    assert np.array_equal(held["embedding"], Embeddings.open(with_bad / "out2").read(0)["embedding"][kept])


def reconfigured(loaded: Loaded, *overrides: str) -> Config:
    folder = loaded.config.run.folder.parent
    usual = [f"data.shards={folder}/scenes/*train-*.tar", f"data.index={folder}/index", f"run.directory={folder}/run"]
    return load(folder / "toy.yaml", [*usual, "model.layer_scale=1.0", GLOO, *overrides]).config


def test_too_many_bad_samples_stop_it(trained: tuple[Loaded, Method], with_bad: Path) -> None:
    loaded, _ = trained
    config = reconfigured(loaded, f"data.shards={with_bad}/*.tar", f"data.index={with_bad}/index", "data.bad_fraction_window=16")
    with pytest.raises(TrainingError, match=r"2 of the last 16 samples could not be used \(undecodable 2\).*max_bad_fraction"):
        embedded(request_of(loaded, with_bad / "out"), config)
    assert not (with_bad / "out" / "embeddings.json").exists()
    log = (with_bad / "out" / ".progress" / "bad_samples-rank-0.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in log] == ["000", "007"]


@pytest.mark.parametrize(("value", "dtype", "reason"), [(1e30, "float16", "beyond_float16"), (np.nan, "float32", "not_finite")])
def test_features_that_are_not_finite_are_bad_samples(
    value: float, dtype: Any, reason: str, trained: tuple[Loaded, Method], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, _ = trained
    real = EvalModel.tokens

    def tokens(self: EvalModel, images: Tensor) -> Any:
        result = real(self, images)
        if len(images) > 3:
            result.cls[3, 0] = value
        return result

    monkeypatch.setattr(EvalModel, "tokens", tokens)
    config = reconfigured(loaded, "data.max_bad_fraction=0.5")
    result = embedded(request_of(loaded, tmp_path / "out", dtype=dtype), config)
    assert result.reasons == {reason: 3}
    assert [row for row in range(40) if row not in Embeddings.open(tmp_path / "out").read(0, ("row",))["row"]] == [3, 19, 35]


# ---- ranks, refusals -------------------------------------------------------------------------------------------------------


def _embed_here(request: EmbedRequest, config: Config) -> tuple[str, int]:
    """On a rank of a pool."""
    import torch.distributed as dist

    from pipeline.runtime.process_group import World

    store = dist.PrefixStore(request.directory.name, dist.distributed_c10d._get_default_store())
    world = World(dist.get_rank(), dist.get_world_size(), dist.get_rank(), torch.device("cpu"), None, store=store)
    real = EvalModel.tokens

    def coupled(self: EvalModel, images: Tensor) -> Any:
        """Tokens that depend on the other images of the batch, as those of kernels may in their last bits."""
        tokens = real(self, images)
        return tokens._replace(cls=tokens.cls + images.mean())

    with mock.patch.object(EvalModel, "tokens", coupled):
        result = embed(request, config, world)
    return result.state, result.embedded


def test_any_number_of_ranks_gives_the_same_bytes(trained: tuple[Loaded, Method], tmp_path: Path) -> None:
    loaded, _ = trained
    for name, count in (("a", 70), ("b", 5), ("c", 33)):
        write(tmp_path / f"{name}.tar", {f"{name}{number:03d}": {"jpg": jpeg(number)} for number in range(count)})
    config = reconfigured(loaded, f"data.shards={tmp_path}/*.tar", f"data.index={tmp_path}/index")
    made = []
    for size in (1, 2, 3):
        request = request_of(loaded, tmp_path / f"out{size}", batch_size=8)
        assert pool(size).run(_embed_here, request=request, config=config) == [("finished", 108)] * size
        made.append(content(request.directory))
    assert made[0] == made[1] == made[2] and len(made[0]) == 5
    assert pool(2).run(_embed_here, request=request, config=config) == [("complete", 0)] * 2


def test_a_stopped_start_is_continued(trained: tuple[Loaded, Method], tmp_path: Path) -> None:
    loaded, _ = trained
    for name in "abcd":
        write(tmp_path / f"{name}.tar", {f"{name}{number:03d}": {"jpg": jpeg(number)} for number in range(20)})
    config = reconfigured(loaded, f"data.shards={tmp_path}/*.tar", f"data.index={tmp_path}/index")
    embedded(request_of(loaded, tmp_path / "plain", batch_size=8), config)
    asked = iter(range(100))
    stopped = embedded(request_of(loaded, tmp_path / "out", batch_size=8), config, stopping=lambda: next(asked) >= 3)
    assert stopped.state == "stopped" and not (tmp_path / "out" / "embeddings.json").exists()
    assert len(list((tmp_path / "out").glob("*.parquet"))) == 1
    seen: list[EmbedProgress] = []
    finished = embedded(request_of(loaded, tmp_path / "out", batch_size=8), config, report=seen.append)
    assert finished.state == "finished" and finished.embedded == 60 and seen[0].done == 28
    assert content(tmp_path / "out") == content(tmp_path / "plain")


def test_what_cannot_be_embedded_is_refused_before_any_rank_is_started(
    trained: tuple[Loaded, Method], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, _ = trained
    check_request(request_of(loaded, tmp_path / "out"), loaded.config)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="must be a folder"):
        check_request(request_of(loaded, tmp_path / "file"), loaded.config)
    with pytest.raises(ConfigError, match="has other files"):
        check_request(request_of(loaded, tmp_path), loaded.config)
    with pytest.raises(DataError, match="no shard matches"):
        check_request(request_of(loaded, tmp_path / "out"), reconfigured(loaded, "data.shards=/nowhere/*.tar"))
    with pytest.raises(CheckpointError, match="no checkpoint"):
        check_request(replace(request_of(loaded, tmp_path / "out"), run=tmp_path), loaded.config)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match="pyarrow is not installed"):
        check_request(request_of(loaded, tmp_path / "out"), loaded.config)


def test_all_ranks_must_see_the_same_shards(trained: tuple[Loaded, Method], tmp_path: Path) -> None:
    loaded, _ = trained
    errors = pool(2).run(_other_shards, request=request_of(loaded, tmp_path / "out"), config=loaded.config)
    assert errors[1].startswith("rank 1: this rank sees other shards than the first one")


def _other_shards(request: EmbedRequest, config: Config) -> str:
    """On a rank of a pool: the second one sees other shards, and the first one does not wait for it."""
    import torch.distributed as dist

    from pipeline.evaluation import embedding

    shards = config.data.shards if dist.get_rank() == 0 else config.evaluation.knn.val_shards
    own = config.replace(data=config.data.model_copy(update={"shards": shards}))
    with mock.patch.object(embedding.EmbedWorker, "run", lambda *_: True):
        try:
            return _embed_here(request, own)[0]
        except DataError as error:
            return str(error)
