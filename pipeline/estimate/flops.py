"""FLOPs per sample, counted on fake tensors and by formula.

A multiply-add is two operations, and only matrix products count, as in a GPU's stated peak. :func:`counted` runs a method's
own forward and backward pass on fake tensors under torch's counter, so it works for every method and accounts for skipped work
(stochastic depth by subset, dropped patches). The formulas allow a check by hand.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config.schema import Config
from pipeline.config.sizes import Size, height_width
from pipeline.data.augment.curriculum import stage_ends
from pipeline.data.augment.views import Batch, Boxes, Masks, ViewSpec
from pipeline.methods.base import Step
from pipeline.methods.registry import build_method
from pipeline.methods.settings import MethodSettings

_SAMPLES = 8

# In some versions torch's own table lacks some of these kernels, and counts the recomputation in a fused backward pass.
_FUSED_ATTENTION = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)


def flop_counter() -> FlopCounterMode:
    """torch's FLOP counter, with attention counted the same for every kernel and torch version: two products forward, four
    backward, as in the plain formula.
    """
    table: dict[Any, Callable[..., int]] = {}
    for name in _FUSED_ATTENTION:
        for suffix, formula in (("", _attention), ("_backward", _attention_backward)):
            if (operator := getattr(torch.ops.aten, name + suffix, None)) is not None:
                table[operator] = formula
    return FlopCounterMode(display=False, custom_mapping=table)


def _attention(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """FLOPs of ``softmax(q k^T) v`` from the shapes ``[batch, heads, tokens, width]``."""
    rows = math.prod(query[:-1])
    return 2 * rows * key[-2] * (query[-1] + value[-1])


def _attention_backward(
    _grad: Sequence[int], query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any
) -> int:
    return 2 * _attention(query, key, value)


def counted(config: Config, samples: int = _SAMPLES) -> float:
    """FLOPs of one sample in one step: teacher, student and its backward pass, heads and losses. If steps use views of several
    sizes, their mean; with a curriculum that of the steps after it.

    Args:
        config: the method and its model.
        samples: batch size to count with, rounded up to whole groups if the method compares samples in groups; terms that grow
            with the batch size are for this one.
    """
    return counted_stages(config.replace(method=_without_curriculum(config)), samples)[-1]


def counted_stages(config: Config, samples: int = _SAMPLES) -> list[float]:
    """As :func:`counted`, of each stage of the curriculum and of the steps after it."""
    sets = counted_sets(config, samples)
    last = sets[len(config.method.views.curriculum) :]
    mean = sum(one.weight * one.flops for one in last) / sum(one.weight for one in last)
    return [*(one.flops for one in sets[: -len(last)]), mean]


def counted_run(config: Config, epoch_samples: int) -> float:
    """As :func:`counted`, of a mean step of the whole run.

    Args:
        config: the settings.
        epoch_samples: samples of the training set; without effect if no length is in epochs.
    """
    batch, lengths = config.train.global_batch_size, [stage.until for stage in config.method.views.curriculum]
    ends = stage_ends(lengths, epoch_samples=epoch_samples, global_batch=batch)
    steps = max(config.train.duration.steps(epoch_samples, batch), 1)
    edges = [0, *(min(end, steps) for end in ends), steps]
    counts = [end - begin for begin, end in itertools.pairwise(edges)]
    return sum(count * flops for count, flops in zip(counts, counted_stages(config), strict=True)) / steps


@dataclass(frozen=True)
class SetFlops:
    """FLOPs of a sample with one set of views.

    Attributes:
        layout: as of the batches, see :attr:`pipeline.data.augment.views.Batch.layout`.
        weight: how often a step uses the set, relative to those that a step may use instead.
        flops: of one sample in one step.
    """

    layout: Hashable
    weight: float
    flops: float


def counted_sets(config: Config, samples: int = _SAMPLES) -> list[SetFlops]:
    """As :func:`counted`, of each of the method's sets of views: those of the curriculum's stages, then those of the steps after
    it.
    """
    samples = round_to_groups(config, samples)
    with torch.device("meta"):  # constructors read tensor values, which fake tensors do not have
        method = build_method(config)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for network in (method, *(method.teacher.modules.values() if method.teacher is not None else ())):
            network.to_empty(device="cpu")
        method.extra_state = {name: torch.empty_like(tensor, device="cpu") for name, tensor in method.extra_state.items()}
        sets = []
        for one in method.all_view_sets:
            batch = fake_batch(one.views, samples, context=method.text.context if method.text else 0)
            with flop_counter() as counter:
                with torch.no_grad():
                    method.before_accumulation([batch], Step())
                terms = method(batch, Step())
                torch.stack([term.float() for term in terms.values()]).sum().backward()
            sets.append(SetFlops(batch.layout, one.weight, counter.get_total_flops() / samples))
    return sets


def _without_curriculum(config: Config) -> MethodSettings:
    method = config.method
    return method.model_copy(update={"views": method.views.model_copy(update={"curriculum": ()})})


def round_to_groups(config: Config, samples: int) -> int:
    """``samples`` rounded up to whole groups, if the method compares samples in groups."""
    group = getattr(config.method, "koleo_group_size", None) or 1
    return int(group * math.ceil(samples / group))


def fake_batch(views: Sequence[ViewSpec], samples: int, *, context: int = 0) -> Batch:
    """A batch without values, with masks on as many patches as the method masks on average.

    Args:
        views: the method's ``ViewSpec``s.
        samples: batch size.
        context: tokens per caption, 0 for no captions.
    """
    images: dict[str, list[Tensor]] = {}
    masks: dict[str, Masks] = {}
    boxes: dict[str, Boxes] = {}
    kept: dict[str, Tensor] = {}
    for view in views:
        if view.dropout is not None:
            few = view.dropout.kept(math.prod(view.grid(view.dropout.patch)))
            kept[view.name] = torch.empty(samples * view.count, few, dtype=torch.int64)
        images[view.name] = [torch.empty(samples, view.in_channels, *view.shape) for _ in range(view.count)]
        if view.mask is not None:
            rows, patches = samples * view.count, math.prod(view.grid(view.mask.patch))
            hidden = round(rows * view.mask.probability * patches * sum(view.mask.ratio) / 2)
            masks[view.name] = Masks(
                grid=torch.empty(rows, patches, dtype=torch.bool),
                index=torch.empty(hidden, dtype=torch.int64),
                weight=torch.empty(hidden),
            )
        if view.boxes:
            corners = [torch.empty(samples, 4) for _ in range(view.count)]
            boxes[view.name] = Boxes(corners, [torch.empty(samples, dtype=torch.bool) for _ in range(view.count)])
    return Batch(
        views=images,
        labels=torch.empty(samples, dtype=torch.int64),
        keys=[str(n) for n in range(samples)],
        ids=list(range(samples)),
        position=0,
        masks=masks,
        tokens=torch.empty(samples, context, dtype=torch.int64) if context else None,
        captions=[""] * samples if context else None,
        boxes=boxes,
        kept=kept,
    )


def block(tokens: int, width: int, *, hidden: int | None = None, gated: bool = False, read: float | None = None) -> float:
    """FLOPs of a transformer block's forward pass, for one sequence.

    Args:
        tokens: sequence length.
        width: token width.
        hidden: width of the feed-forward layer; default is four times ``width``.
        gated: whether that layer is gated (SwiGLU), with three matrices instead of two.
        read: number of tokens whose output is used, which alone pass projection and feed-forward layer; ``None`` for all.
    """
    out = tokens if read is None else read
    feed = 2 * out * width * (hidden or 4 * width) * (3 if gated else 2)
    return 6.0 * tokens * width**2 + 4.0 * tokens**2 * width + 2.0 * out * width**2 + feed


def tower(
    size: Size,
    patch: int,
    width: int,
    depth: int,
    *,
    prefix: int = 1,
    gated: bool = False,
    hidden: int | None = None,
    read: float | None = None,
) -> float:
    """FLOPs of a vision transformer's forward pass for one image; ``read`` applies to the last block, see :func:`block`."""
    patches = math.prod(side // patch for side in height_width(size))
    blocks = (depth - 1) * block(patches + prefix, width, hidden=hidden, gated=gated)
    last = block(patches + prefix, width, hidden=hidden, gated=gated, read=read)
    return blocks + last + 2.0 * patches * 3 * patch**2 * width


def text_tower(context: int, width: int, depth: int, embed: int) -> float:
    """FLOPs of a text tower's forward pass for one caption, whose feature is taken at one token; all blocks but the last
    compute the whole attention.
    """
    last = block(context, width, read=1) - 4.0 * context * (context - 1) * width  # one row of its attention
    return (depth - 1) * block(context, width) + last + 2.0 * width * embed


def prototype_head(width: int, hidden: int, bottleneck: int, prototypes: int, layers: int = 3) -> float:
    """FLOPs of a projection head with prototypes, forward pass, for one token."""
    inner = [width, *[hidden] * (layers - 1), bottleneck]
    return 2.0 * (sum(a * b for a, b in itertools.pairwise(inner)) + bottleneck * prototypes)


def swiglu_hidden(width: int, ratio: float = 4.0) -> int:
    """Hidden width of a gated layer with the cost of a plain one: two thirds, rounded up to a multiple of eight."""
    return 8 * math.ceil(int(width * ratio * 2 / 3) / 8)
