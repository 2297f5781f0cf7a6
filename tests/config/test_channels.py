"""The section ``data.channels``: what it refuses, and what follows from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from launch.resume import check_identity
from pipeline.config.load import difference, fingerprint, load
from pipeline.config.schema import Config
from pipeline.data.channel_settings import ChannelSettings
from pipeline.data.settings import DataSettings
from pipeline.errors import CheckpointError
from tests.config.test_load import refused, write


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 0}, "greater than or equal to 1"),
        ({"count": 17}, "less than or equal to 16"),
        ({"count": 3, "names": ["a", "b"]}, "names 2 channels, and there are 3"),
        ({"count": 2, "names": ["a", "a"]}, "names 1 channels, and there are 2"),
        ({"count": 2, "dtype": "int16"}, "'uint8', 'uint16' or 'float32'"),
        ({"count": 2, "mean": [0.1], "std": [0.1, 0.2]}, "mean has 1 values for 2 channels"),
        ({"count": 2, "mean": [0.1, 0.2]}, "mean or std alone"),
        ({"count": 2, "mean": [0.1, 0.2], "std": [0.1, 0]}, "greater than 0"),
        ({"count": 4, "rgb": ["c1", "c2", "c9"]}, "has no channel 'c9'"),
        ({"count": 4, "rgb": ["c1", "c2", "c2"]}, "names a channel twice"),
        ({"count": 4, "groups": [["c1", "c2"], ["c2"]]}, "names a channel twice"),
        ({"count": 4, "groups": [["nir"]]}, "has no channel 'nir'"),
        ({"count": 4, "composite": ["c1", "c2", "x"]}, "has no channel 'x'"),
        ({"count": 2, "members": ["a.tif", "a.tif"]}, "different extensions"),
        ({"count": 1, "members": ["a.tif", "b.tif"]}, "at most as many"),
        ({"count": 2, "members": [".B02.TIF"]}, "lower case"),
    ],
)
def test_what_cannot_be_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ChannelSettings.model_validate(values)


def test_what_follows_from_the_settings() -> None:
    settings = ChannelSettings(count=5, rgb=("c3", "c2", "c1"), groups=(("c2", "c4"), ("c1",)))
    assert settings.labels == ("c1", "c2", "c3", "c4", "c5")
    assert settings.rgb_indices == (2, 1, 0)
    assert settings.group_numbers == (1, 0, 2, 0, 2)


def test_extensions_of_images_follow_the_channels() -> None:
    plain = DataSettings(shards=("a.tar",))
    assert plain.images == plain.image_extensions
    more = plain.model_copy(update={"channels": ChannelSettings(count=2)})
    assert more.images == (*plain.image_extensions, "npy", "dcm", "dicom")
    stack = plain.model_copy(update={"channels": ChannelSettings(count=2, members=("b1.tif", "b2.tif"))})
    assert stack.images == ("b1.tif", "b2.tif")


def settings(tmp_path: Path, channels: str) -> Config:
    text = "model: {embed_dim: 32, depth: 1, num_heads: 2, patch_size: 8}\n"
    text += "method: {views: {global_size: 32, local_count: 0}}\ndata: {shards: a.tar, channels: CHANNELS}\n"
    return load(write(tmp_path, text.replace("CHANNELS", channels))).config


def test_what_people_are_shown_is_no_part_of_a_run(tmp_path: Path) -> None:
    measured = "count: 4, mean: [0, 0, 0, 0], std: [1, 1, 1, 1]"
    begun = settings(tmp_path, f"{{{measured}}}")
    for shown in ("pca", "[c4, c2, c1]"):
        again = settings(tmp_path, f"{{{measured}, composite: {shown}}}")
        assert again.data.channels != begun.data.channels
        assert fingerprint(again) == fingerprint(begun) and not difference(begun, again)
        assert list(difference(begun, again, runtime=True)) == ["data.channels.composite"]
        check_identity(again, begun.model_dump(mode="json"), tmp_path)
    other = settings(tmp_path, f"{{{measured}, rgb: [c4, c2, c1]}}")
    with pytest.raises(CheckpointError, match=r"data\.channels\.rgb was None and is \['c4', 'c2', 'c1'\]"):
        check_identity(other, begun.model_dump(mode="json"), tmp_path)


def test_an_unknown_key_of_an_optional_section_is_answered_with_its_keys(tmp_path: Path) -> None:
    text = "model: {timm_name: vit_tiny_patch16_224}\ndata: {shards: a.tar, channels: {count: 2, composit: pca}}\n"
    message = str(refused(write(tmp_path, text)))
    assert "did you mean 'data.channels.composite'?" in message and "allowed under data.channels: composite, count" in message
