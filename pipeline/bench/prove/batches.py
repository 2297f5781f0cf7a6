"""Random batches for any method's views."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from pipeline.data.augment.views import Batch, Boxes, Masks, TextSpec, ViewSpec

_COUNT = 1000  # of the vocabulary that are drawn; the last token of a caption is the end, the largest of all


def random_batch(views: Sequence[ViewSpec], samples: int, text: TextSpec | None, *, seed: int) -> Batch:
    """A batch of random pixels, tokens, masks and boxes on the CPU.

    Args:
        views: the method's views.
        samples: batch size.
        text: the method's captions, or ``None``.
        seed: of the values.
    """
    draw = torch.Generator().manual_seed(seed)
    images, masks, boxes = {}, {}, {}
    for view in views:
        images[view.name] = [torch.randn(samples, 3, *view.shape, generator=draw) for _ in range(view.count)]
        if view.mask is not None:
            rows, patches = samples * view.count, math.prod(view.grid(view.mask.patch))
            grid = torch.zeros(rows, patches, dtype=torch.bool)
            hidden = max(int(patches * sum(view.mask.ratio) / 2), 1)
            for row in range(0, rows, 2):  # half of the rows are masked
                grid[row, torch.randperm(patches, generator=draw)[:hidden]] = True
            weight = (1.0 / grid.sum(1, keepdim=True).clamp(min=1)).expand(grid.shape)[grid]
            masks[view.name] = Masks(grid, grid.flatten().nonzero().flatten(), weight)
        if view.boxes:
            corners = [torch.tensor([[0.0, 0.0, *view.shape]] * samples) for _ in range(view.count)]
            boxes[view.name] = Boxes(corners, [torch.zeros(samples, dtype=torch.bool) for _ in range(view.count)])
    tokens = None
    if text is not None:
        from pipeline.data.loader.text import tokenizer

        captions = [f"an image of {torch.randint(_COUNT, (1,), generator=draw).item()} things" for _ in range(samples)]
        tokens = torch.from_numpy(tokenizer(text)(captions))
    return Batch(
        views=images,
        labels=torch.zeros(samples, dtype=torch.int64),
        keys=[str(n) for n in range(samples)],
        ids=list(range(samples)),
        position=0,
        masks=masks,
        tokens=tokens,
        captions=[""] * samples if text is not None else None,
        boxes=boxes,
        id_tensor=torch.arange(samples),
        text_ends=None if tokens is None else tokens.argmax(1).tolist(),
    )


def moved(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on a device."""
    return replace(
        batch,
        views={name: [view.to(device) for view in group] for name, group in batch.views.items()},
        labels=batch.labels.to(device),
        masks={n: Masks(m.grid.to(device), m.index.to(device), m.weight.to(device)) for n, m in batch.masks.items()},
        tokens=None if batch.tokens is None else batch.tokens.to(device),
        id_tensor=None if batch.id_tensor is None else batch.id_tensor.to(device),
        boxes={n: Boxes([c.to(device) for c in b.corners], [f.to(device) for f in b.flipped]) for n, b in batch.boxes.items()},
    )
