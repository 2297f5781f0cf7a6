"""Rows and columns of patches, by the real networks: ours, timm's, transformers' and open_clip's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor

from pipeline.config.sizes import Size, grid_of
from pipeline.models.resnet import build_trunk
from pipeline.models.settings import ModelSettings

SMALL: dict[str, Any] = {"embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": 8}
WHOLE: list[Size] = [32, (16, 64), (64, 8), (8, 128)]
ANY: list[Size] = [64, (33, 256), (256, 33), (40, 200), (31, 97), (1, 500)]
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "patch": SMALL,
    "conv": {**SMALL, "stem": "conv"},
    "registers": {**SMALL, "registers": 2},
    "rope": {**SMALL, "pos_embed": "rope"},
    "pooled": {**SMALL, "pooling": "attention"},
    "timm": {"timm_name": "vit_tiny_patch16_224"},
    "timm rope": {"timm_name": "vit_small_patch16_dinov3_qkvb"},
}


@pytest.mark.parametrize("name", TRANSFORMERS)
@torch.inference_mode()
def test_a_transformer_has_whole_patches_and_refuses_or_pads_others(name: str) -> None:
    tower = build_trunk(ModelSettings(**TRANSFORMERS[name]), image_size=32)
    for height, width in [(side, side) if isinstance(side, int) else side for side in WHOLE]:
        size = (height * tower.patch // 8, width * tower.patch // 8)
        patches = tower(torch.zeros(1, 3, *size)).patches.shape[1]
        rows, columns = grid_of(size, tower.patch)
        assert (rows, columns) == grid_of(size, tower.patch, patches) == (height // 8, width // 8)
    size = (3 * tower.patch + 1, 2 * tower.patch)
    if name == "conv":  # pads
        assert grid_of(size, tower.patch, tower(torch.zeros(1, 3, *size)).patches.shape[1]) == (4, 2)
    else:
        with pytest.raises(AssertionError, match="divisible"):
            tower(torch.zeros(1, 3, *size))


@pytest.mark.parametrize("stem", ["patch", "small", "small_pooled"])
@pytest.mark.parametrize("size", ANY)
@torch.inference_mode()
def test_a_resnet_pads(stem: Any, size: Size) -> None:
    tower = build_trunk(ModelSettings(timm_name="resnet18", resnet_width=8, stem=stem), image_size=64).eval()
    shape = (size, size) if isinstance(size, int) else size
    cells = tower.net.forward_features(torch.zeros(1, 3, *shape))  # type: ignore[operator, union-attr]
    assert grid_of(size, tower.patch, tower(torch.zeros(1, 3, *shape)).patches.shape[1]) == tuple(cells.shape[-2:])


@pytest.mark.parametrize("name", ["resnet18", "resnet18d", "resnet50", "convnext_atto"])
@torch.inference_mode()
def test_timms_convolutional_networks_agree(name: str) -> None:
    net = timm.create_model(name, num_classes=0).eval()
    for height, width in ((64, 64), (64, 256), (33, 256), (40, 200)):
        if name.startswith("convnext") and (height % 32 or width % 32):  # its stem leaves the rest out, as a transformer's
            height, width = height // 32 * 32 + 1, width // 32 * 32 + 1
        rows, columns = net.forward_features(torch.zeros(1, 3, height, width)).shape[-2:]
        assert grid_of((height, width), 32, rows * columns) == (rows, columns)


def _hf(kind: str) -> tuple[Callable[[Tensor], int], int]:
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    model = getattr(transformers, f"{kind}Model")(config).eval()
    prefix = 1 + int(getattr(config, "num_register_tokens", 0))
    return lambda images: int(model(images).last_hidden_state.shape[1]) - prefix, 8


@pytest.mark.parametrize("kind", ["Dinov2", "Dinov2WithRegisters", "DINOv3ViT"])
@torch.inference_mode()
def test_transformers_of_another_library_leave_the_rest_out(kind: str) -> None:
    count, patch = _hf(kind)
    for size in ((32, 32), (16, 64), (20, 70)):
        patches = count(torch.zeros(1, 3, *size))
        assert grid_of(size, patch, patches) == grid_of(size, patch) == (size[0] // 8, size[1] // 8)
