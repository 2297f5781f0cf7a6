"""Statistics of the values of images with declared channels, against NumPy over all of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

from pipeline.data.channel_settings import ChannelSettings
from pipeline.data.formats.channels import Channels
from pipeline.data.index.build import build
from pipeline.data.index.fields import Fields
from pipeline.data.inspect.values import PERCENTILES, measure
from pipeline.errors import ConfigError, DataError
from tests.helpers.channel_images import npy_file, random_image, write_tar


def measured(folder: Path, images: list[np.ndarray], settings: ChannelSettings):  # type: ignore[no-untyped-def]
    url = write_tar(folder / "s.tar", [(str(n), {"npy": npy_file(image)}) for n, image in enumerate(images)])
    fields = Fields(images=("npy",), channels=Channels(settings.count, settings.dtype))
    return measure(build([url], folder / "index", fields=fields), settings)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_they_are_numpys(tmp_path: Path, dtype: str) -> None:
    images = [random_image(dtype, 3, 20 + n, 30, seed=n) // (1 if dtype == "float32" else n + 1) for n in range(20)]
    settings = ChannelSettings(count=3, dtype=dtype, names=("a", "b", "c"))  # type: ignore[arg-type]
    values = measured(tmp_path, images, settings)
    everything = np.concatenate([image.reshape(-1, 3) for image in images]).astype(np.float64)
    assert values.images == 20 and values.failed == 0
    for c, one in enumerate(values.channels):
        own = everything[:, c]
        assert (one.minimum, one.maximum) == (own.min(), own.max())
        assert one.mean == pytest.approx(own.mean(), rel=1e-9) and one.std == pytest.approx(own.std(), rel=1e-9)
        expected = np.percentile(own, PERCENTILES, method="inverted_cdf")
        if dtype == "float32":
            assert np.allclose(one.percentiles, expected, rtol=0.008, atol=1e-3)
        else:
            assert list(one.percentiles) == expected.tolist()


def test_the_snippet_is_a_config_section_with_the_normalization(tmp_path: Path) -> None:
    settings = ChannelSettings(count=2, dtype="uint16", names=("nir", "red edge"))
    values = measured(tmp_path, [random_image("uint16", 2, seed=n) for n in range(4)], settings)
    text = values.snippet("fovea shards stats x --channels 2xuint16")
    assert text.startswith("# fovea shards stats x")
    read = ChannelSettings.model_validate(yaml.safe_load(text)["data"]["channels"])
    assert read.labels == settings.names and read.mean is not None and read.std is not None
    for c, one in enumerate(values.channels):
        assert read.mean[c] == pytest.approx(one.mean / 65535, rel=1e-6)
        assert read.std[c] == pytest.approx(one.std / 65535, rel=1e-6)


def test_a_channel_without_any_deviation_has_no_snippet(tmp_path: Path) -> None:
    image = random_image("uint16", 2)
    image[:, :, 1] = 7
    values = measured(tmp_path, [image], ChannelSettings(count=2))
    with pytest.raises(DataError, match="c2 has the same value"):
        values.snippet("")


def test_images_that_cannot_be_decoded_are_counted(tmp_path: Path) -> None:
    bad = random_image("float32", 1)
    bad[0, 0] = np.nan
    values = measured(tmp_path, [random_image("float32", 1), bad], ChannelSettings(count=1, dtype="float32"))
    assert (values.images, values.failed) == (1, 1) and "1 could not be decoded" in values.text()
    assert values.document()["failed"] == 1


def test_an_index_of_other_channels_is_refused(tmp_path: Path) -> None:
    url = write_tar(tmp_path / "s.tar", [("a", {"npy": npy_file(random_image("uint16", 3))})])
    manifest = build([url], tmp_path / "index", fields=Fields(images=("npy",), channels=Channels(3, "uint16")))
    with pytest.raises(ConfigError):
        measure(manifest, ChannelSettings(count=2))
