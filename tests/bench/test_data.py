"""The benchmark of the data path: all CPU time counts, every path makes the same views of the same images."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image

from pipeline.bench import baselines
from pipeline.bench.data import Options, Result, dataset, markdown, measure, prepare, rows
from pipeline.bench.machine import cpu_seconds, describe
from pipeline.bench.report import write
from pipeline.data.index.manifest import Manifest
from pipeline.errors import DataError

BURN = "import time\nend = time.process_time() + 0.4\nwhile time.process_time() < end: pass"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, Path]:
    folder = tmp_path_factory.mktemp("bench")
    return prepare(Options(images=6, batch=2), folder)[0], folder


def test_time_of_this_process_and_of_living_and_dead_children_is_counted() -> None:
    begin = cpu_seconds()
    end = time.process_time() + 0.2
    while time.process_time() < end:
        pass
    own = cpu_seconds() - begin
    assert 0.15 < own < 0.6
    subprocess.run([sys.executable, "-c", BURN], check=True)
    dead = cpu_seconds() - begin - own
    assert 0.35 < dead < 1.5
    child = subprocess.Popen([sys.executable, "-c", f"{BURN}\ninput()"], stdin=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 30
        while cpu_seconds() - begin - own - dead < 0.35:
            assert time.monotonic() < deadline, "what a living child spends is not seen"
            time.sleep(0.05)
    finally:
        child.communicate(b"\n")


def test_every_path_makes_the_same_views(packed: tuple[Manifest, Path]) -> None:
    manifest, folder = packed
    expected = [(2, 3, 224, 224)] * 2 + [(2, 3, 96, 96)] * 8
    for kind in ("classic", "v2"):
        batches = baselines.torchvision_batches(manifest, batch=2, hue=False, kind=kind, workers=0)
        assert [tuple(view.shape) for view in next(batches)] == expected
    for views in islice(baselines.dali_batches(manifest, folder, batch=2, hue=False, threads=1), 2):
        assert [tuple(view.shape) for view in views] == expected
        assert all(view.dtype == torch.float32 and torch.isfinite(view).all() for view in views)
    assert [(spec.count, spec.size) for spec in dataset(manifest, Options(batch=2)).specs] == [(2, 224), (8, 96)]


def test_baselines_read_the_same_images(packed: tuple[Manifest, Path]) -> None:
    manifest, folder = packed
    found = baselines.spans(manifest)
    assert len(found) == 6
    _, indices = baselines.write_dali_indices(manifest, folder)
    listed = [line.split() for index in indices for line in Path(index).read_text().splitlines()[1:]]
    for (path, offset, size), (extension, start, length, _) in zip(found, listed, strict=True):
        assert (extension, int(start), int(length)) == ("jpg", offset, size)
        data = Path(path).read_bytes()[offset : offset + size]
        assert data[:2] == b"\xff\xd8"
        assert data[-2:] == b"\xff\xd9"


def test_photographs_are_packed_at_one_size_and_repeated_mirrored(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    left = Image.new("RGB", (640, 480))
    left.paste((255, 255, 255), (0, 0, 320, 480))
    left.save(photos / "a.png")
    manifest, about = prepare(Options(photos=photos, images=2, batch=2), tmp_path)
    sides = []
    for path, offset, size in baselines.spans(manifest):
        (tmp_path / "one.jpg").write_bytes(Path(path).read_bytes()[offset : offset + size])
        with Image.open(tmp_path / "one.jpg") as image:
            assert image.size == (500, 375)
            sides.append(image.convert("L").getpixel((50, 100)))
    assert sorted(sides) == [0, 255]
    assert "1 photographs" in about


def test_too_few_pictures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="2 images are fewer than a batch of 32"):
        prepare(Options(images=2), tmp_path)
    with pytest.raises(DataError, match=r"must contain \.jpg"):
        prepare(Options(photos=tmp_path), tmp_path)


def result() -> Result:
    costs = {"torchvision classic": 20.0, "torchvision v2": 16.0, "DALI's reader": 12.0, "fovea, hue off": 10.0}
    hued = {"torchvision classic, hue": 30.0, "torchvision v2, hue": 40.0, "DALI's reader, hue": 9.0, "fovea, hue hsv": 15.0}
    return Result(
        {"images": "8"}, {name: [cost + 1, cost] for name, cost in {**costs, **hued}.items()}, {"read": 1.0, "augment": 9.0}
    )


def test_ratios_compare_equal_tasks_and_the_better_torchvision() -> None:
    table = {name: (cost, list(ratios)) for name, cost, ratios in rows(result())}
    assert table["fovea, hue off"] == (10.0, ["1.60", "1.20"])
    assert table["fovea, hue hsv"] == (15.0, ["2.00", "0.60"])
    assert table["torchvision v2, hue"][1][0] == "0.75"


def test_results_are_written_with_machine_versions_and_command(tmp_path: Path) -> None:
    write(tmp_path / "deep" / "r.1", "fovea bench data", partial(markdown, result()), asdict(result()))
    document, page = tmp_path / "deep" / "r.1.json", tmp_path / "deep" / "r.1.md"
    found = json.loads(document.read_text())
    assert found["machine"].keys() == describe().keys()
    assert found["machine"]["torch"].startswith(torch.__version__.split("+")[0])
    assert found["milliseconds"]["fovea, hue off"] == [11.0, 10.0]
    text = page.read_text()
    assert "| fovea, hue off | 10.00 | 1.60 times | 1.20 times |" in text
    assert "| read | 1.000 | 10.0% |" in text


@pytest.mark.slow
def test_a_small_measurement_runs_through() -> None:
    found = measure(Options(images=8, batch=4, rounds=1))
    assert len(found.milliseconds) == 9
    assert all(cost > 0 for costs in found.milliseconds.values() for cost in costs)
    assert set(found.stages) == {"read", "plan", "decode", "augment", "hand over"}
    assert found.stages["augment"] > found.stages["read"] > 0
