"""The embedded data set: deterministic, balanced, told truly by its captions, and hard for raw pixels."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from pipeline.data import storage
from pipeline.data.index.build import Fields, build
from pipeline.data.loader.reader import Reader
from pipeline.data.pack import synthetic as scenes
from pipeline.errors import DataError


def test_a_scene_depends_on_seed_and_index_only() -> None:
    first = scenes.render(3, 17)
    scenes.render(4, 5)
    again = scenes.render(3, 17)
    assert np.array_equal(first.image, again.image)
    assert (first.captions, first.objects, first.label) == (again.captions, again.objects, again.label)
    assert not np.array_equal(first.image, scenes.render(3, 18).image)
    assert not np.array_equal(first.image, scenes.render(4, 17).image)


def test_any_size_shows_the_same_scene() -> None:
    small, large = scenes.render(0, 9, 32), scenes.render(0, 9, 160)
    assert large.image.shape == (160, 160, 3)
    assert (small.captions, small.label, small.objects) == (large.captions, large.label, large.objects)
    shrunk = large.segmentation[2::5, 2::5]
    assert (shrunk == small.segmentation).mean() > 0.9
    with pytest.raises(DataError, match="too small"):
        scenes.render(0, 0, 4)


def test_classes_are_balanced_and_unsorted() -> None:
    labels = [scenes.label_of(0, index) for index in range(200)]
    assert set(Counter(labels).values()) == {20}
    assert labels[:10] != labels[10:20]


def test_neither_texture_nor_shape_alone_names_the_class() -> None:
    assert len(scenes.CLASS_NAMES) == len(set(scenes.CLASS_NAMES)) == 10
    assert set(Counter(texture for texture, _ in scenes.KINDS).values()) == {2}
    assert set(Counter(shape for _, shape in scenes.KINDS).values()) == {2}


def test_the_class_covers_a_good_part_of_every_picture() -> None:
    shares = [(s.segmentation == s.label + 1).mean() for s in (scenes.render(0, index) for index in range(100))]
    assert min(shares) > 0.08
    assert 0.25 < np.mean(shares) < 0.6


def test_segmentation_holds_the_kinds_that_are_there() -> None:
    for index in range(50):
        scene = scenes.render(1, index)
        assert set(np.unique(scene.segmentation).tolist()) <= {0, *(thing.kind + 1 for thing in scene.objects)}
        assert scene.class_name == scenes.CLASS_NAMES[scene.label]


def test_captions_tell_the_truth() -> None:
    relations: Counter[str] = Counter()
    for index in range(200):
        scene = scenes.render(2, index)
        first = next(thing for thing in scene.objects if thing.kind == scene.label)
        other = next(thing for thing in scene.objects if thing.kind != scene.label)
        for caption in scene.captions:
            assert scene.class_name in caption or f"{scene.class_name}s" in caption
            assert caption.endswith(f" {scene.ground} ground")
            for words in ("left of", "right of", "above", "below", "inside", "bigger than", "smaller than"):
                if f" {words} " not in caption:
                    continue
                relations[words] += 1
                subject = first if caption.split(f" {words} ")[0] == f"a {scene.class_name}" else other
                object_ = other if subject is first else first
                truth = {
                    "left of": subject.x < object_.x,
                    "right of": subject.x > object_.x,
                    "above": subject.y < object_.y,
                    "below": subject.y > object_.y,
                    "inside": subject.radius < object_.radius,
                    "bigger than": subject.radius > object_.radius,
                    "smaller than": subject.radius < object_.radius,
                }
                assert truth[words], caption
    assert min(relations[words] for words in ("left of", "right of", "above", "below", "inside")) > 10


def test_raw_pixels_say_little_about_the_class() -> None:
    bank = [scenes.render(0, index, 32) for index in range(400)]
    asked = [scenes.render(0, (1 << 40) + index, 32) for index in range(150)]
    a = np.stack([s.image for s in bank]).reshape(len(bank), -1).astype(np.float32)
    b = np.stack([s.image for s in asked]).reshape(len(asked), -1).astype(np.float32)
    a, b = (x - x.mean(1, keepdims=True) for x in (a, b))
    near = (b @ a.T / np.linalg.norm(a, axis=1)).argsort(1)[:, -10:]
    labels = np.array([s.label for s in bank])
    voted = np.array([np.bincount(labels[row], minlength=10).argmax() for row in near])
    assert (voted == np.array([s.label for s in asked])).mean() < 0.25


def test_a_scene_takes_about_a_millisecond() -> None:
    scenes.render(0, 0)
    rounds = []
    for _ in range(3):
        started = time.process_time()
        for index in range(50):
            scenes.render(0, index)
        rounds.append((time.process_time() - started) / 50)
    assert min(rounds) < 0.005


def test_written_shards_hold_the_scenes_and_are_written_once(tmp_path: Path) -> None:
    shards = scenes.write(tmp_path, train=25, val=10, size=32, seed=5, samples_per_shard=10)
    assert [Path(path).name for path in shards] == [*(f"scenes-train-0000{n}.tar" for n in range(3)), "scenes-val-00000.tar"]
    manifest = build(
        storage.expand(f"{tmp_path}/scenes-*.tar"),
        tmp_path / "index",
        fields=Fields(require=("caption", "label", "segmentation")),
    )
    assert (manifest.total, manifest.classes, manifest.counts) == (35, 10, {"ok": 35})
    records = Reader(manifest).fetch(manifest.ids())
    assert [r.caption for r in records[:25]] == [scenes.render(5, n).caption for n in range(25)]
    assert [r.label for r in records[:25]] == [scenes.label_of(5, n) for n in range(25)]
    assert not {r.caption for r in records[:25]} & {r.caption for r in records[25:]} or len({r.image for r in records}) == 35
    times = [Path(path).stat().st_mtime_ns for path in shards]
    assert scenes.write(tmp_path, train=25, val=10, size=32, seed=5, samples_per_shard=10) == shards
    assert [Path(path).stat().st_mtime_ns for path in shards] == times


def test_a_changed_wish_or_a_lost_shard_writes_the_set_anew(tmp_path: Path) -> None:
    first = scenes.write(tmp_path, train=20, val=10, size=32, samples_per_shard=10)
    before = [Path(path).read_bytes() for path in first]
    Path(first[0]).unlink()
    assert [Path(path).read_bytes() for path in scenes.write(tmp_path, train=20, val=10, size=32, samples_per_shard=10)] == before
    fewer = scenes.write(tmp_path, train=10, val=10, size=32, samples_per_shard=10)
    assert sorted(str(path) for path in tmp_path.glob("*.tar")) == sorted(fewer)
    assert [Path(path).read_bytes() for path in fewer] == [before[0], before[2]]
