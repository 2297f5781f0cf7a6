"""CLIP text towers (arXiv 2103.00020), with open_clip's sizes and conversion to and from its state dict.

:func:`from_open_clip` and :func:`to_open_clip` convert between the two state dict layouts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from itertools import count

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.errors import CheckpointError, ConfigError
from pipeline.models.tokens import any_size, taken

VOCABULARY, END = 49408, 49407
"""Size of CLIP's byte-pair vocabulary, and its end token."""


class TextBlock(nn.Module):
    """Pre-norm transformer block.

    Args:
        width: token width.
        heads: attention heads.
        causal: whether attention is causal.
        quick_gelu: OpenAI's ``x * sigmoid(1.702 x)`` instead of the exact GELU.
    """

    def __init__(self, width: int, heads: int, *, causal: bool = True, quick_gelu: bool = False) -> None:
        super().__init__()
        self.heads, self.causal, self.quick_gelu = heads, causal, quick_gelu
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, read: Tensor | None = None) -> Tensor:
        """``[batch, tokens, width]`` to the same, or to the outputs at the tokens ``read`` only, int64 ``[batch, n]``."""
        out = self._attend(self.qkv(self.norm1(x)), read)
        x = (x if read is None else taken(x, read)) + self.proj(out)
        hidden = self.fc1(self.norm2(x))
        hidden = hidden * torch.sigmoid(1.702 * hidden) if self.quick_gelu else F.gelu(hidden)
        return x + self.fc2(hidden)

    def _attend(self, qkv: Tensor, read: Tensor | None = None) -> Tensor:
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        seen = None  # mask of the positions that each selected token attends to, if not all
        if read is not None:
            q = q.gather(2, read[:, None, :, None].expand(-1, self.heads, -1, q.shape[3]))
            if self.causal:
                seen = torch.arange(k.shape[2], device=k.device) <= read[:, None, :, None]
        if (
            qkv.device.type == "cpu" and qkv.dtype == torch.bfloat16
        ):  # the fused kernel has no fast backward here, see VisionTower
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
            if self.causal and seen is None:
                seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            if seen is not None:
                scores = scores.masked_fill(~seen, float("-inf"))
            out = scores.softmax(-1).to(v.dtype) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=self.causal and read is None)
        return out.transpose(1, 2).flatten(2)


class TextTower(nn.Module):
    """Text transformer: one feature vector per text, taken at its end token.

    Args:
        width, depth, heads: sizes of the transformer.
        embed: output dimension.
        context: maximum tokens per text.
        vocabulary: vocabulary size.
        causal: causal attention (CLIP); SigLIP's is bidirectional and includes padding.
        quick_gelu: see :class:`TextBlock`; weights trained with one activation are silently worse with the other.
        end: the end token.

    Attributes:
        checkpointing: whether blocks use activation checkpointing.
        compiled: whether blocks are compiled; one graph then serves texts of all lengths.
    """

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        heads: int,
        embed: int,
        context: int = 77,
        vocabulary: int = VOCABULARY,
        causal: bool = True,
        quick_gelu: bool = False,
        end: int = END,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ConfigError(
                f"text width {width} is not divisible by {heads} heads", where="method.text", hint="Choose sizes that divide"
            )
        self.end, self.checkpointing, self.compiled = end, False, False
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.empty(context, width))
        self.blocks = nn.ModuleList(TextBlock(width, heads, causal=causal, quick_gelu=quick_gelu) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.projection = nn.Linear(width, embed, bias=False)
        self._initialise(width, depth)

    def _initialise(self, width: int, depth: int) -> None:
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.01)
        nn.init.normal_(self.projection.weight, std=width**-0.5)
        into_sum = width**-0.5 * (2 * depth) ** -0.5
        stds = {"qkv": width**-0.5, "proj": into_sum, "fc1": (2 * width) ** -0.5, "fc2": into_sum}
        for block in self.blocks:
            for name, std in stds.items():
                nn.init.normal_(block.get_parameter(f"{name}.weight"), std=std)
                if name in ("qkv", "proj"):  # the MLP's biases keep nn.Linear's default, as in open_clip and SLIP
                    nn.init.zeros_(block.get_parameter(f"{name}.bias"))

    def forward(self, tokens: Tensor) -> Tensor:
        """Features ``[batch, embed]``, not normalized, of int64 ``[batch, length]`` tokens; ``length`` is at most the context.

        The feature is taken at the *first* end token; without one, at the last position, which in a causal tower attends to
        all.
        """
        x = self.tokens(tokens) + self.positions[: tokens.shape[1]]
        ends = tokens == self.end
        last = torch.where(ends.any(1), ends.int().argmax(1), tokens.shape[1] - 1)[:, None]
        for block in self.blocks:
            read = last if block is self.blocks[-1] else None
            x = any_size(x, 1) if self.compiled else x
            x = checkpoint(block, x, read, use_reentrant=False) if self.checkpointing else block(x, read)
        features: Tensor = self.projection(self.norm(x[:, 0]))
        return features

    def lr_scales(self, decay: float, factor: float = 1.0) -> Iterator[tuple[nn.Parameter, float]]:
        """Learning-rate multiplier of each parameter: ``decay`` from each block to the one below, as in the vision tower."""
        depth = len(self.blocks)
        for parameter in self.parameters():
            yield parameter, factor * decay ** (depth + 1)
        for index, block in enumerate(self.blocks):
            for parameter in block.parameters():
                yield parameter, factor * decay ** (depth - index)
        for parameter in (*self.norm.parameters(), *self.projection.parameters()):
            yield parameter, factor


