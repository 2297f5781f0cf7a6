"""The model under evaluation: one interface for backbones trained here, read from a checkpoint, or pretrained elsewhere."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Tower(Protocol):
    """Interface of an evaluated backbone, whose call returns class token, registers and patch tokens.

    A transformer has its blocks and the number of tokens before the patches in ``vit``; a ResNet has no ``vit``.
    """

    vit: Any
    patch: int
    width: int

    def __call__(self, images: Tensor) -> Any:
        """Tokens of normalized images ``[n, channels, h, w]``: ``cls [n, width]`` and ``patches [n, count, width]``."""
        ...


@dataclass(frozen=True)
class EvalModel:
    """A backbone with its normalization constants and, if available, its image-text encoders.

    Attributes:
        tower: the network.
        mean, std: of its images, as fractions of full intensity.
        composite: channels that people are shown as red, green and blue, or ``pca``; ``None`` for RGB images.
        precision: ``bf16`` evaluates under autocast.
        images: encodes images in the joint image-text space, ``[n, embed]``, not normalized; ``None`` without a text encoder.
        texts: encodes texts likewise.
    """

    tower: Tower
    mean: tuple[float, ...]
    std: tuple[float, ...]
    precision: str = "fp32"
    images: Callable[[Tensor], Tensor] | None = None
    texts: Callable[[list[str]], Tensor] | None = None
    composite: tuple[int, ...] | Literal["pca"] | None = None

    def tokens(self, images: Tensor) -> Any:
        """Class token and patch tokens, see :class:`Tower`."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self.tower(images)

    def cls(self, images: Tensor) -> Tensor:
        """Class tokens ``[n, width]``."""
        cls: Tensor = self.tokens(images).cls
        return cls

    def embedded(self, images: Tensor) -> Tensor:
        """Image features ``[n, embed]`` in the joint image-text space; class tokens if the model has no text encoder."""
        if self.images is None:
            return self.cls(images)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self.images(images)

    @property
    def depth(self) -> int:
        """Number of blocks whose features :meth:`layers` returns; 1 for a ResNet, whose last feature map it returns."""
        return len(list(self.tower.vit.blocks)) if hasattr(self.tower, "vit") else 1

    def layers(self, images: Tensor, last: int) -> Tensor:
        """Features of the last blocks, ``[n, last, 2, width]`` fp32: class token (the mean again, if there is none) and mean of
        the patch tokens, in block order, each normalized to mean 0 and standard deviation 1 over its channels.
        """
        if not hasattr(self.tower, "vit"):
            tokens = self.tokens(images)
            both = torch.stack([tokens.cls, tokens.patches.mean(1)], dim=1).float()
            return F.layer_norm(both, both.shape[-1:])[:, None]
        kept: list[Tensor] = []
        blocks = list(self.tower.vit.blocks)[-last:]
        prefix = self.tower.vit.num_prefix_tokens

        def keep(_: nn.Module, __: Any, out: Tensor) -> None:
            x = F.layer_norm(out.detach().float(), out.shape[-1:])
            patches = x[:, prefix:].mean(1)
            kept.append(torch.stack([x[:, 0] if prefix else patches, patches], dim=1))

        handles = [block.register_forward_hook(keep) for block in blocks]
        try:
            with uncompiled(blocks):
                self.tokens(images)
        finally:
            for handle in handles:
                handle.remove()
        return torch.stack(kept, dim=1)


@contextlib.contextmanager
def uncompiled(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Runs compiled blocks eagerly in this context, because compiled code ignores hooks that are added later."""
    if not any(getattr(block, "_compiled_call_impl", None) is not None for block in blocks):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextlib.contextmanager
def preserve_rng_and_mode(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Sets these modules to evaluation mode; on exit restores all random states and every module's own mode."""
    modes = [(inner, inner.training) for module in modules for inner in module.modules()]
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for inner, mode in modes:
            inner.training = mode
        random.setstate(state[0])
        np.random.set_state(state[1])
        torch.set_rng_state(state[2])
        if devices:
            torch.cuda.set_rng_state_all(devices)
