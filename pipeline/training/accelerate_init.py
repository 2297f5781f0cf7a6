"""Initializes DeepSpeed through Hugging Face Accelerate, for users whose code depends on its hooks.

The result is the same engine. Accelerate prepares only the student and its optimizer. Its ``backward`` includes the optimizer
step, which prevents clipping each network separately, and its checkpoints are not atomic; backward, checkpoints and the teacher
therefore remain in this package.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pipeline.errors import TrainingError


def initialize(model: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> Any:
    """Equivalent of ``deepspeed.initialize``, using ``Accelerator.prepare``.

    Args:
        model: the student.
        optimizer: optimizer of the student's parameters.
        config: complete DeepSpeed config. Accelerate requires transformers for it; the config check has verified that.

    Returns:
        The DeepSpeedEngine.

    Raises:
        TrainingError: Accelerate reports another world size, chose a backend other than DeepSpeed, or rounded the weights.
    """
    from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
    from accelerate.utils import TorchDynamoPlugin

    # Without an explicit backend Accelerate assumes NCCL, and on a CPU it assumes a single process.
    group: Any = InitProcessGroupKwargs(backend=dist.get_backend())
    # Ignore its launcher's variables, which fovea handles: its bf16 would round the weights, its dynamo compile the engine.
    accelerator = Accelerator(
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config),
        kwargs_handlers=[group],
        mixed_precision="no",
        dynamo_plugin=TorchDynamoPlugin(backend="no"),
    )
    ranks, kind = accelerator.num_processes, str(accelerator.distributed_type.value)
    if ranks != dist.get_world_size() or kind != "DEEPSPEED":
        raise TrainingError(
            f"accelerate reports {ranks} ranks with {kind}, but there are {dist.get_world_size()} with DeepSpeed",
            where="launch.deepspeed_init",
            hint="Set launch.deepspeed_init=deepspeed",
        )
    engine, _ = accelerator.prepare(model, optimizer)
    if rounded := next((name for name, p in model.named_parameters() if p.dtype != torch.float32), None):
        raise TrainingError(
            "accelerate rounded the weights", where=f"parameter {rounded}", hint="Set launch.deepspeed_init=deepspeed"
        )
    return engine
