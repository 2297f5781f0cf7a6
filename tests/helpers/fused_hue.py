"""The hue's Triton kernel without a GPU: ``python -m tests.helpers.fused_hue OUT``.

With ``TRITON_INTERPRET=1`` it is interpreted, by itself and within a DALI graph on the CPU; else it is compiled for GPUs that
are not here. Triton decides which when it is imported, so that both need a process of their own.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from typing import Any

import numpy as np
import torch


def colours() -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Every 15th level of each channel, and pixels whose channels are equal or differ by one: ``[h, w, 3]``."""
    levels = np.arange(0, 256, 15)
    lattice = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(-1, 3)
    gray = np.arange(256).repeat(27).reshape(-1, 1)
    near = gray + np.stack(np.meshgrid(*[[-1, 0, 1]] * 3), axis=-1).reshape(-1, 3)[np.arange(len(gray)) % 27]
    pixels = np.concatenate([lattice, near.clip(0, 255)]).astype(np.uint8)
    return pixels[: len(pixels) // 100 * 100].reshape(-1, 100, 3)


def interpret(path: str) -> None:
    """The images that the kernel makes, those of the numpy form, and what is wrong with the kernel in a graph."""
    from pipeline.data.augment import dali
    from pipeline.data.augment.hue import turn_hues
    from pipeline.data.augment.hue_triton import turn_hues as at_once

    turns = np.array([-0.5, -1 / 3, -0.1, -1e-7, 0.0, 1 / 12, 0.1, 1 / 6, 0.25, 0.4999, 0.5], np.float32)
    image = colours()
    images = torch.from_numpy(np.stack([image] * len(turns)))
    found = at_once(images, torch.from_numpy(turns))
    expected = torch.from_numpy(np.stack(turn_hues([image] * len(turns), list(turns))))

    def wrong(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        return at_once(x, angles).bitwise_xor_(1)

    problems = [dali._problem_of_fused_hue(None, partial(dali.turned_at_once, turn)) for turn in (at_once, wrong)]
    torch.save({"found": found, "expected": expected, "image": images[0], "problems": problems}, path)


def compile_ahead(path: str) -> None:
    """The kernel's code for two GPUs."""
    import triton
    from triton.runtime.jit import JITFunction

    from pipeline.data.augment.hue_triton import turn_hues
    from tests.helpers.fused_losses import Compiler

    made: list[tuple[int, bytes, str]] = []

    def launch(self: Any, grid: Any) -> Any:
        def keep(*args: Any, **kwargs: Any) -> None:
            kernel = self.warmup(*args, grid=grid, **kwargs)
            made.append((capability, kernel.asm["cubin"], kernel.asm["ptx"]))

        return keep

    JITFunction.__getitem__ = launch
    for capability in (80, 90):
        triton.runtime.driver.set_active(Compiler(capability))
        turn_hues(torch.zeros(2, 8, 8, 3, dtype=torch.uint8), torch.zeros(2))
    torch.save(made, path)


if __name__ == "__main__":
    {"1": interpret}.get(os.environ.get("TRITON_INTERPRET", ""), compile_ahead)(sys.argv[1])
