"""DeepSpeed set up by Hugging Face Accelerate, for who already has its hooks around it; the same engine comes out.

Accelerate prepares the student and its optimizer and nothing else. Its ``backward`` would take the optimizer's step along, which
leaves no room to clip each network apart, and its saves are not atomic: both stay ours, as does the teacher.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pipeline.errors import TrainingError


def initialize(model: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> Any:
    """What ``deepspeed.initialize`` gives, by way of ``Accelerator.prepare``.

    Args:
        model: the student.
        optimizer: of its parameters.
        config: DeepSpeed's settings, complete. Accelerate wants transformers for them; the config's check has looked.

    Returns:
        The DeepSpeedEngine.

    Raises:
        TrainingError: Accelerate counts other ranks than there are, took another way than DeepSpeed, or rounded the weights.
    """
    from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
    from accelerate.utils import TorchDynamoPlugin

    # Without the backend it takes NCCL for granted, and on a CPU believes to be alone.
    group: Any = InitProcessGroupKwargs(backend=dist.get_backend())
    # What its launcher's variables ask for is ours to do: its bf16 would round the weights, its dynamo compile the engine.
    accelerator = Accelerator(
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config),
        kwargs_handlers=[group],
        mixed_precision="no",
        dynamo_plugin=TorchDynamoPlugin(backend="no"),
    )
    found, kind = accelerator.num_processes, str(accelerator.distributed_type.value)
    if found != dist.get_world_size() or kind != "DEEPSPEED":
        raise TrainingError(
            f"accelerate sees {found} ranks by way of {kind}, but there are {dist.get_world_size()} and DeepSpeed is wanted",
            where="launch.deepspeed_init",
            hint="set launch.deepspeed_init=deepspeed",
        )
    engine, _ = accelerator.prepare(model, optimizer)
    if rounded := next((name for name, p in model.named_parameters() if p.dtype != torch.float32), None):
        raise TrainingError(
            "accelerate rounded the weights", where=f"parameter {rounded}", hint="set launch.deepspeed_init=deepspeed"
        )
    return engine
