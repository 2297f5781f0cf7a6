"""The comparison with lightly: what its page says, which images both sides see, and a short run of both."""

from __future__ import annotations

import io
import math
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.bench import peers
from pipeline.bench.peers import Options, PeerResult, difference_of, line, markdown, measure
from pipeline.errors import ConfigError


def _results(method: str, ours: tuple[float, ...], theirs: tuple[float, ...]) -> list[PeerResult]:
    runs = [PeerResult(method, side, 0, 128, cpu=cost) for side, cost in (("fovea", 2.0), ("lightly", 4.0), ("fovea", 1.5))]
    for side, values in (("fovea", ours), ("lightly", theirs)):
        runs += [PeerResult(method, side, seed, 128, {0: 0.3, 256: value}) for seed, value in enumerate(values)]
    return runs


def test_the_page_compares_means_with_intervals_and_the_least_time() -> None:
    results = _results("simclr", (0.45, 0.46, 0.47), (0.46, 0.47, 0.48)) + _results(
        "byol", (0.40, 0.40, 0.41), (0.50, 0.50, 0.51)
    )
    text = markdown(results, {"cores": "2"}, "fovea bench peers")
    assert "| simclr | 256 | 30.0 % | 46.0 ± 2.5 % | 47.0 ± 2.5 % | -1.0 ± 2.3 | yes | 3 |" in text
    assert "| byol |" in text and "| no | 3 |" in text  # ten points below
    assert "- simclr, lightly: 0: 30.0 · 256: 47.0" in text
    assert "| simclr | 128 | 1.50 | 4.00 | 0.38 |" in text
    assert line(results[0]) == "simclr, fovea, 0: 2.00 CPU s for 1000 samples"


def test_one_seed_decides_nothing_and_a_failure_is_shown() -> None:
    results = [*_results("simclr", (0.45,), (0.46,)), PeerResult("dino", "lightly", 0, failed="no memory")]
    text = markdown(results, {}, "fovea bench peers")
    assert "| undecided | 1 |" in text and "- dino, lightly, 0: no memory" in text
    assert math.isnan(difference_of([0.4], [0.5])[1])


def _shard(file: Path, names: list[tuple[str, str]]) -> None:
    random = np.random.default_rng(list(file.name.encode()))
    with tarfile.open(file, "w") as archive:
        for stem, label in names:
            picture = io.BytesIO()
            Image.fromarray(random.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(picture, "PNG")
            for suffix, data in (("png", picture.getvalue()), ("cls", label.encode())):
                member = tarfile.TarInfo(f"{stem}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def test_names_in_shards_decide_nothing_about_where_images_are_written(tmp_path: Path) -> None:
    _shard(tmp_path / "train-00000.tar", [("a", "3"), ("../../b", "4"), ("/c", "3")])
    _shard(tmp_path / "val-00000.tar", [("a", "3")])
    options = Options(f"{tmp_path}/train-00000.tar", tmp_path / "out")
    peers._write_images(options)
    written = {str(file.relative_to(tmp_path / "out")) for file in (tmp_path / "out").rglob("*.png")}
    assert written == {
        "images/train/3/train-00000-000000.png",
        "images/train/4/train-00000-000001.png",
        "images/train/3/train-00000-000002.png",
        "images/val/3/val-00000-000000.png",
    }
    assert not list(tmp_path.glob("*.png")) and not list(tmp_path.parent.glob("b.png"))


def test_without_lightly_the_command_to_install_it_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"lightly is not installed.*pip install --no-deps lightly"):
        list(measure(["simclr"], Options("none.tar", tmp_path)))


@pytest.mark.slow
def test_both_sides_run_and_are_not_repeated(tmp_path: Path) -> None:
    for part, count in (("train", 256), ("val", 20)):
        _shard(tmp_path / f"{part}-00000.tar", [(f"{i}", str(i % 2)) for i in range(count)])
    options = Options(f"{tmp_path}/train-00000.tar", tmp_path / "out", seeds=1, epochs=1, steps=(1, 2), rounds=1)
    first = list(measure(["simclr"], options))
    assert [result.failed for result in first] == [""] * 4
    assert all(0 in result.knn and 256 in result.knn for result in first[2:])
    assert [result.knn for result in list(measure(["simclr"], options))[2:]] == [result.knn for result in first[2:]]
