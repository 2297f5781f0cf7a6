"""Extends the first layer of a tower from red, green and blue to other channels, by a rule that is stated in the settings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.errors import CheckpointError

_RGB = 3
_COLOURS = {"red": 0, "green": 1, "blue": 2}


def inflated(weight: Tensor, channels: int, rule: str | Sequence[str], *, where: str) -> Tensor:
    """Weights for images of some channels from those for RGB images.

    ``mean`` gives every channel the mean of the three colours, ``repeat`` gives channel *n* the colour *n* modulo 3; both are
    multiplied by 3 / channels, so that an image whose channels are all alike is seen as before. A list names the colour of each
    channel (``red``, ``green``, ``blue``, ``mean`` or ``zero``), whose weights are used as they are.

    Args:
        weight: ``[width, 3, height, width]``.
        channels: number of channels.
        rule: see above.
        where: the source, for messages.

    Returns:
        ``[width, channels, height, width]``.

    Raises:
        CheckpointError: a list of another length.
    """
    mean = weight.mean(1, keepdim=True)
    if rule == "mean":
        return mean.expand(-1, channels, -1, -1).contiguous() * (_RGB / channels)
    if rule == "repeat":
        return weight[:, [number % _RGB for number in range(channels)]] * (_RGB / channels)
    if len(rule) != channels:
        raise CheckpointError(
            f"init_from.input_channels names {len(rule)} colours for {channels} channels",
            where=where,
            hint="Name red, green, blue, mean or zero for each channel, or use mean or repeat",
        )
    parts = {"mean": mean, "zero": torch.zeros_like(mean)}
    parts |= {name: weight[:, at : at + 1] for name, at in _COLOURS.items()}
    return torch.cat([parts[name] for name in rule], dim=1)


def described(rule: str | Sequence[str], channels: int) -> str:
    """The rule in words, for logs."""
    if isinstance(rule, str):
        colours = "the mean of the three colours" if rule == "mean" else "the three colours in turn"
        return f"its first layer sees {channels} channels instead of RGB: each begins with {colours}, times 3 / {channels}"
    return f"its first layer sees {channels} channels instead of RGB: they begin as {', '.join(rule)}"
