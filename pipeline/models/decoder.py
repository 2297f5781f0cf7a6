"""Small transformer decoder that predicts masked patches from the visible ones (MAE, arXiv 2111.06377)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.models.text import TextBlock
from pipeline.models.tokens import Tokens, taken


class Decoder(nn.Module):
    """Decodes the tokens of all patches from those of the visible ones.

    Args:
        width: token width, the tower's.
        grid: patches per side.
        patch: side of a patch in pixels.
        depth, heads: sizes of the transformer.
        channels: channels of the images.
    """

    positions: Tensor

    def __init__(self, width: int, *, grid: int, patch: int, depth: int = 1, heads: int = 16, channels: int = 3) -> None:
        super().__init__()
        if width % heads or width % 4:
            raise ConfigError(
                f"width {width} is not divisible by {heads} heads", where="method.decoder_heads", hint="Choose sizes that divide"
            )
        self.embed = nn.Linear(width, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.blocks = nn.ModuleList(TextBlock(width, heads, causal=False) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.register_buffer("positions", sincos_positions(grid, width), persistent=False)
        nn.init.normal_(self.mask_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module is not self.embed:  # the released code leaves this bias at nn.Linear's default
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.eps = 1e-6
        self.pixels = nn.Linear(width, channels * patch * patch)

    def forward(self, tokens: Tokens, removed: Tensor, *, everywhere: bool = False) -> tuple[Tensor, Tensor]:
        """Decoded patches, and the pixels of the masked ones. The last block skips tokens whose output is not used.

        Args:
            tokens: output of a tower that processed only the patches ``tokens.kept``.
            removed: int64 ``[batch, removed]``, positions of the other patches.
            everywhere: decode the visible patches too.

        Returns:
            ``[batch, removed, width]`` in the order of ``removed``, or ``[batch, patches, width]`` in the grid's order; and
            ``[batch, removed, channels * patch * patch]`` in the order of ``removed``.
        """
        if tokens.kept is None:
            raise ConfigError("no token was masked", where="Decoder", hint="Pass the encoder the mask")
        kept = self.embed(tokens.patches)
        batch, width, count = len(kept), kept.shape[2], kept.shape[1] + removed.shape[1]
        hidden = self.mask_token.to(kept.dtype).expand(batch, removed.shape[1], width)
        # Index of each grid patch in the sequence of kept patches followed by removed ones.
        order = torch.cat([tokens.kept, removed], dim=1)
        places = torch.empty_like(order).scatter_(1, order, torch.arange(count, device=order.device).expand_as(order))
        patches = torch.cat([kept, hidden], dim=1).gather(1, places[:, :, None].expand(-1, -1, width)) + self.positions
        x = torch.cat([self.embed(tokens.cls)[:, None], patches], dim=1)
        if everywhere:
            for block in self.blocks:
                x = block(x)
            x = self.norm(x)[:, 1:]
            return x, self.pixels(taken(x, removed))
        for block in self.blocks[:-1]:
            x = block(x)
        x = self.blocks[-1](x, removed + 1) if self.blocks else taken(x, removed + 1)
        x = self.norm(x)
        return x, self.pixels(x)


def sincos_positions(grid: int, width: int) -> Tensor:
    """Fixed sine-cosine positions of a square grid in row-major order, ``[grid * grid, width]``: half of the channels for the
    column, half for the row; each half first sines, then cosines, of frequencies from 1 down to 1 / 10000.
    """
    quarter = width // 4
    frequencies = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns, rows = axis[None].expand(grid, -1, -1), axis[:, None].expand(-1, grid, -1)
    return torch.cat([columns, rows], dim=2).flatten(0, 1).float()


def patchified(images: Tensor, patch: int, *, standardise: bool = True) -> Tensor:
    """The pixels of each patch, ``[batch, patches, patch * patch * channels]`` fp32, by row, column and channel.

    Args:
        images: ``[batch, channels, side, side]``, the side a multiple of the patch.
        patch: side of a patch in pixels.
        standardise: normalize each patch by its own mean and (unbiased) standard deviation, so that a prediction of 0 has a
            mean squared error of ``(n - 1) / n``.
    """
    cut = images.float().unflatten(3, (-1, patch)).unflatten(2, (-1, patch))
    pixels = cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    if not standardise:
        return pixels
    variance, mean = torch.var_mean(pixels, dim=2, keepdim=True)
    return (pixels - mean) / (variance + 1e-6).sqrt()
