"""Captioning transformers: CoCa's text tower with its decoder, SimVLM's prefix language model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from pipeline.models.text import END, VOCABULARY, TextBlock, TextTower
from pipeline.models.tokens import any_size


def attend(q: Tensor, k: Tensor, v: Tensor, *, heads: int, mask: Tensor | None = None) -> Tensor:
    """Attention of ``[batch, n, width]`` to ``[batch, m, width]``; ``mask`` is bool, true where attention is allowed."""
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:  # the fused kernel has no fast backward here, see VisionTower
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        out = scores.softmax(-1).to(v.dtype) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


class MaskedBlock(TextBlock):
    """Transformer block with an explicit attention mask and optional cross-attention.

    Args:
        width, heads: token width and number of attention heads.
        quick_gelu: see :class:`TextBlock`.
        context: width of the tokens for cross-attention; ``None`` for no cross-attention.
    """

    def __init__(self, width: int, heads: int, *, quick_gelu: bool = False, context: int | None = None) -> None:
        super().__init__(width, heads, causal=False, quick_gelu=quick_gelu)
        self.looks = context is not None
        if context is not None:
            self.norm_own, self.norm_other = nn.LayerNorm(width), nn.LayerNorm(context)
            self.query, self.key_value = nn.Linear(width, width), nn.Linear(context, 2 * width)
            self.cross_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        """``[batch, tokens, width]`` to the same; ``mask`` is bool ``[batch or 1, 1, tokens, tokens]``."""
        x = x + self.proj(attend(*self.qkv(self.norm1(x)).chunk(3, dim=2), heads=self.heads, mask=mask))
        if self.looks and context is not None:
            keys, values = self.key_value(self.norm_other(context)).chunk(2, dim=2)
            x = x + self.cross_proj(attend(self.query(self.norm_own(x)), keys, values, heads=self.heads))
        hidden = self.fc1(self.norm2(x))
        hidden = hidden * torch.sigmoid(1.702 * hidden) if self.quick_gelu else F.gelu(hidden)
        return x + self.fc2(hidden)


class Pooler(nn.Module):
    """Attention pooling: learned queries attend to all tokens of an image.

    Args:
        width: token width.
        queries: number of output tokens.
        heads: attention heads.
    """

    def __init__(self, width: int, queries: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.queries = nn.Parameter(torch.empty(queries, width))
        nn.init.normal_(self.queries, std=0.02)
        self.norm_own, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key_value, self.proj = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.norm_out = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, tokens, width]`` to ``[batch, queries, width]``."""
        keys, values = self.key_value(self.norm(x)).chunk(2, dim=2)
        queries = self.query(self.norm_own(self.queries)).expand(len(x), -1, -1)
        pooled: Tensor = self.norm_out(self.proj(attend(queries, keys, values, heads=self.heads)))
        return pooled


class Vocabulary(nn.Module):
    """Output layer of a language model: one vector per token.

    Args:
        count: vocabulary size.
        width: width of the hidden states.
    """

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.weight = nn.Parameter(torch.empty(count, width))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, hidden: Tensor, use: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
        """Logits ``[n, count]`` of states ``[n, width]``, or the result of ``use`` on the normalized states and the matrix."""
        hidden = self.norm(hidden)
        return F.linear(hidden, self.weight) if use is None else use(hidden, self.weight)


