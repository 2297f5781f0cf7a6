"""Compiles transformer blocks with ``torch.compile``: which runs do, what is compiled, and where compiled code is kept.

Each block is compiled by itself, with static shapes: blocks of one shape share a graph, so that a tower takes as long to compile
as a few of its blocks. What varies in size from step to step does not lead to further graphs: the masked patches are filled up to
a fixed number (:class:`pipeline.data.augment.views.Masks`), and the length of captions is a variable of the graph.
"""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from pipeline.config.schema import Config
from pipeline.errors import ConfigError
from pipeline.methods.base import Method
from pipeline.models.text import TextBlock, TextTower
from pipeline.models.vision import VisionTower

_GRAPHS = 64  # per function; beyond this Dynamo would run blocks uncompiled, with no more than a warning


def why_uncompiled(config: Config, device: torch.device, before: bool | None = None) -> str | None:
    """Why blocks are not compiled on this device; ``None`` if they are.

    Args:
        config: the settings.
        device: where the blocks run.
        before: whether they were compiled when the run's last checkpoint was written, which ``auto`` does not change; ``None``
            for a new run.

    Raises:
        ConfigError: ``train.compile=true`` without the compiler that it needs.
    """
    setting, missing = config.train.compile, _missing(device)
    if setting == "auto":
        if before is False:
            return "train.compile=auto leaves a run as it began"
        if device.type != "cuda":
            return "train.compile=auto compiles on a GPU only"
        if config.train.zero_stage == 3:
            return "train.compile=auto does not compile with train.zero_stage=3, which gathers weights inside of blocks"
        return f"train.compile=auto found no {missing}" if missing else None
    if not setting:
        return "train.compile=false"
    if missing:
        raise ConfigError(f"needs a {missing}", where="train.compile", hint="Install it, or set train.compile=false")
    return None


def _missing(device: torch.device) -> str:
    """What compiled code needs and this machine lacks, or nothing."""
    if device.type == "cuda":
        if find_spec("triton") is None:
            return "Triton"
        return "" if any(map(shutil.which, ("cc", "gcc", "clang"))) else "C compiler, which Triton needs"
    return "" if any(map(shutil.which, ("g++", "c++"))) else "C++ compiler"


def networks_of(method: Method) -> list[nn.Module]:
    """The method and its teacher's networks."""
    return [method, *(method.teacher.modules.values() if method.teacher is not None else ())]


def compile_blocks(method: Method, *, cuda_graphs: bool = False) -> int:
    """Make the transformer blocks of all towers, decoders and teachers of a method run compiled; returns their number.

    ResNets have none: their batch norms, a collective each, would end a graph after every convolution.

    Args:
        method: the method, before its first forward pass.
        cuda_graphs: whether compiled code is replayed as CUDA graphs.
    """
    allow_graphs()
    blocks: dict[int, nn.Module] = {}
    for root in networks_of(method):
        for module in root.modules():
            if isinstance(module, VisionTower | TextTower):
                module.compiled = True
            if isinstance(module, VisionTower):
                _share_graphs(module.vit.blocks)
                blocks |= {id(block): block for block in module.vit.blocks}
            elif isinstance(module, TextBlock):
                blocks[id(module)] = module
    for block in blocks.values():
        block.compile(dynamic=False, mode="reduce-overhead" if cuda_graphs else None)
    return len(blocks)


def allow_graphs() -> None:
    """Let a function have as many graphs as there are shapes, modes and towers; beyond the limit blocks run uncompiled."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _GRAPHS)


def _share_graphs(blocks: Any) -> None:
    """Where the drop rate rises from block to block, make it a tensor: as a constant it needs a graph for each block."""
    paths = [(block, name) for block in blocks for name, path in block.named_children() if type(path) is DropPath]
    if len({getattr(block, name).drop_prob for block, name in paths}) > 1:
        for block in blocks:
            for name in ("drop_path1", "drop_path2"):
                path = getattr(block, name, None)
                if isinstance(path, nn.Identity | DropPath):
                    setattr(block, name, TensorDropPath(getattr(path, "drop_prob", 0.0)))


class TensorDropPath(nn.Module):
    """Stochastic depth whose rate is a tensor; draws other random numbers than timm's, from the same distribution.

    Args:
        rate: probability with which a sample's branch is dropped.
    """

    keep: Tensor

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.register_buffer("keep", torch.tensor(1.0 - rate), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, ...]`` to the same; kept samples are divided by the probability of being kept."""
        if not self.training:
            return x
        drawn = torch.rand((len(x),) + (1,) * (x.ndim - 1), device=x.device)
        return x * ((drawn < self.keep).to(x.dtype) / self.keep.to(x.dtype))
