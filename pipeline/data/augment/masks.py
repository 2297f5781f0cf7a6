"""Block masks for masked image modelling, keyed by sample, with exact counts.

The blocks are those of BEiT (arXiv 2106.08254): rectangles of random area and aspect ratio until the count is nearly reached. The
rest is filled with single patches, as in DINOv3, so that a global batch masks the same number of patches at every step.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from pipeline.data.augment.views import MaskSpec, PatchDropout
from pipeline.data.order.random import permutation, uniforms

MIN_AREA = 4.0
MAX_LOG_ASPECT = float(np.log(1 / 0.3))
ROUNDS = 16
_DRAWS = 4
_DEVIATIONS = 6
_MULTIPLE = 64  # sizes that suit a GPU


def mask_counts(crops: int, patches: int, spec: MaskSpec, *key: int) -> NDArray[np.int64]:
    """Returns how many patches to mask in each crop of a global batch.

    ``int(crops * probability)`` crops are masked; their ratios are spread evenly over ``spec.ratio`` and assigned at random.

    Args:
        crops: crops of the global batch, all views of the name together.
        patches: patches of a crop.
        spec: probability and ratios.
        key: integers that identify the draw, such as ``(seed, step, stream)``.

    Returns:
        ``[crops]`` int64; the sum depends only on ``crops``, ``patches`` and ``spec``.
    """
    masked = int(crops * spec.probability)
    edges = np.linspace(*spec.ratio, masked + 1)[1:]
    counts = np.zeros(crops, dtype=np.int64)
    counts[:masked] = (patches * edges).astype(np.int64)
    return counts[permutation(crops, *key)]


@cache
def mask_capacity(rows: int, crops: int, patches: int, spec: MaskSpec) -> tuple[int, int]:
    """Returns two numbers of masked patches that ``rows`` crops of a global batch do not exceed: with a probability of about
    1e-9, and never.

    The first is the mean of a sample without replacement plus six standard deviations; compiled code is given this many.

    Args:
        rows: crops of a micro-batch.
        crops, patches, spec: as for :func:`mask_counts`.
    """
    counts = np.sort(mask_counts(crops, patches, spec, 0))
    most = max(int(counts[crops - rows :].sum()), 1)
    deviation = float(counts.std()) * (rows * (crops - rows) / max(crops - 1, 1)) ** 0.5
    usual = rows * float(counts.mean()) + _DEVIATIONS * deviation
    return min(-int(-usual // _MULTIPLE) * _MULTIPLE, most), most


def kept_patches(
    ids: NDArray[np.uint64], epochs: NDArray[np.int64], patches: int, spec: PatchDropout, *key: int
) -> NDArray[np.int64]:
    """Draws the patches of each crop that are not dropped.

    Args:
        ids: ``[n]`` uint64 sample ids.
        epochs: ``[n]`` epoch of each sample.
        patches: patches of a crop.
        spec: the fraction to drop.
        key: integers that identify the draw, such as ``(seed, stream)``.

    Returns:
        int64 ``[n, kept]``, ascending. A row depends only on its own id and epoch and the key.
    """
    draws = uniforms(ids, patches, *key, epochs=epochs)
    return np.sort(draws.argsort(1, kind="stable")[:, : spec.kept(patches)], axis=1).astype(np.int64)


def block_masks(counts: NDArray[np.int64], height: int, width: int, ids: NDArray[np.uint64], *key: int) -> NDArray[np.bool_]:
    """Draws masks of exactly ``counts`` patches each, mostly in blocks.

    Args:
        counts: ``[n]`` patches to mask in each crop, 0 to ``height * width``.
        height: rows of the patch grid.
        width: columns of the patch grid.
        ids: ``[n]`` uint64 sample ids.
        key: integers that identify the draw, such as ``(seed, epoch, view)``.

    Returns:
        bool ``[n, height * width]``, true where masked. A row depends only on its own count and id and the key.
    """
    masks = np.zeros((len(counts), height, width), dtype=bool)
    counts = np.asarray(counts, dtype=np.int64)
    rows, columns = np.arange(height)[:, None], np.arange(width)[None, :]
    active = np.flatnonzero(counts > 0)
    if not len(active):
        return masks.reshape(len(counts), -1)
    draws = np.zeros((len(counts), ROUNDS, _DRAWS))
    draws[active] = uniforms(ids[active], ROUNDS * _DRAWS, *key, 0).reshape(len(active), ROUNDS, _DRAWS)
    missing = counts.copy()
    for attempt in range(ROUNDS):
        u = draws[active, attempt]
        budget = missing[active]
        least = np.minimum(MIN_AREA, budget)
        area = least + u[:, 0] * (budget - least)
        stretch = np.exp((u[:, 1] - 0.5) * MAX_LOG_ASPECT)
        tall = np.rint(np.sqrt(area) * stretch).astype(np.int64).clip(1, height)
        wide = np.rint(np.sqrt(area) / stretch).astype(np.int64).clip(1, width)
        top = (u[:, 2] * (height - tall + 1)).astype(np.int64)
        left = (u[:, 3] * (width - wide + 1)).astype(np.int64)
        d_rows, d_columns = rows[None] - top[:, None, None], columns[None] - left[:, None, None]
        block = ((d_rows >= 0) & (d_rows < tall[:, None, None])) & ((d_columns >= 0) & (d_columns < wide[:, None, None]))
        block &= ~masks[active]
        new = block.sum((1, 2))
        fits = new <= budget
        masks[active[fits]] |= block[fits]
        missing[active[fits]] -= new[fits]
        active = active[missing[active] > 0]
        if not len(active):
            break
    flat = masks.reshape(len(counts), -1)
    if len(active):
        order = np.where(flat[active], 2.0, uniforms(ids[active], height * width, *key, 1))
        rank = order.argsort(1, kind="stable").argsort(1, kind="stable")
        flat[active] |= rank < missing[active, None]
    return flat