class CaptionTower(TextTower):
    """CoCa's text side: text-only blocks, then blocks with cross-attention to the image.

    A class token after the text attends to all of it except padding; no token attends to it. It gives the caption's feature,
    so one forward pass serves both the contrastive and the captioning loss.

    Args:
        width, depth, heads, embed, context: as in :class:`TextTower`; ``depth`` counts the text-only blocks.
        decoder_depth: number of blocks with cross-attention.
        picture: width of the image tokens.
        quick_gelu: see :class:`TextBlock`.
    """

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        heads: int,
        embed: int,
        context: int,
        decoder_depth: int,
        picture: int,
        quick_gelu: bool = False,
    ) -> None:
        super().__init__(width=width, depth=depth, heads=heads, embed=embed, context=context + 1, quick_gelu=quick_gelu)
        self.blocks = nn.ModuleList(MaskedBlock(width, heads, quick_gelu=quick_gelu) for _ in range(depth))
        self._initialise(width, depth)
        self.cls = nn.Parameter(torch.empty(1, width))
        nn.init.normal_(self.cls, std=0.01)
        blocks = (MaskedBlock(width, heads, quick_gelu=quick_gelu, context=picture) for _ in range(decoder_depth))
        self.decoder = nn.ModuleList(blocks)
        self.vocabulary = Vocabulary(VOCABULARY, width)

    @override
    def forward(self, tokens: Tensor, picture: Tensor | None = None) -> Any:
        """Features ``[batch, embed]`` of int64 ``[batch, length]`` tokens, not normalized.

        With image tokens ``[batch, any, picture]`` also returns the states ``[batch, length, width]``, each of which predicts
        the next token.
        """
        length = tokens.shape[1]
        x = torch.cat([self.tokens(tokens), self.cls.expand(len(tokens), 1, -1)], dim=1) + self.positions[: length + 1]
        mask = causal(length + 1, tokens.device).expand(len(tokens), 1, -1, -1).clone()
        mask[:, 0, length, :length] = inside(tokens, self.end)
        for block in self.blocks:
            x = self._through(block, x, mask)
        features = self.projection(self.norm(x[:, length]))
        if picture is None:
            return features
        states = x[:, :length]
        for block in self.decoder:
            states = self._through(block, states, causal(length, tokens.device), picture)
        return features, states

    def _through(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        if self.compiled:
            states, mask, *_ = inputs
            any_size(states, 1), any_size(mask, 2, 3)
        out: Tensor = checkpoint(block, *inputs, use_reentrant=False) if self.checkpointing else block(*inputs)
        return out

    @override
    def lr_scales(self, decay: float, factor: float = 1.0) -> Iterator[tuple[nn.Parameter, float]]:
        """As in the text tower; the decoder counts as being above the text-only blocks."""
        yield from super().lr_scales(decay, factor)
        for parameter in (*self.decoder.parameters(), *self.vocabulary.parameters()):
            yield parameter, factor


class PrefixLanguageModel(nn.Module):
    """One transformer over image and text tokens: bidirectional attention within the prefix, causal attention after it.

    Args:
        width, depth, heads: sizes of the transformer.
        context: maximum number of text tokens.
        picture: width of the image tokens.
    """

    def __init__(self, *, width: int, depth: int, heads: int, context: int, picture: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Parameter(torch.empty(context, width))
        self.picture = nn.Linear(picture, width)
        self.blocks = nn.ModuleList(MaskedBlock(width, heads) for _ in range(depth))
        self.vocabulary = Vocabulary(VOCABULARY, width)
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.01)
        for block in self.blocks:
            for name in ("qkv", "proj", "fc1", "fc2"):
                nn.init.trunc_normal_(block.get_parameter(f"{name}.weight"), std=0.02)
                nn.init.zeros_(block.get_parameter(f"{name}.bias"))

    def forward(self, patches: Tensor, tokens: Tensor, prefix: Tensor) -> Tensor:
        """States ``[batch, length, width]`` of the text positions, each of which predicts the next token.

        Args:
            patches: image tokens ``[batch, n, picture]``.
            tokens: int64 ``[batch, length]``.
            prefix: int64 ``[batch]``, number of text tokens in the prefix.
        """
        count, length = patches.shape[1], tokens.shape[1]
        x = torch.cat([self.picture(patches), self.tokens(tokens) + self.positions[:length]], dim=1)
        first = torch.arange(count + length, device=x.device) < (count + prefix)[:, None]
        mask = causal(count + length, x.device) | first[:, None, None, :]
        for block in self.blocks:
            x = block(x, mask)
        return x[:, count:]


def causal(length: int, device: torch.device) -> Tensor:
    """Causal mask, bool ``[1, 1, length, length]``: each position attends to itself and earlier ones."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()[None, None]


def last_position(tokens: Tensor, end: int = END) -> Tensor:
    """Position of the first end token, int64 ``[batch]``; the last position of a text without one."""
    ends = tokens == end
    return torch.where(ends.any(1), ends.int().argmax(1), tokens.shape[1] - 1)


def inside(tokens: Tensor, end: int = END) -> Tensor:
    """Bool ``[batch, length]``: text up to and including its first end token; all that follows is padding, whatever its value."""
    return torch.arange(tokens.shape[1], device=tokens.device) <= last_position(tokens, end)[:, None]
