"""Sizes of images that weights name: one rule for all who read them, positions of rectangles, and hostile values."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.checkpoint.files import Saved
from pipeline.config.sizes import Size
from pipeline.errors import CheckpointError, FoveaError
from pipeline.methods.base import Method
from pipeline.methods.registry import build_method
from pipeline.models.positions import resample_positions
from pipeline.weights import pretrained
from pipeline.weights.adapt.describe import describe
from pipeline.weights.export.networks import read as networks
from pipeline.weights.export.write import write as export
from pipeline.weights.folder_config import image_sizes
from pipeline.weights.folder_hints import hints_of, sizes_of
from pipeline.weights.init_from import begin
from tests.helpers.exported import DINO, checkpoint, settings

# As many positions as a square of 4 x 4 has.
OBLONG = {**DINO, "views": {"global_size": [16, 64], "local_count": 0}}
TALL = {**DINO, "views": {"global_size": [64, 16], "local_count": 0}}
HOSTILE: list[Any] = [
    *(0, -8, True, float("nan"), float("inf"), 1e308, 16.0, 1 << 17, 1 << 70, "16", {"a": 1}, {"height": 16}),
    *(
        [],
        [16],
        [16, 64, 64],
        [16, [64]],
        [[16, 64]],
        [16, 0],
        [16, -64],
        [16, True],
        [16, float("nan")],
        [16, 1 << 40],
        [16, None],
    ),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return checkpoint(tmp_path_factory.mktemp("oblong"), settings(OBLONG))[0]


def positions(method: Method) -> Tensor:
    return method.get_submodule("backbone").vit.pos_embed.detach()  # type: ignore[union-attr, return-value]


def started(source: Path, method: dict[str, Any] = OBLONG) -> Tensor:
    config = settings(method)
    config = config.replace(init_from=config.init_from.model_copy(update={"source": str(source)}))
    built = build_method(config)
    begin(built, config, record=False)
    return positions(built)


def own(saved: Saved, size: Size | None = None) -> Tensor:
    return networks(saved, size=size).tower.vit.pos_embed.detach()  # type: ignore[union-attr, return-value]


@pytest.mark.parametrize("layout", ["timm", "safetensors"])
@pytest.mark.parametrize("inside", ["", "model.safetensors"])
def test_init_from_an_export_of_a_rectangular_run_keeps_its_positions(
    run: Saved, layout: str, inside: str, tmp_path: Path
) -> None:
    folder = export(networks(run), layout, tmp_path / layout)
    assert torch.equal(started(folder / inside), own(run))
    turned = resample_positions(own(run), (8, 2), (2, 8), prefix=1)
    assert torch.equal(started(folder / inside, TALL), turned)


def test_init_from_an_export_for_another_size_starts_from_its_grid(run: Saved, tmp_path: Path) -> None:
    folder = export(networks(run, size=32), "timm", tmp_path / "timm")
    square = resample_positions(own(run), (4, 4), (2, 8), prefix=1)
    assert torch.equal(started(folder), resample_positions(square, (2, 8), (4, 4), prefix=1))
    # The file of fovea's own layout has the positions of the run.
    assert torch.equal(started(export(networks(run, size=32), "safetensors", tmp_path / "own")), own(run))


def edited(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


@pytest.mark.parametrize("value", HOSTILE, ids=str)
def test_a_size_that_is_none_is_refused_wherever_it_is_named(value: Any, run: Saved, tmp_path: Path) -> None:
    fovea, timm_, old = (tmp_path / name for name in ("fovea", "timm", "old"))
    for folder, layout in ((fovea, "safetensors"), (timm_, "timm"), (old, "timm")):
        export(networks(run), layout, folder)
    edited(fovea / "config.json", lambda d: d["fovea"]["method"]["views"].update(global_size=value))
    edited(timm_ / "config.json", lambda d: d["model_args"].update(img_size=value))

    def renamed(document: dict[str, Any]) -> None:
        del document["model_args"]["img_size"]
        document["pretrained_cfg"]["input_size"] = [3, *(value if isinstance(value, list) else [value, value])]

    edited(old / "config.json", renamed)
    for folder in (fovea, timm_, old):
        for read in (started, hints_of, lambda one: started(one / "model.safetensors"), lambda one: describe(str(one), {})):
            with pytest.raises(CheckpointError, match=r"config\.json: (the size of images must be|input_size must be)"):
                read(folder)
    for folder in (timm_, old):
        with pytest.raises(CheckpointError):
            pretrained.load(str(folder), model=None, device=torch.device("cpu"))
    for document in (
        {"model_type": "dinov2", "image_size": value},
        {"model_type": "clip", "vision_config": {"image_size": value}},
        {"model_cfg": {"vision_cfg": {"image_size": value}}},
        {"model_cfg": {}, "preprocess_cfg": {"size": value}},
    ):
        with pytest.raises(CheckpointError, match="the size of images must be a number from 1 to 65536, or two of them"):
            image_sizes(document, where="x")


@pytest.mark.parametrize("value", HOSTILE, ids=str)
def test_a_checkpoint_that_names_such_a_size_is_refused(value: Any, tmp_path: Path) -> None:
    saved, _ = checkpoint(tmp_path, settings(OBLONG))
    edited(saved.path / "manifest.json", lambda d: d["config"]["method"]["views"].update(global_size=value))
    with pytest.raises(CheckpointError, match="the size of images must be a number from 1 to 65536, or two of them"):
        started(saved.path)


@pytest.mark.parametrize("key", ["method", "views"])
@pytest.mark.parametrize("value", [None, [], ["views"], "views", 3, True, {}, {"views": []}])
def test_a_checkpoint_with_other_settings_is_no_traceback(key: str, value: Any, tmp_path: Path) -> None:
    saved, _ = checkpoint(tmp_path, settings(OBLONG))
    edited(
        saved.path / "manifest.json", lambda d: (d["config"] if key == "method" else d["config"]["method"]).update({key: value})
    )
    try:
        assert started(saved.path).shape == (1, 17, 32)
    except FoveaError as error:
        assert str(saved.path) in str(error)


@pytest.mark.parametrize("layout", ["timm", "safetensors"])
def test_all_readers_of_a_folder_name_the_same_size(layout: str, run: Saved, tmp_path: Path) -> None:
    folder = export(networks(run), layout, tmp_path / layout)
    sizes = sizes_of(folder)
    assert sizes.positions == sizes.images == hints_of(folder).image_size == describe(str(folder), {}).architecture.image_size
    assert describe(str(folder / "model.safetensors"), {}).architecture.image_size == sizes.positions == (16, 64)
    if layout == "timm":
        assert pretrained.load(str(folder), model=None, device=torch.device("cpu")).size == (16, 64)


@pytest.mark.parametrize(
    ("document", "pixels", "positions", "images"),
    [
        ({"architecture": "x", "pretrained_cfg": {"input_size": [3, 16, 64]}}, {}, (16, 64), (16, 64)),
        ({"architecture": "x", "input_size": [3, 32, 32], "model_args": {"img_size": [64, 16]}}, {}, (64, 16), 32),
        ({"architecture": "x", "fovea": {"channels": ["a"]}, "model_args": {"img_size": 16}}, {}, 16, None),
        ({"model_type": "dinov2", "image_size": 518}, {"crop_size": {"height": 224, "width": 448}}, 518, (224, 448)),
        ({"model_type": "vit", "image_size": [16, 64]}, {"crop_size": {"height": 32}}, (16, 64), 32),
        ({"model_type": "clip", "vision_config": {"image_size": 336}}, {"crop_size": {"shortest_edge": 224}}, 336, 224),
        ({"model_cfg": {"vision_cfg": {"image_size": 336}}}, {}, 336, 336),
        ({"model_cfg": {"vision_cfg": {"image_size": [16, 64]}}, "preprocess_cfg": {"size": [32, 32]}}, {}, (16, 64), 32),
        ({"fovea": {"method": {"views": {"global_size": [16, 64]}}}}, {}, (16, 64), (16, 64)),
        ({"fovea": {"method": []}}, {}, None, None),
        ({}, {}, None, None),
    ],
)
def test_the_size_of_each_layout(document: dict[str, Any], pixels: dict[str, Any], positions: Size, images: Size) -> None:
    sizes = image_sizes(document, where="x", pixels=pixels)
    assert (sizes.positions, sizes.images) == (positions, images)


def test_a_folder_that_asks_for_more_memory_than_its_file_is_refused(run: Saved, tmp_path: Path) -> None:
    folder = export(networks(run), "timm", tmp_path / "timm")
    edited(folder / "config.json", lambda d: d["model_args"].update(img_size=[1 << 16, 1 << 16]))
    with pytest.raises(CheckpointError, match=r"the settings need .* weights, more than the file has"):
        pretrained.load(str(folder), model=None, device=torch.device("cpu"))
