"""``fovea shards`` and other commands on images of declared channels, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.helpers.channel_images import npy_file, random_image, tiff_file, write_tar
from tests.launch.cli.test_shards import fovea

CONFIG = """
run: {name: toy}
method: {name: simclr, views: {global_size: 16}, head_hidden: 16, head_out: 8, augment: {noise: 0.5, channel_dropout: 0.3}}
model: {embed_dim: 16, depth: 1, num_heads: 2, patch_size: 8}
data: {num_workers: 0, canonical_streams: 4, channels: {count: 5, dtype: uint16, composite: COMPOSITE,
  mean: [0.5, 0.5, 0.5, 0.5, 0.5], std: [0.3, 0.3, 0.3, 0.3, 0.3]}}
train: {global_batch_size: 8, duration: 4 steps}
schedule: {lr: {warmup: 1 steps}}
evaluation: {knn: {enabled: false}}
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def shards(tmp_path: Path) -> str:
    samples = [(f"{n}", {"tif": tiff_file(random_image("uint16", 5, seed=n)), "cls": b"1"}) for n in range(8)]
    return write_tar(tmp_path / "shards" / "s-train-0.tar", [*samples, ("bad", {"npy": npy_file(random_image("uint16", 4))})])


def test_statistics_write_the_section_of_a_config(shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "channels.yaml"
    assert fovea("shards", "stats", shards, "--channels", "5xuint16", "--write", out) == 0
    text = capsys.readouterr().out
    assert "values of 8 images (uint16)" in text and "other_channels" in text and "\nc5 " in text
    section = yaml.safe_load(out.read_text())["data"]["channels"]
    assert section["count"] == 5 and all(0.4 < value < 0.6 for value in section["mean"])
    assert fovea("shards", "stats", shards, "--channels", out, "--json") == 0
    values = json.loads(capsys.readouterr().out)["values"]
    assert values["images"] == 8 and len(values["channels"]) == 5 and values["channels"][0]["percentiles"]["50"] > 0
    config = tmp_path / "my.yaml"
    config.write_text(yaml.safe_dump({"model": {"timm_name": "vit_small_patch14_dinov2"}, **yaml.safe_load(out.read_text())}))
    assert fovea("config", "check", config, f"data.shards={shards}") == 0


def test_other_commands_take_the_channels_too(shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fovea("shards", "index", shards, "--channels", "5xuint16") == 0
    assert "8 samples in 1 shards" in capsys.readouterr().out
    assert fovea("shards", "verify", shards, "--channels", "5xuint16") == 0
    assert "every one is as the index says" in capsys.readouterr().out
    assert fovea("shards", "preview", shards, "--channels", "5xuint16", "-o", tmp_path / "raw.png") == 0
    assert np.asarray(Image.open(tmp_path / "raw.png").convert("RGB")).std() > 20
    assert fovea("shards", "pack", shards, tmp_path / "again", "--channels", "5xuint16") == 0
    assert "packed 8 samples" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("5", "names no channels"),
        ("5xint16", "names no channels"),
        ("17xuint16", "less than or equal to 16"),
        ("nowhere.yaml", "names no channels"),
    ],
)
def test_channels_that_cannot_be_are_refused(shards: str, text: str, problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert fovea("shards", "stats", shards, "--channels", text) == 2
    assert problem in " ".join(capsys.readouterr().err.split())


def test_a_file_without_channels_or_the_option_alone_is_refused(
    shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "list.yaml").write_text("[1, 2]")
    assert fovea("shards", "stats", shards, "--channels", tmp_path / "list.yaml") == 2
    assert "has no data.channels" in " ".join(capsys.readouterr().err.split())
    assert fovea("shards", "stats", shards, "--write", tmp_path / "x.yaml") == 2
    assert "needs --channels" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("composite", ["pca", "[c5, c1, c3]", "null"])
def test_the_preview_shows_every_view_of_training(shards: str, tmp_path: Path, composite: str) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(CONFIG.replace("COMPOSITE", composite))
    words = [f"data.shards={shards}", "evaluation.knn.enabled=false"]
    assert fovea("shards", "preview", config, *words, "-o", tmp_path / "p.png", "--samples", "3") == 0
    assert np.asarray(Image.open(tmp_path / "p.png").convert("RGB")).std() > 20
    assert fovea("shards", "preview", config, *words, "-o", tmp_path / "p.html", "--samples", "3") == 0
    assert "noise" in (tmp_path / "p.html").read_text()


def test_the_spectral_set_has_all_channels_or_three(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind, count in (("all", 8), ("rgb", 3)):
        folder = tmp_path / kind
        assert fovea("shards", "synthesize", folder, "--spectral", kind, "--train", "12", "--val", "6", "--size", "32") == 0
        assert f"of {count}xuint16" in capsys.readouterr().out
        assert fovea("shards", "index", folder, "--channels", f"{count}xuint16") == 0
        assert "18 samples in 2 shards, 10 classes" in capsys.readouterr().out
    assert fovea("shards", "synthesize", tmp_path / "x", "--spectral", "all", "--shift", "palette") == 2
