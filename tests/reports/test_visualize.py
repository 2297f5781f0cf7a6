"""A person's pictures in one page, and what is refused."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from launch.cli.main import main
from pipeline.evaluation.attention import looked_at, shaded
from pipeline.evaluation.principal import sheet
from pipeline.models.eval_model import EvalModel
from pipeline.models.settings import ModelSettings
from pipeline.models.vision import build_tower
from pipeline.reports.visualize import centre
from tests.helpers.exported import CLIP, DINO, checkpoint, settings

HALF = (0.5, 0.5, 0.5)


def call(*words: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(["visualize", *words])
    return int(left.value.code or 0)


@pytest.fixture
def pictures(tmp_path: Path) -> list[str]:
    for name, size in (("wide.png", (90, 60)), ("high.jpg", (40, 70))):
        Image.fromarray(np.random.default_rng(1).integers(0, 255, (*size, 3), dtype=np.uint8)).save(tmp_path / name)
    return [str(tmp_path / "wide.png"), str(tmp_path / "high.jpg")]


def test_the_page_shows_each_picture_its_patches_its_attention_and_the_texts(pictures: list[str], tmp_path: Path) -> None:
    checkpoint(tmp_path / "run", settings(CLIP))
    out = tmp_path / "page.html"
    assert call(str(tmp_path / "run"), *pictures, "--text", "a <dog>", "--out", str(out)) == 0
    page = out.read_text()
    found = re.findall(r"data:image/png;base64,([^\"]+)", page)
    assert len(found) == 2 * 4
    sizes = [Image.open(io.BytesIO(base64.b64decode(one))).size for one in found]
    assert sizes[:2] == [(64, 64)] * 2
    assert sizes[2:] == [(8, 8)] * 6
    assert "a &lt;dog&gt;" in page and "http:" not in page and "https:" not in page


@pytest.mark.parametrize(
    ("words", "told"),
    [(["--text", "a dog"], "cannot compare patches with texts"), (["--size", "30"], "must be a multiple of the patch size of 8")],
)
def test_what_cannot_be_drawn_is_refused(
    words: list[str], told: str, pictures: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint(tmp_path / "run", settings(DINO))
    assert call(str(tmp_path / "run"), *pictures, *words, "--out", str(tmp_path / "page.html")) == 2
    assert told in capsys.readouterr().err


def test_what_is_no_picture_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint(tmp_path / "run", settings(DINO))
    (tmp_path / "text.jpg").write_text("no picture")
    assert call(str(tmp_path / "run"), str(tmp_path / "text.jpg"), "--out", str(tmp_path / "page.html")) != 0
    assert "text.jpg" in capsys.readouterr().err


def test_attention_is_the_tower_s_own() -> None:
    torch.manual_seed(0)
    tower = build_tower(ModelSettings(embed_dim=16, depth=1, num_heads=2, patch_size=4, layer_scale=None), image_size=8).eval()
    images = torch.randn(2, 3, 8, 8)
    found = looked_at(EvalModel(tower, HALF, HALF), images)
    attention = tower.vit.blocks[0].attn
    with torch.inference_mode():
        x = tower.vit.blocks[0].norm1(tower.vit._pos_embed(tower.vit.patch_embed(images)))
        weight, bias = attention.qkv.weight, attention.qkv.bias
        q, k = (x @ weight[i * 16 : i * 16 + 16].T + bias[i * 16 : i * 16 + 16] for i in (0, 1))
        heads = [(q[:, 0:1, h] @ k[:, :, h].transpose(1, 2) / 8**0.5).softmax(2)[:, 0, 1:] for h in (slice(0, 8), slice(8, 16))]
    torch.testing.assert_close(found, sum(heads) / 2)


def test_pictures_and_maps_keep_their_places(tmp_path: Path) -> None:
    assert shaded(np.array([[0.0, 5.0], [2.5, 5.0]]))[0, 1].tolist() == [255, 250, 190]
    assert shaded(np.zeros((2, 2))).max() <= 40
    pixels = np.zeros((10, 30, 3), dtype=np.uint8)
    pixels[:, 10:20] = 200
    Image.fromarray(pixels).save(tmp_path / "bar.png")
    assert centre(tmp_path / "bar.png", 10).min() == 200
    drawn = sheet(torch.ones(3, 3, 8, 8), torch.randn(3, 4, 6), patch=4, mean=HALF, std=HALF, tile=16)
    assert drawn.shape == (32, 48, 3)
    assert (drawn[:16] == 255).all() and not (drawn[16:] == 255).all()
