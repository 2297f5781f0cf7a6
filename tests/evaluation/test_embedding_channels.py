"""Embeddings of images with declared channels: of runs and of exported weights, and the pages and folders that know of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launch.cli.eval_ranks import world_here
from pipeline.config.load import Loaded, load
from pipeline.config.schema import Config
from pipeline.data.embeddings import document
from pipeline.data.embeddings.reader import Embeddings
from pipeline.data.formats.composite import composite
from pipeline.errors import ConfigError, DataError
from pipeline.evaluation.embedding import EmbedRequest, embed, index_shards
from pipeline.evaluation.standalone import settings_for_weights
from pipeline.methods.registry import build_seeded_method
from pipeline.weights import pretrained
from pipeline.weights.export.networks import read as networks
from pipeline.weights.export.write import write as export
from pipeline.weights.from_checkpoint import named_or_newest
from tests.helpers.channel_images import npy_file, random_image, tiff_file, write_tar
from tests.helpers.commands import fovea
from tests.helpers.evaluation import CPU, changed, image_set, write_checkpoint
from tests.helpers.exported import checkpoint, settings
from tests.helpers.runs import TOY

CHANNELS: dict[str, Any] = {
    "count": 4,
    "names": ["a", "b", "c", "d"],
    "dtype": "uint16",
    "members": ["b1.tif", "b2.npy"],
    "composite": ["d", "c", "a"],
    "mean": [0.5, 0.4, 0.5, 0.6],
    "std": [0.3, 0.2, 0.3, 0.3],
}
IMAGES = [random_image("uint16", 4, 34, 40, seed=n) for n in range(12)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """A run with a checkpoint, over twelve images of two files each; the last two images are alike."""
    folder = tmp_path_factory.mktemp("channels")
    images = [*IMAGES[:11], IMAGES[10]]
    members = [{"b1.tif": tiff_file(one[:, :, :2]), "b2.npy": npy_file(one[:, :, 2:])} for one in images]
    write_tar(folder / "set-0.tar", [(f"k{n:02d}", files) for n, files in enumerate(members)])
    (folder / "toy.yaml").write_text(TOY)
    words = [f"data.shards={folder}/set-0.tar", f"data.index={folder}/index", f"run.directory={folder}/run"]
    words += [f"data.channels={CHANNELS}", "train.precision=fp32", "launch.backend=gloo"]
    loaded = load(folder / "toy.yaml", words)
    method = changed(build_seeded_method(loaded.config, CPU), 1)
    write_checkpoint(loaded.config.run.folder, method, config=loaded.config.model_dump(mode="json"))
    return loaded


def request_of(loaded: Loaded, out: Path) -> EmbedRequest:
    folder = loaded.config.run.folder
    return EmbedRequest(out, str(folder), run=folder, batch_size=16, dtype="float32")


def embedded(request: EmbedRequest, config: Config) -> Embeddings:
    with world_here(config) as world:
        embed(request, config, world)
    return Embeddings.open(request.directory)


def test_a_run_embeds_its_channels(run: Loaded, tmp_path: Path) -> None:
    from pipeline.data.augment.views import channel_normalize, channel_spec
    from pipeline.evaluation.runner import eval_model_of
    from pipeline.weights.from_checkpoint import fill_trained

    result = embedded(request_of(run, tmp_path / "out"), run.config)
    method = build_seeded_method(run.config, CPU)
    fill_trained(method, named_or_newest(run.config.run.folder, None))
    declared = run.config.data.channels
    assert declared is not None
    with world_here(run.config), torch.inference_mode():
        torch.set_num_threads(1)
        images = image_set(
            index_shards(run.config),
            size=32,
            batch_size=16,
            normalize=channel_normalize(declared),
            channels=channel_spec(declared),
        )
        model = eval_model_of(method, run.config, CPU)
        expected = torch.cat([model.tokens(batch.images).cls.float() for batch in images]).numpy()
    assert np.array_equal(result.read(0)["embedding"], expected)
    about = result.spec.image
    assert about.mean == (0.5, 0.4, 0.5, 0.6) and about.channels is not None
    assert about.channels.settings == declared.model_copy(update={"mean": None, "std": None})


def test_a_folder_is_not_continued_with_other_channels(run: Loaded, tmp_path: Path) -> None:
    embedded(request_of(run, tmp_path / "out"), run.config)
    assert run.config.data.channels is not None
    swapped = run.config.data.channels.model_copy(update={"members": ("b2.npy", "b1.tif")})
    other = run.config.model_copy(update={"data": run.config.data.model_copy(update={"channels": swapped})})
    with pytest.raises(ConfigError, match="holds embeddings with channels"):
        embedded(request_of(run, tmp_path / "out"), other)


def test_exported_weights_embed_the_same_channels_and_no_others(run: Loaded, tmp_path: Path) -> None:
    method = {"name": "dinov2", "views": {"global_size": 32, "local_count": 0}, "prototypes": 16, "head_hidden": 8}
    config = settings(method | {"head_bottleneck": 8})
    tree = config.model_dump(mode="json") | {"data": {"shards": ["nowhere.tar"], "channels": CHANNELS}}
    saved, _ = checkpoint(tmp_path / "run", Config.model_validate(tree | {"model": {**tree["model"], "in_channels": 4}}))
    folder = export(networks(saved), "timm", tmp_path / "timm")
    loaded = pretrained.load(str(folder), model=None, device=CPU)
    assert loaded.subject.mean == (0.5, 0.4, 0.5, 0.6)
    words = [f"data.shards={run.config.data.shards[0]}", f"data.index={tmp_path}/index", "launch.backend=gloo"]
    request = EmbedRequest(tmp_path / "out", str(folder), dtype="float32", batch_size=16)
    result = embedded(request, settings_for_weights([*words, f"data.channels={CHANNELS}"]))
    assert result.spec.image.std == (0.3, 0.2, 0.3, 0.3) and len(result.read(0)["embedding"]) == 12
    fewer = {"count": 3, "members": ["b1.tif", "b2.npy"], "mean": [0.5] * 3, "std": [0.3] * 3}
    write_tar(
        tmp_path / "three.tar", [("k", {"b1.tif": tiff_file(IMAGES[0][:, :, :1]), "b2.npy": npy_file(IMAGES[0][:, :, 1:3])})]
    )
    three = settings_for_weights([f"data.shards={tmp_path}/three.tar", *words[1:], f"data.channels={fewer}"])
    with pytest.raises(ConfigError, match="the weights read 4 channels, and the images have 3"):
        embedded(replace(request, directory=tmp_path / "other"), three)


def test_the_page_of_duplicates_shows_the_declared_composite(
    run: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.reports import images

    embedded(request_of(run, tmp_path / "emb"), run.config)
    drawn: list[Any] = []
    fitted = images.fitted
    monkeypatch.setattr(images, "fitted", lambda pixels, *a, **k: (drawn.append(pixels), fitted(pixels, *a, **k))[1])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words = ("--out", tmp_path / "u.parquet", "--preview", tmp_path / "u.html", "--shards", run.config.data.shards[0])
    assert fovea("shards", "dedup", tmp_path / "emb", *words, "--threshold", "0.999") == 0
    assert any(np.array_equal(pixels, composite(IMAGES[10], (3, 2, 0))) for pixels in drawn)


@pytest.mark.parametrize(
    "change", [{"composite": [0, 1]}, {"composite": [0, 1, 9]}, {"names": []}, {"names": ["a"] * 17}, {"members": ["../x"] * 2}]
)
def test_descriptions_of_other_channels_are_refused(change: dict[str, Any]) -> None:
    channels = {"names": ["a", "b", "c", "d"], "dtype": "uint16", "composite": [0, 1, 2], "members": [], "dicom": "full"}
    spec = {"pooling": "cls", "dim": 4, "dtype": "float32", "image": {"channels": channels}}
    document.validated(document.SPEC, spec, "x")
    spec["image"]["channels"].update(change)  # type: ignore[index]
    with pytest.raises(DataError, match="is damaged"):
        document.validated(document.SPEC, spec, "x")