class LogitScale(nn.Module):
    """Learned temperature, and the sigmoid loss's bias: fp32, shape ``[1]``, read through the module's own forward pass.

    The scale is stored as a logarithm and clamped to ``[1, largest]`` in the forward pass, not after the step, because an
    engine with fp32 master weights would undo that. Beyond a bound only the gradient that leads back passes; a plain clamp
    would pass none, and the scale could never return.

    Args:
        scale: initial scale.
        bias: initial bias, or ``None`` for none.
        largest: largest scale.
    """

    def __init__(self, scale: float, *, bias: float | None = None, largest: float = 100.0) -> None:
        super().__init__()
        if not 1.0 <= scale <= largest:
            raise ConfigError(
                f"a scale of {scale} is not between 1 and {largest}", where="method.init_logit_scale", hint="Choose another scale"
            )
        self.log_scale = nn.Parameter(torch.tensor([math.log(scale)], dtype=torch.float32))
        self.bias = nn.Parameter(torch.tensor([bias], dtype=torch.float32)) if bias is not None else None
        self._top = math.log(largest)

    def forward(self) -> tuple[Tensor, Tensor | None]:
        """Scale ``[1]`` and bias ``[1]``, fp32."""
        scale = _Bounded.apply(self.log_scale.float(), self._top).exp()
        return scale, self.bias.float() if self.bias is not None else None


class _Bounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor, top: float) -> Tensor:
        ctx.save_for_backward(x)  # type: ignore[attr-defined]
        ctx.top = top  # type: ignore[attr-defined]
        return x.clamp(0.0, top)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        outward = ((x > ctx.top) & (gradient < 0)) | ((x < 0) & (gradient > 0))  # type: ignore[attr-defined]
        return gradient.masked_fill(outward, 0.0), None


# ---- open_clip's layout ---------------------------------------------------------------------------------------------------

_OUTER = {"token_embedding.weight": "tokens.weight", "positional_embedding": "positions"} | {
    f"ln_final.{kind}": f"norm.{kind}" for kind in ("weight", "bias")
}
_INNER = {"attn.in_proj_weight": "qkv.weight", "attn.in_proj_bias": "qkv.bias"} | {
    f"{theirs}.{kind}": f"{ours}.{kind}"
    for theirs, ours in (
        ("ln_1", "norm1"),
        ("ln_2", "norm2"),
        ("attn.out_proj", "proj"),
        ("mlp.c_fc", "fc1"),
        ("mlp.c_proj", "fc2"),
    )
    for kind in ("weight", "bias")
}
_THEIRS = {ours: theirs for theirs, ours in (_OUTER | _INNER).items()}


def from_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Extracts the text tower's state dict from an open_clip model's, in either layout (with or without ``text.``).

    Raises:
        CheckpointError: it holds no text tower.
    """
    custom = any(name.startswith("text.") for name in state)
    texts = {name.removeprefix("text."): t for name, t in state.items() if not custom or name.startswith("text.")}
    if "token_embedding.weight" not in texts or "text_projection" not in texts:
        raise CheckpointError("contains no open_clip text tower", where="text weights", hint="Name a CLIP checkpoint")
    try:
        converted = {ours: texts[theirs] for theirs, ours in _OUTER.items()}
        converted["projection.weight"] = texts["text_projection"].T.contiguous()
        for block in count():
            prefix = f"transformer.resblocks.{block}."
            if f"{prefix}ln_1.weight" not in texts:
                break
            converted |= {f"blocks.{block}.{ours}": texts[prefix + theirs] for theirs, ours in _INNER.items()}
    except KeyError as error:
        raise CheckpointError(
            f"a tensor of the text tower is missing: {error.args[0]}",
            where="text weights",
            hint="Name a complete CLIP checkpoint",
        ) from None
    return converted


def to_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`from_open_clip`, in the layout with ``text.``."""
    converted = {}
    for name, tensor in state.items():
        inner = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
        if name == "projection.weight":
            converted["text.text_projection"] = tensor.T.contiguous()
        elif inner:
            converted[f"text.transformer.resblocks.{inner[1]}.{_THEIRS[inner[2]]}"] = tensor
        else:
            converted[f"text.{_THEIRS[name]}"] = tensor
    return converted
