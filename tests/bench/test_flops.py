"""Operations by formula are those that torch counts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.bench.flops import cost
from pipeline.config.load import load
from pipeline.estimate.flops import flop_counter

TOWER = "model: {embed_dim: 192, depth: 4, num_heads: 3, patch_size: 16, drop_path: %s}\ndata: {shards: x.tar}\n"
DINO = "method: {name: dinov2, views: {local_size: 96}, prototypes: 4096, head_hidden: 512, head_bottleneck: 64}\n" + TOWER
CLIP = "method: {name: clip, views: {global_size: 224}, patch_dropout: %s, text: {architecture: ViT-S-32}}\n" + TOWER
GATED = DINO.replace("patch_size: 16", "patch_size: 16, ffn: swiglu, registers: 4")


@pytest.mark.parametrize(
    "text",
    [
        DINO % 0.0,
        DINO % 0.25,
        (DINO % 0.0).replace("prototypes", "centering: softmax_center, prototypes"),
        GATED % 0.0,
        CLIP % (0.0, 0.0),
    ],
    ids=["dinov2", "stochastic depth", "centring", "gated", "clip"],
)
def test_the_formula_is_what_torch_counts_within_three_percent(text: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    found = cost("c", load(path).config)
    assert found.apart is not None and abs(found.apart) < 0.03, found


@pytest.mark.parametrize("causal", [False, True])
def test_attention_counts_alike_by_every_kernel(causal: bool) -> None:
    counts = []
    for kernel in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):
        q, k, v = (torch.rand(2, 3, tokens, 8, requires_grad=True) for tokens in (16, 16, 16))
        with sdpa_kernel(kernel), flop_counter() as counter:
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
            forward = counter.get_total_flops()
            out.sum().backward()
        counts.append((forward, counter.get_total_flops()))
    product = 2 * 2 * 3 * 16 * 16 * 8
    assert counts == [(2 * product, 6 * product)] * 2


@pytest.mark.slow
def test_dropped_branches_and_patches_cost_nothing(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"

    def counted(text: str) -> float:
        path.write_text(text)
        return cost("c", load(path).config).counted

    assert counted(DINO % 0.5) < 0.72 * counted(DINO % 0.0)
    assert counted(CLIP % (0.75, 0.0)) < 0.9 * counted(CLIP % (0.0, 0.0))
