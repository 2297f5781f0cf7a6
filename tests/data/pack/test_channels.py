"""Packing of images with declared channels: as they are, with what differs left out and counted; the spectral set."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.formats import read
from pipeline.data.formats.channels import Channels
from pipeline.data.pack import spectral
from pipeline.data.pack.packer import Packing, pack
from pipeline.data.pack.sources import Options, open_source
from pipeline.errors import ConfigError
from tests.helpers.channel_images import npy_file, random_image, tiff_file

THREE = Channels(3, "uint16")
STACK = Channels(3, "uint16", members=("b02.tif", "b03.tif", "b04.tif"))


def members_of(folder: Path) -> dict[str, bytes]:
    contents = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                file = archive.extractfile(member)
                assert file is not None
                contents[member.name] = file.read()
    return contents


def test_files_are_packed_as_they_are_and_others_are_left_out(tmp_path: Path) -> None:
    source = tmp_path / "source"
    files = {
        "a/1.tif": tiff_file(random_image("uint16", 3, seed=1)),
        "b/2.npy": npy_file(random_image("uint16", 3, seed=2)),
        "b/eight.tif": tiff_file(random_image("uint8", 3)),
        "b/four.npy": npy_file(random_image("uint16", 4)),
    }
    for name, data in files.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(data)
    listing = open_source(source, options=Options(channels=THREE))
    report = pack(listing, tmp_path / "out", Packing(seed=None, channels=THREE))
    assert report.packed == 2 and report.reasons == {"other_channels": 1, "other_dtype": 1}
    packed = members_of(tmp_path / "out")
    assert {name: data for name, data in packed.items() if name.endswith((".tif", ".npy"))} == {
        "000000000.tif": files["a/1.tif"],
        "000000001.npy": files["b/2.npy"],
    }
    assert packed["000000001.cls"] == b"1"
    assert "another number of channels" in report.text(tmp_path / "out", "train")


def test_files_of_one_image_stay_together(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    image = random_image("uint16", 3)
    for c, name in enumerate(STACK.members):
        (source / f"one.{name}").write_bytes(tiff_file(image[:, :, c : c + 1]))
        if c < 2:
            (source / f"two.{name}").write_bytes(tiff_file(image[:, :, c : c + 1]))
    (source / "one.cls").write_text("4")
    report = pack(open_source(source, options=Options(channels=STACK)), tmp_path / "out", Packing(channels=STACK))
    assert report.packed == 1 and report.reasons == {"missing_image": 1, "with_image": 1} | report.reasons
    assert set(members_of(tmp_path / "out")) == {*(f"one.{name}" for name in STACK.members), "one.cls"}


@pytest.mark.parametrize("change", [{"transcode": "png"}, {"max_side": 64}])
def test_they_are_never_converted(tmp_path: Path, change: dict[str, object]) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.npy").write_bytes(npy_file(random_image("uint16", 3)))
    with pytest.raises(ConfigError, match="packed as they are"):
        pack(
            open_source(tmp_path / "source", options=Options(channels=THREE)), tmp_path / "out", Packing(channels=THREE, **change)
        )  # type: ignore[arg-type]


def test_a_packing_of_rgb_images_is_recorded_as_before(tmp_path: Path) -> None:
    from tests.data.pack.test_packer import picture

    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.png").write_bytes(picture(0))
    pack(open_source(tmp_path / "source"), tmp_path / "out")
    assert "channels" not in json.dumps(json.loads((tmp_path / "out" / "train.pack.json").read_text()))


def test_spectral_images_show_their_class_in_the_fifth_channel_alone(tmp_path: Path) -> None:
    """A nearest class mean of channel means: what the fifth says, the others do not."""
    count = 400
    images, labels = zip(*(spectral.render_channels(3, index, 32) for index in range(count)), strict=True)
    assert images[0].dtype == np.uint16 and images[0].shape == (32, 32, 8)
    pixels = np.stack([image[:, :, :].reshape(-1, 8) for image in images]).astype(np.float64)
    classes = np.array(labels)
    assert np.bincount(classes).tolist() == [count // 10] * 10

    def accuracy(features: np.ndarray) -> float:
        half = count // 2
        centres = np.stack([features[:half][classes[:half] == k].mean(0) for k in range(10)])
        nearest = np.abs(features[half:, None] - centres[None]).sum(2).argmin(1)
        return float((nearest == classes[half:]).mean())

    bright = np.quantile(pixels, [0.75, 0.9], axis=1).transpose(1, 0, 2)
    assert accuracy(bright[:, :, spectral.STAINED]) > 0.6
    others = [c for c in range(8) if c != spectral.STAINED]
    assert accuracy(bright[:, :, others].reshape(count, -1)) < 0.2


def test_the_spectral_set_is_written_once_and_read_exactly(tmp_path: Path) -> None:
    shards = spectral.write(tmp_path, train=12, val=4, size=32, seed=5, samples_per_shard=8)
    assert [Path(shard).name for shard in shards] == [
        "spectral-train-00000.tar",
        "spectral-train-00001.tar",
        "spectral-val-00000.tar",
    ]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert spectral.write(tmp_path, train=12, val=4, size=32, seed=5, samples_per_shard=8) == shards
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    image, label = spectral.render_channels(5, 3, 32)
    packed = members_of(tmp_path)
    decoded = read.decode(packed["train_0000003.tif"], Channels(8, "uint16"))
    assert decoded is not None and np.array_equal(decoded, image)
    assert packed["train_0000003.cls"] == str(label).encode()
    rgb = spectral.write(tmp_path / "rgb", train=12, val=4, size=32, seed=5, channels=(0, 1, 2))
    decoded = read.decode(members_of(Path(rgb[0]).parent)["train_0000003.tif"], Channels(3, "uint16"))
    assert decoded is not None and np.array_equal(decoded, image[:, :, :3])
