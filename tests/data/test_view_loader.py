"""Views as a library: the tensors of a run, elastic over ranks and batches, resumed at any batch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.data import Augment, ViewLoader, ViewSpec
from pipeline.data.augment.views import MaskSpec, TextSpec
from pipeline.data.index.build import build
from pipeline.data.loader.bad_samples import BadSamples
from pipeline.data.loader.batch_stream import BatchStream, StreamOptions
from pipeline.data.loader.encoded_batches import StepDataset
from pipeline.data.loader.reader import Reader
from pipeline.data.order.order import Order
from pipeline.errors import ConfigError, DataError
from tests.helpers.channel_images import npy_file, random_image, write_tar
from tests.helpers.library import make
from tests.helpers.shared import made_once

BATCH, SEED, EPOCH = 8, 5, 6
COLOUR = Augment(jitter_probability=0.8, brightness=0.4, gray_probability=0.2)
VIEWS = (
    ViewSpec("global", 2, 16, (0.32, 1.0), augment=(COLOUR,), mask=MaskSpec(patch=4)),
    ViewSpec("local", 1, 8, (0.05, 0.32), augment=(COLOUR,)),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "library", make)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def loader(folder: Path, tmp_path: Path, **options: Any) -> ViewLoader:
    kept = {"views": VIEWS, "global_batch_size": BATCH, "seed": SEED, "device": "cpu", "num_workers": 0, "threads": 1}
    return ViewLoader(str(folder / "a-*.tar"), index=str(tmp_path / "index"), **{**kept, **options})


def rows(batch: Any) -> Iterator[dict[str, Any]]:
    for number, key in enumerate(batch.keys):
        views = {f"{name}{n}": view[number] for name, group in batch.views.items() for n, view in enumerate(group)}
        yield {"key": key, "label": int(batch.labels[number]), **views}


def same(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> bool:
    return len(ours) == len(theirs) and all(
        torch.equal(a[name], b[name]) if torch.is_tensor(a[name]) else a[name] == b[name]
        for a, b in zip(ours, theirs, strict=True)
        for name in a
    )


@pytest.fixture(scope="module")
def expected(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What a run hands to its method in the first epoch and a half."""
    manifest = build(sorted(str(path) for path in folder.glob("a-*.tar")), tmp_path_factory.mktemp("index"))
    steps = StepDataset(Reader(manifest), Order(manifest.sizes, SEED, BATCH), VIEWS, seed=SEED, world=1, rank=0)
    stream = BatchStream(
        steps,
        device=torch.device("cpu"),
        options=StreamOptions(micro_batch=BATCH, workers=0),
        bad_samples=BadSamples(None),
        last=EPOCH + 3,
    )
    return [row for _, batches in stream for batch in batches for row in rows(batch)]


def test_views_are_those_of_a_run_and_resume_at_any_batch(folder: Path, tmp_path: Path, expected: list[dict[str, Any]]) -> None:
    seen: list[dict[str, Any]] = []
    first = loader(folder, tmp_path, batch_size=4)
    assert len(first) == 2 * EPOCH
    for batch in first:
        assert batch.masks["global"].grid.shape == (2 * 4, 16)
        seen += rows(batch)
        if len(seen) == 5 * 4:  # in the middle of a step
            break
    state = first.state_dict()
    assert (state["samples"], first.step) == (20, 2)
    assert first.dataset.state_dict() == state
    second = loader(folder, tmp_path, batch_size=4)
    second.load_state_dict(state)
    for batch in second:
        seen += rows(batch)
    assert (len(seen), second.epoch) == (EPOCH * BATCH, 1)
    for batch in second:
        seen += rows(batch)
        if len(seen) == len(expected):
            break
    assert same(seen, expected)
    with pytest.raises(DataError, match="lies within a batch of 8"):
        loader(folder, tmp_path).load_state_dict(state)
    with pytest.raises(DataError, match="2 ranks cannot continue it"):
        loader(folder, tmp_path, rank=0, world_size=2).load_state_dict(state)
    second.dataset.seek(2)
    assert same(list(rows(next(iter(second)))), expected[16:20])


def test_two_ranks_together_have_the_samples_of_one(folder: Path, tmp_path: Path, expected: list[dict[str, Any]]) -> None:
    parts = [[list(rows(batch)) for batch in loader(folder, tmp_path, rank=rank, world_size=2)] for rank in range(2)]
    together = [row for pair in zip(*parts, strict=True) for half in pair for row in half]
    assert same(together, expected[: EPOCH * BATCH])


def test_captions_become_tokens(folder: Path, tmp_path: Path) -> None:
    batch = next(iter(loader(folder, tmp_path, text=TextSpec(context=16), require=["caption"])))
    assert batch.tokens is not None
    assert batch.tokens.shape == (BATCH, 16)
    assert all(caption.startswith("first") for caption in batch.captions or [])


def test_no_views_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there are no views"):
        loader(folder, tmp_path, views=())


def test_views_of_declared_channels(tmp_path: Path) -> None:
    images = [random_image("uint16", 4, 30, 34, seed=n) for n in range(8)]
    write_tar(tmp_path / "x.tar", [(f"k{n}", {"npy": npy_file(image)}) for n, image in enumerate(images)])
    made = ViewLoader(
        str(tmp_path / "x.tar"),
        views=[ViewSpec("whole", 1, (30, 34), None)],
        global_batch_size=4,
        canonical_streams=2,
        channels={"count": 4, "mean": [0.5, 0.4, 0.5, 0.5], "std": [0.3, 0.2, 0.1, 0.3]},
        index=str(tmp_path / "index"),
        device="cpu",
        num_workers=0,
        threads=1,
    )
    batch = next(iter(made))
    image = images[int(batch.keys[0][1:])].transpose(2, 0, 1) / 65535
    expected = (image - np.array([0.5, 0.4, 0.5, 0.5])[:, None, None]) / np.array([0.3, 0.2, 0.1, 0.3])[:, None, None]
    assert np.abs(batch.views["whole"][0][0].numpy() - expected).max() < 1e-4
