"""What accelerate was told and what the settings say must not contradict each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch.accelerate_environment import check
from pipeline.config.load import load
from pipeline.config.schema import Config
from pipeline.errors import ConfigError


@pytest.fixture(scope="module")
def config() -> Config:
    return load(
        "dinov2/cifar10_vit_tiny", ["train.global_batch_size=64", "train.micro_batch_size=16", "train.zero_stage=2"]
    ).config


def told(tmp_path: Path, document: Any) -> dict[str, str]:
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps(document))
    return {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)}


def test_nothing_said_the_same_said_and_auto_are_accepted(config: Config, tmp_path: Path) -> None:
    check(config, 2, {})
    check(config, 2, {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "none"})
    check(
        config,
        2,
        {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    )
    same = {
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": 16,
        "gradient_accumulation_steps": 2,
        "bf16": {"enabled": True},
    }
    check(config, 2, told(tmp_path, {**same, "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}))
    check(config, 2, told(tmp_path, {"train_batch_size": "auto", "zero_optimization": {"stage": "auto"}}))


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage is 3 there and 2 here"),
        ({"bf16": {"enabled": False}}, "bf16.enabled is False there and True here"),
        ({"fp16": {"enabled": True}}, "fp16.enabled is True"),
        ({"train_batch_size": 128}, "train_batch_size is 128 there and 64 here"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps is 4 there and 2 here"),
        ({"gradient_clipping": 1.0}, "method.clip_norm"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "'cpu' there and train.offload=none here"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}}, "'nvme' there"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "offload_param is set there"),
        ([], "must be a JSON object"),
    ],
)
def test_a_contradiction_is_refused_by_name(config: Config, tmp_path: Path, document: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check(config, 2, told(tmp_path, document))


def test_precision_stage_and_a_missing_file_are_told(config: Config, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="mixed precision is 'fp16'"):
        check(config, 2, {"ACCELERATE_MIXED_PRECISION": "fp16"})
    with pytest.raises(ConfigError, match=r"stage is 1 there and train\.zero_stage=2 here"):
        check(config, 2, {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"})
    with pytest.raises(ConfigError, match="cannot be read"):
        check(config, 2, {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "none.json")})
