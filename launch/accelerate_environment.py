"""Checks the settings of ``accelerate launch`` against the run's own settings.

Accelerate serves here as a launcher and a source of configuration: its variables place the ranks, and a DeepSpeed file it names
may tune DeepSpeed. It does not run the training loop: its backward includes the optimizer step, which prevents clipping each
network separately, and its checkpoints are not atomic. If it contradicts the settings, the run does not start.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.config.schema import Config
from pipeline.errors import ConfigError


def check(config: Config, world: int, environment: Mapping[str, str] | None = None) -> None:
    """Compare the settings with Accelerate's variables and with the DeepSpeed file they name.

    Args:
        config: the settings.
        world: world size.
        environment: environment variables; this process's by default.

    Raises:
        ConfigError: they contradict each other, or the file cannot be read; lists every contradiction.
    """
    env = os.environ if environment is None else environment
    wrong = []
    precision = env.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", config.train.precision):
        wrong.append(f"mixed precision is {precision!r} there and train.precision={config.train.precision} here")
    file = env.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "")
    if file and file != "none":
        wrong += _differences(_read(Path(file)), config, world)
    elif env.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        stage = env.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "")
        if stage and int(stage) != config.train.zero_stage:
            wrong.append(f"the ZeRO stage is {stage} there and train.zero_stage={config.train.zero_stage} here")
    if wrong:
        raise ConfigError(
            f"accelerate's configuration contradicts this run's: {'; '.join(wrong)}",
            where=file or "accelerate launch",
            hint="Set both to the same value, or remove it from accelerate's configuration",
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"accelerate's DeepSpeed file cannot be read ({error})", where=str(path), hint="Name a JSON file"
        ) from error
    if not isinstance(document, dict):
        raise ConfigError("must be a JSON object", where=str(path), hint="Write DeepSpeed's settings as a JSON object")
    return document


def _differences(file: dict[str, Any], config: Config, world: int) -> list[str]:
    train, zero = config.train, file.get("zero_optimization", {})
    share = train.global_batch_size // world
    micro = train.micro_batch_size or share
    ours: dict[str, tuple[Any, Any]] = {
        "zero_optimization.stage": (zero.get("stage", "auto"), train.zero_stage),
        "bf16.enabled": (file.get("bf16", {}).get("enabled", "auto"), train.precision == "bf16"),
        "fp16.enabled": (file.get("fp16", {}).get("enabled", "auto"), False),
        "train_batch_size": (file.get("train_batch_size", "auto"), train.global_batch_size),
        "train_micro_batch_size_per_gpu": (file.get("train_micro_batch_size_per_gpu", "auto"), micro),
        "gradient_accumulation_steps": (file.get("gradient_accumulation_steps", "auto"), share // micro),
    }
    wrong = [f"{key} is {theirs!r} there and {own!r} here" for key, (theirs, own) in ours.items() if theirs not in ("auto", own)]
    if zero.get("offload_param", {}).get("device", "none") not in ("none", "auto"):
        wrong.append("zero_optimization.offload_param is set there, and is not supported here")
    device = zero.get("offload_optimizer", {}).get("device", "auto")
    if device not in ("auto", train.offload):
        wrong.append(f"zero_optimization.offload_optimizer is {device!r} there and train.offload={train.offload} here")
    if file.get("gradient_clipping", "auto") not in ("auto", 0, 0.0):
        wrong.append("gradient_clipping is set there; here method.clip_norm clips")
    return wrong
