"""Image sheets: the attention is the block's own, and what is shown as nearest is what is nearest, on one rank or two."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn

from pipeline.data.augment.views import Normalize
from pipeline.data.index.build import build
from pipeline.data.index.manifest import Manifest
from pipeline.data.pack.shard_writer import ShardWriter
from pipeline.evaluation.attention import looked_at, readable, shaded, with_attention
from pipeline.evaluation.images import ImageSet
from pipeline.evaluation.principal import sheet
from pipeline.evaluation.sheets import _RIGHT, _UNKNOWN, _WRONG, NearestImages, attention_sheet, thumbs
from pipeline.models.eval_model import EvalModel
from pipeline.models.resnet import build_trunk
from pipeline.models.settings import ModelSettings
from pipeline.models.vision import build_tower
from tests.helpers.rank_pool import pool

CPU = torch.device("cpu")
MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
TILE, SHOWN = 32, 3
# Gray images: their brightness is their feature, so that the nearest can be counted.
GRAYS = [10, 60, 20, 200, 190, 90, 30, 120, 250, 100, 55]


def tower(**changes: Any) -> Any:
    torch.manual_seed(0)
    settings = ModelSettings(**{"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 4, "layer_scale": None, **changes})
    built = build_tower(settings, image_size=8).eval()
    for parameter in built.parameters():  # as they begin, all patches get the same
        nn.init.normal_(parameter, std=0.4)
    return built


# ---- attention --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"registers": 2}, {"pos_embed": "rope"}, {"pos_embed": "rope", "registers": 2}])
def test_the_attention_that_is_read_is_the_one_that_the_block_computes(changes: dict[str, Any]) -> None:
    built = tower(**changes)
    images, kept = torch.randn(2, 3, 16, 12), []
    tokens, result = with_attention(EvalModel(built, MEAN, STD), images)
    assert result is not None and result.shape == (2, 2, 12)
    built._fused = False  # then the block has its shares in its hands
    built.vit.blocks[-1].attn.attn_drop.register_forward_hook(lambda _, __, out: kept.append(out))
    with torch.inference_mode():
        again = built(images)
    torch.testing.assert_close(result, kept[0][:, :, 0, built.vit.num_prefix_tokens :])
    torch.testing.assert_close(tokens.patches, again.patches)
    assert float(result.std(2).min()) > 1e-3
    torch.testing.assert_close(looked_at(EvalModel(built, MEAN, STD), images), result.mean(1))


def test_reading_leaves_no_hook_behind() -> None:
    built = tower()
    with_attention(EvalModel(built, MEAN, STD), torch.randn(1, 3, 8, 8))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in built.modules())


def test_a_network_without_attention_shows_likeness_instead() -> None:
    trunk = build_trunk(ModelSettings(timm_name="resnet18"), image_size=32).eval()
    model: Any = EvalModel(trunk, MEAN, STD)  # type: ignore[arg-type]
    assert not readable(model)
    tokens, attention = with_attention(model, torch.randn(1, 3, 64, 64))
    assert attention is None and tokens.patches.shape[1] == 4
    assert looked_at(model, torch.randn(1, 3, 64, 64)).shape == (1, 4)


def test_blocks_that_were_compiled_can_be_read() -> None:
    built, images = tower(), torch.randn(2, 3, 8, 8)
    model = EvalModel(built, MEAN, STD)
    expected, layers = with_attention(model, images)[1], model.layers(images, 2)
    for block in built.vit.blocks:
        block.compile(backend="eager")
    with torch.inference_mode():
        built(images)
    result = with_attention(model, images)[1]
    assert result is not None and expected is not None
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(model.layers(images, 2), layers)


def test_a_sheet_has_the_picture_the_mean_and_each_head() -> None:
    attention = torch.zeros(3, 2, 4)
    attention[:, 0, 1], attention[:, 1, 2] = 1.0, 1.0
    drawn = attention_sheet(torch.ones(3, 3, 8, 8), attention, patch=4, mean=MEAN, std=STD, tile=8)
    assert drawn.shape == (8 * 4, 8 * 3, 3) and (drawn[:8] == 255).all()
    bright = shaded(np.array([[0.0, 1.0]]))[0, 1]
    first, second = drawn[16:24, :8], drawn[24:, 16:]
    assert (first[:4, 4:] == bright).all() and not (first[4:] == bright).all(2).any()
    assert (second[4:, :4] == bright).all() and not (second[:4] == bright).all(2).any()


@pytest.mark.parametrize(("shape", "grid"), [((8, 32), (2, 8)), ((32, 8), (8, 2))])
def test_rectangles_keep_their_aspect_ratio_in_a_sheet(shape: tuple[int, int], grid: tuple[int, int]) -> None:
    """Also where as many patches would make a square grid of 4 x 4."""
    attention = torch.zeros(2, 1, 16)
    attention[:, 0, grid[1] - 1] = 1.0  # the last patch of the first row
    images = torch.full((2, 3, *shape), -1.0)
    inside = np.zeros((32, 32), dtype=bool)
    top, left = (32 - shape[0]) // 2, (32 - shape[1]) // 2
    inside[top : top + shape[0], left : left + shape[1]] = True
    drawn = attention_sheet(images, attention, patch=4, mean=MEAN, std=STD, tile=32)
    assert drawn.shape == (96, 64, 3)
    assert np.array_equal((drawn[:32, :32] == 0).all(2), inside) and (drawn[:32, :32][~inside] == 255).all()
    bright = (drawn[32:64, :32] == shaded(np.array([[0.0, 1.0]]))[0, 1]).all(2)
    rows, columns = np.nonzero(bright)
    assert (rows.min(), rows.max()) == (top, top + 3)
    assert (columns.min(), columns.max()) == (left + shape[1] - 4, left + shape[1] - 1)
    small = thumbs(torch.rand(2, 5, *shape), mean=(0.0,) * 5, std=(1.0,) * 5, side=16, shown=(0, 2, 4))
    assert small.shape == (2, 16, 16, 3) and (small[:, inside[::2, ::2] == 0] == 255).all()
    assert not (small[:, inside[::2, ::2]] == 255).all(2).all()
    components = sheet(images, torch.randn(2, 16, 6), patch=4, mean=MEAN, std=STD, tile=32)
    assert components.shape == (64, 64, 3) and np.array_equal((components[:32, :32] == 0).all(2), inside)
    assert (components[32:, 32:][~inside] == 255).all()


# ---- nearest images -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("gray")
    with ShardWriter(folder, "gray") as writer:
        for number, gray in enumerate(GRAYS):
            buffer = io.BytesIO()
            Image.fromarray(np.full((16, 16, 3), gray, dtype=np.uint8)).save(buffer, "PNG")
            sample: dict[str, Any] = {"__key__": f"{number:03d}", "png": buffer.getvalue()}
            if number != 1:
                sample |= {"txt": f"a wall of gray {gray - gray % 20}", "cls": str(gray // 100)}
            writer.write(sample)
    return build(writer.shards, folder / "index")


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _angle(gray: Tensor) -> Tensor:
    return torch.stack([torch.cos(gray / 100), torch.sin(gray / 100)], dim=1)


def finder(texts: bool) -> Any:
    """A model that recognises an image by its gray, and a sentence by the number at its end."""

    def look(images: Tensor) -> Tensor:
        return _angle((images.mean((1, 2, 3)) * 0.5 + 0.5) * 255)

    def read(sentences: list[str]) -> Tensor:
        return _angle(torch.tensor([float(sentence.split()[-1]) + 10 for sentence in sentences]))

    seen: Any = SimpleNamespace()
    return EvalModel(seen, MEAN, STD, images=look, texts=read if texts else None)


def find(manifest: Manifest, texts: bool) -> tuple[str, np.ndarray] | None:
    rank, world = dist.get_rank(), dist.get_world_size()
    common = {"size": 16, "batch_size": 4, "device": CPU, "normalize": Normalize(MEAN, STD)}
    images = ImageSet(manifest, limit=None, rank=rank, world_size=world, **common)  # type: ignore[arg-type]
    nearest = NearestImages(images, rows=4, columns=SHOWN, tile=TILE)
    result = nearest(finder(texts))
    again = nearest(finder(texts))  # by what was kept of the first time
    assert result is not None and again is not None and np.array_equal(result[1], again[1])
    return result


def cell(drawn: np.ndarray, row: int, place: int) -> tuple[int, tuple[int, ...]]:
    """Gray and frame of the picture that stands there."""
    left = TILE + 6 + place * TILE
    tile = drawn[row * TILE : (row + 1) * TILE, left : left + TILE]
    return int(tile[TILE // 2, TILE // 2, 0]), tuple(int(value) for value in tile[0, 0])


def test_pictures_find_the_nearest_others_framed_by_their_class(manifest: Manifest, alone: None) -> None:
    result = find(manifest, texts=False)
    assert result is not None and result[0] == "neighbours" and result[1].shape == (4 * TILE, TILE + 6 + SHOWN * TILE, 3)
    for row, query in enumerate(GRAYS[:4]):
        assert int(result[1][row * TILE + 9, 9, 0]) == pytest.approx(query, abs=1)
        nearest = sorted((gray for gray in GRAYS if gray != query), key=lambda gray: abs(gray - query))[:SHOWN]
        for place, gray in enumerate(nearest):
            shown, frame = cell(result[1], row, place)
            assert shown == pytest.approx(gray, abs=1)
            unknown = GRAYS[1] in (query, gray)
            assert frame == (_UNKNOWN if unknown else _RIGHT if gray // 100 == query // 100 else _WRONG)


def test_captions_find_the_nearest_pictures_framed_by_their_captions(manifest: Manifest, alone: None) -> None:
    result = find(manifest, texts=True)
    assert result is not None and result[0] == "retrieval"
    # The captions of the first four that have one are read as grays of 10, 30, 210 and 190; 20 and 30 share a caption.
    expected = [
        [(10, _RIGHT), (20, _WRONG)],
        [(30, _RIGHT), (20, _RIGHT)],
        [(200, _RIGHT), (190, _WRONG)],
        [(190, _RIGHT), (200, _WRONG)],
    ]
    for row, places in enumerate(expected):
        for place, (gray, frame) in enumerate(places):
            assert cell(result[1], row, place) == (pytest.approx(gray, abs=1), frame)
    assert len(np.unique(result[1][:TILE, :TILE])) > 2  # words, on white
    assert result[1][0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("texts", [False, True])
def test_two_ranks_draw_what_one_draws(texts: bool, manifest: Manifest, alone: None) -> None:
    expected = find(manifest, texts)
    ranks = pool(2).run(find, manifest=manifest, texts=texts)
    assert expected is not None
    for result in ranks:
        assert result[0] == expected[0] and np.array_equal(result[1], expected[1])


def test_a_single_picture_has_no_neighbour(manifest: Manifest, alone: None) -> None:
    images = ImageSet(manifest, size=16, limit=1, batch_size=4, rank=0, world_size=1, device=CPU)
    assert NearestImages(images)(finder(texts=False)) is None


def test_small_pictures_are_what_was_normalised() -> None:
    values = torch.tensor([0.0, 0.5, 1.0]).view(1, 3, 1, 1).expand(2, 3, 8, 8)
    assert thumbs((values - 0.5) / 0.5, mean=MEAN, std=STD, side=4)[0, 0, 0].tolist() == [0, 128, 255]
