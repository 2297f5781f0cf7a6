"""DeepSpeed set up by Hugging Face Accelerate, for who already has its hooks around it; the same engine comes out.

Accelerate prepares the student and its optimizer and nothing else. Its ``backward`` would take the optimizer's step along, which
leaves no room to clip each network apart, and its saves are not atomic: both stay ours, as does the teacher.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pipeline.errors import ConfigError, TrainingError


def initialize(model: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> Any:
    """What ``deepspeed.initialize`` gives, by way of ``Accelerator.prepare``.

    Args:
        model: the student.
        optimizer: of its parameters.
        config: DeepSpeed's settings, complete.

    Returns:
        The DeepSpeedEngine.

    Raises:
        ConfigError: Accelerate wants transformers for this, and it is not installed.
        TrainingError: Accelerate counts other ranks than there are, or took another way than DeepSpeed.
    """
    if importlib.util.find_spec("transformers") is None:
        raise ConfigError(
            "accelerate sets up DeepSpeed only where transformers is installed",
            where="launch.init",
            mend="pip install transformers, or set launch.init=deepspeed, which gives the same run",
        )
    from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs

    plugin = DeepSpeedPlugin(hf_ds_config=config)
    # Without the backend it takes NCCL for granted, and on a CPU believes to be alone.
    group: Any = InitProcessGroupKwargs(backend=dist.get_backend())
    accelerator = Accelerator(deepspeed_plugin=plugin, kwargs_handlers=[group])
    found, kind = accelerator.num_processes, str(accelerator.distributed_type.value)
    if found != dist.get_world_size() or kind != "DEEPSPEED":
        raise TrainingError(
            f"accelerate sees {found} ranks by way of {kind}, but there are {dist.get_world_size()} and DeepSpeed is wanted",
            where="launch.init",
            mend="set launch.init=deepspeed",
        )
    engine, _ = accelerator.prepare(model, optimizer)
    return engine
