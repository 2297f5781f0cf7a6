"""Sizes of views: a side, or height and width; what divides, what is refused, and that squares are what they were."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.config import sizes
from pipeline.config.load import fingerprint, load
from pipeline.config.schema import Config
from pipeline.errors import ConfigError
from pipeline.methods.dinov2.method import DINOv2
from pipeline.methods.dinov2.settings import Dinov2Settings
from pipeline.models.settings import ModelSettings
from pipeline.models.vision import build_tower
from tests.config.test_load import refused, write

SMALL = "model: {embed_dim: 32, depth: 1, num_heads: 2, patch_size: 8}\ndata: {shards: a.tar}\n"


def settings(tmp_path: Path, method: str, *overrides: str) -> Config:
    return load(write(tmp_path, f"{SMALL}method: {method}\n"), overrides).config


def test_equal_sides_are_the_side(tmp_path: Path) -> None:
    one = settings(tmp_path, "{views: {global_size: 32, local_size: 16}}")
    two = settings(tmp_path, "{views: {global_size: [32, 32], local_size: [16, 16]}}")
    assert two.method.views.global_size == 32 and fingerprint(one) == fingerprint(two)


def test_rectangles_are_read_shown_and_part_of_the_fingerprint(tmp_path: Path) -> None:
    wide = settings(tmp_path, "{views: {global_size: [16, 48], local_size: [8, 24]}}")
    assert wide.method.views.global_size == (16, 48)
    assert Config.model_validate(wide.model_dump(mode="json")) == wide
    tall = settings(tmp_path, "{views: {global_size: [48, 16], local_size: [8, 24]}}")
    assert fingerprint(wide) != fingerprint(tall)


@pytest.mark.parametrize("value", ["[16]", "[16, 16, 16]", "7", "[16, 5000]", "16.0", "true", "[16, '32']", "null", "big"])
def test_what_is_no_size_is_refused_in_one_sentence(tmp_path: Path, value: str) -> None:
    problems = refused(write(tmp_path, SMALL + f"method: {{views: {{global_size: {value}}}}}\n")).problems
    assert len(problems) == 1 and problems[0].path == "method.views.global_size"
    assert "must be a side, or [height, width], each a whole number of pixels from 8 to 4096" in problems[0].message


@pytest.mark.parametrize(
    ("method", "key", "text"),
    [
        ("{views: {global_size: [16, 44], local_count: 0}}", "method.views.global_size", "[16, 40] or [16, 48] would"),
        ("{views: {global_size: [16, 48], local_size: [8, 20]}}", "method.views.local_size", "[8, 16] or [8, 24] would"),
        ("{views: {global_size: 36, local_count: 0}}", "method.views.global_size", "= 36: is not divisible"),
        (
            "{views: {global_size: [16, 48], local_count: 0}, gram_weight: 1.0, gram_size: 32, gram_weights: x.pth}",
            "method.views.global_size",
            "the Gram anchor's features of another size (32) need square views",
        ),
        (
            "{views: {global_size: 32, local_count: 0}, gram_weight: 1.0, gram_size: 64, "
            "resolutions: [{}, {global_size: [16, 48]}]}",
            "method.resolutions",
            "method.resolutions.1.global_size = [16, 48]: the Gram anchor's features of another size (64) need square views",
        ),
        (
            "{views: {global_size: [16, 48], local_count: 0}, gram_weight: 1.0, "
            "resolutions: [{global_size: 32}, {gram_size: 64}]}",
            "method.views.global_size",
            "method.views.global_size = [16, 48]: the Gram anchor's features of another size (64)",
        ),
        (
            "{views: {global_size: 32, local_count: 0}, resolutions: [{gram_size: 64}]}",
            "method.resolutions",
            "method.resolutions.0.gram_size = 64: has no effect while method.gram_weight = 0",
        ),
        ("{name: detailclip, views: {global_size: [16, 48]}}", "method.views.global_size", "detailclip masks and reconstructs"),
        ("{views: {global_size: [8, 8], local_count: 0}}", "method.mask_probability", "a single patch leaves nothing to mask"),
    ],
)
def test_sizes_that_do_not_go_with_the_rest_are_refused_with_a_hint(tmp_path: Path, method: str, key: str, text: str) -> None:
    problems = {problem.path: problem.message for problem in refused(write(tmp_path, f"{SMALL}method: {method}\n")).problems}
    assert text in problems[key]


@pytest.mark.parametrize(
    ("method", "text"),
    [
        ("{views: {global_size: [32, 64]}, gram_weight: 1.0, gram_size: 64}", "the Gram anchor's features of another size (64)"),
        ("{resolutions: [{global_size: [32, 64], gram_size: 64}], gram_weight: 1.0}", "method.resolutions.0.global_size"),
        ("{gram_size: 64}", "has no effect while method.gram_weight = 0"),
        ("{name: detailclip, views: {global_size: [32, 64]}}", "detailclip masks and reconstructs square grids"),
    ],
)
def test_what_needs_no_patch_side_is_checked_without_one(tmp_path: Path, method: str, text: str) -> None:
    """timm's name does not say the patch side."""
    path = write(tmp_path, f"model: {{timm_name: test_vit}}\ndata: {{shards: a.tar}}\nmethod: {method}\n")
    assert load(write(tmp_path, path.read_text().split("method")[0])).config.model.patch_side is None
    path.write_text(f"model: {{timm_name: test_vit}}\ndata: {{shards: a.tar}}\nmethod: {method}\n")
    assert text in str(refused(path))


