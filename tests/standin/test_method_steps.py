"""Every method trains a step at real size on stand-in devices, and the host waits nowhere but where the table says."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.standin import process
from tests.helpers.standin.recorder import Record
from tests.standin.allowed_waits import ALLOWED

pytestmark = pytest.mark.slow

RANK = 3
VIT_B = ("model.embed_dim=768", "model.num_heads=12")
# 16 samples a rank: what is launched does not depend on it, and masks and plans take less time.
BATCH = "train.global_batch_size=128"
METHODS: dict[str, tuple[str, ...]] = {
    "dinov2": ("dinov2/vitl16_short", "train.micro_batch_size=16"),
    "clip": ("clip/vit_b16_cc12m",),
    "siglip": ("clip/siglip_b16",),
    "detailclip": ("detailclip/vit_b16_25ep",),
    "dino": ("dino/vit_s16", *VIT_B),
    "coca": ("coca/vit_b32", "model.patch_size=16"),
    "simvlm": ("simvlm/scenes", *VIT_B, "model.depth=12", "model.patch_size=16", "method.views.global_size=224"),
    "mocov3": ("mocov3/vit_s16", *VIT_B),
    "simclr": ("simclr/resnet50",),
    "mocov2": ("mocov2/resnet50",),
    "byol": ("byol/resnet50",),
    # A smaller teacher than its ViT-g, and not ZeRO 3, which compares the ranks' numbers before each forward pass.
    "distill": (
        *("dinov2/distill_vits14", "train.micro_batch_size=16", "train.zero_stage=1"),
        "method.teacher_model={embed_dim: 1024, depth: 24, num_heads: 16, patch_size: 14}",
    ),
}


def measured(out: Path, *arguments: str) -> tuple[dict[str, Any], Record]:
    """The size of the model and the record of the last step, as rank 3 of eight."""
    done = process.run("method_step", str(out), *arguments, BATCH, f"--rank={RANK}")
    assert done.returncode == 0, done.stderr[-4000:]
    document = json.loads(out.read_text())
    return document, Record.from_json(document["records"][-1])


def waits(record: Record) -> dict[str, int]:
    """Host waits and blocking copies of a step by place."""
    counts: Counter[str] = Counter()
    for block in record.blocks:
        counts[f"{block.what}: {block.where}"] += block.calls
    return dict(counts)


@pytest.mark.parametrize("name", METHODS)
def test_a_step_waits_only_where_the_table_says(name: str, tmp_path: Path) -> None:
    document, record = measured(tmp_path / "step.json", *METHODS[name])
    assert document["parameters"] > 20_000_000, "not a real size"
    assert {call.kind for call in record.calls} >= {"kernel", "gemm", "copy"}
    assert not [call.name for call in record.calls if call.kind == "unmodelled"]
    assert {call.device for call in record.calls} == {RANK}
    assert not [block.line for block in record.blocks if block.thread == "fovea-data"]
    lines = sorted(block.line for block in record.blocks)
    assert waits(record) == ALLOWED[name], "\n".join(lines)


def test_every_method_has_its_table() -> None:
    from pipeline.config.schema import METHODS as known

    assert ALLOWED.keys() == METHODS.keys() >= known.keys()
