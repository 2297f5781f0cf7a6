"""The experiment on curation: what is planted is what the keys say, and the page has a table for each stage."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.bench.curation import STAGES, CurationResult, Folders, _truth, line, markdown, measure
from pipeline.bench.curation_sets import KINDS, counts_of, kind_of, original_of, write_leak, write_resaved, write_scenes
from pipeline.data.curation.outcome import Outcome
from pipeline.data.pack import synthetic
from tests.helpers import library


def keys_of(folder: Path, pattern: str) -> dict[str, bytes]:
    images: dict[str, bytes] = {}
    for shard in sorted(folder.glob(pattern)):
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith(".jpg"):
                    file = tar.extractfile(member)
                    assert file is not None
                    images[member.name.removesuffix(".jpg")] = file.read()
    return images


def test_classes_fall_from_the_first_to_the_last_by_the_skew() -> None:
    counts = counts_of(2800)
    assert len(counts) == 10 and counts == sorted(counts, reverse=True)
    assert counts[0] / counts[-1] == pytest.approx(50, rel=0.05)


def test_scenes_have_the_copies_that_their_keys_name(tmp_path: Path) -> None:
    total = write_scenes(tmp_path, 100, 0.3, 0, size=32)
    images = keys_of(tmp_path, "raw-*.tar")
    assert len(images) == total and len(keys_of(tmp_path, "val-*.tar")) == 1000
    copies = [key for key in images if kind_of(key)]
    assert len(copies) / total == pytest.approx(0.3, abs=0.01) and {kind_of(key) for key in copies} == set(KINDS)
    originals = {original_of(key): images[key] for key in images if not kind_of(key)}
    for key in copies:
        pair = [
            Image.open(io.BytesIO(content)).convert("RGB").resize((8, 8))
            for content in (images[key], originals[original_of(key)])
        ]
        near, far = (np.asarray(one, dtype=float) for one in pair)
        assert np.abs(near - far).mean() < 40 and images[key] != originals[original_of(key)]


def test_photographs_and_leaks_have_copies(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(library.jpeg(number, 32))
    assert write_resaved(tmp_path / "p", sorted(tmp_path.glob("*.jpg")), 5, 0) == 18
    assert len(keys_of(tmp_path / "p", "raw-*.tar")) == 18
    synthetic.write(tmp_path / "s", train=20, val=10, size=32)
    for name in ("train", "val"):
        for shard in (tmp_path / "s").glob(f"*{name}-*.tar"):
            shard.rename(tmp_path / f"{name}-{shard.name[-9:]}")
    write_leak(tmp_path / "l", tmp_path, 0, images=20, copies=4)
    assert sum(key.startswith("copy") for key in keys_of(tmp_path / "l", "raw-*.tar")) == 4
    assert len(keys_of(tmp_path / "l", "val-*.tar")) == 10


def test_recall_and_losses_are_counted_by_group() -> None:
    class Known:
        def column(self, name: str) -> list[str]:
            return ["000000-0", "000000-1-crop", "000001-0", "000001-1-crop", "000001-2-rotated", "000002-0"]

    outcome = Outcome(np.array([1, 0, 1, 1, 0, 0.0]), {})
    truth = _truth(Known(), outcome)  # type: ignore[arg-type]
    assert truth.removed == pytest.approx(2 / 3) and truth.lost == pytest.approx(1 / 3)
    assert truth.removed_of["crop"] == 0.5 and truth.removed_of["rotated"] == 0.0


def test_the_growth_of_the_last_two_sizes_is_carried_on_to_a_billion() -> None:
    def row(size: str, cpu: str, peak: str, disk: str) -> CurationResult:
        cells = {"embeddings": f"{size} x 384", "clusters": "1", "CPU seconds": cpu, "seconds": "1"}
        return CurationResult("scale", cells | {"peak memory, GB": peak, "disk, GB": disk})

    rows = [row("100 000", "1", "1.0", "0.1"), row("1 000 000", "36", "1.5", "2.0"), row("10 000 000", "720", "3.3", "20.0")]
    text = markdown(rows, {}, "fovea bench curation scale")
    assert "with the exponent 1.30, memory by 0.20 GB for a million" in text
    assert "take 80 CPU hours, 2.0 TB of disk and 201 GB of memory" in text
    assert "billion" not in markdown(rows[:1], {}, "")


def test_the_scale_is_measured_in_a_process_of_its_own(tmp_path: Path) -> None:
    (result,) = measure(["scale"], Folders(tmp_path), seeds=[0], sizes=[3000])
    assert not result.failed and float(result.row["peak memory, GB"]) > 0
    assert not list(tmp_path.glob("*.work"))


def test_the_page_has_a_table_for_each_stage() -> None:
    results = [CurationResult(stage, {"threshold": "0.97", "set": "x"}) for stage in STAGES]
    text = markdown([*results, CurationResult("leak", failed="no folder")], {"cores": "2"}, "fovea bench curation")
    assert text.count("\n## ") == len(STAGES) and "leak: no folder" in text
    assert line(results[0]) == "duplicates: threshold 0.97, set x"
    missing = list(measure(["photographs", "leak"], Folders(Path("x")), seeds=[0], sizes=[]))
    assert [result.failed for result in missing] == [
        "no folder of photographs: --photos",
        "no folder of CIFAR-10 shards: --cifar",
    ]