def test_rectangles_go_with_an_anchor_that_sees_the_students_crops(tmp_path: Path) -> None:
    mixed = "resolutions: [{global_size: [16, 48]}, {global_size: 32, gram_size: 64}]"
    method = settings(tmp_path, f"{{views: {{global_size: 32, local_count: 0}}, gram_weight: 1.0, {mixed}}}").method
    assert isinstance(method, Dinov2Settings) and method.gram_weight == 1.0
    with torch.device("meta"):
        tower = build_tower(ModelSettings(embed_dim=32, depth=1, num_heads=2, patch_size=8), image_size=32)
        assert [[v.name for v in one.views] for one in DINOv2(tower, method).view_sets] == [["global"], ["global", "gram"]]
        with pytest.raises(ConfigError, match=r"16 x 48 pixels .* must be square"):
            DINOv2(tower, method.model_copy(update={"gram_size": 64}))


def test_sizes_of_local_crops_that_do_not_exist_are_not_checked(tmp_path: Path) -> None:
    settings(tmp_path, "{views: {global_size: 32, local_count: 0}, resolutions: [{local_size: 20}]}")


def test_one_row_of_patches_can_be_masked(tmp_path: Path) -> None:
    assert settings(tmp_path, "{views: {global_size: [8, 64], local_count: 0}}").method.views.global_size == (8, 64)


def test_class_maps_need_a_square(tmp_path: Path) -> None:
    path = write(tmp_path, SMALL + "method: {views: {global_size: [16, 48], local_size: 16}}\n")
    dense = ("evaluation.segmentation={enabled: true, train_shards: a.tar, val_shards: b.tar, num_classes: 3}",)
    assert "class maps are evaluated on squares" in str(refused(path, *dense))


def test_sizes_on_the_command_line() -> None:
    assert [sizes.parse_size(text) for text in ("224", "224x448", "32x32", None)] == [224, (224, 448), 32, None]
    for text in ("", "x", "224x", "0x32", "-1", "1e3", "224 448", "99999x8"):
        with pytest.raises(ConfigError, match="is not a size"):
            sizes.parse_size(text)


@pytest.mark.parametrize(
    ("size", "patch", "patches", "grid"),
    [
        (32, 8, 16, (4, 4)),
        ((16, 48), 8, 12, (2, 6)),
        ((64, 8), 8, 8, (8, 1)),
        ((16, 64), 8, None, (2, 8)),
        ((33, 256), 32, 16, (2, 8)),  # a convolutional network pads; 33:256 is nearer to 1 x 16
        ((33, 256), 32, 8, (1, 8)),
        (20, 16, 1, (1, 1)),
    ],
)
def test_the_grid_of_an_image(size: sizes.Size, patch: int, patches: int | None, grid: tuple[int, int]) -> None:
    assert sizes.grid_of(size, patch, patches) == grid


def test_a_number_of_patches_that_no_grid_has_is_refused() -> None:
    with pytest.raises(ValueError, match="33 x 256 pixels have no grid of 12 patches of 32 pixels"):
        sizes.grid_of((33, 256), 32, 12)
