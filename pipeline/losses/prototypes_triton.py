"""Triton kernels for the elementwise part of Sinkhorn and of the prototype cross-entropy, in place on unscaled logits.

In plain torch each element of a chunk of logits is copied to fp32 and then read and written a dozen times. Here one program
handles a row, block by block: it computes the row's log-sum-exp online, reads the row once more together with its targets, and
overwrites the logits with the gradient in their own dtype; all sums are in fp32. A patch's bf16 logit and its teacher's take
10 bytes of memory traffic together (five accesses of two bytes), 4 more per Sinkhorn iteration, and no tensor of their size is
allocated.

The kernels contain no autograd and no matrix products; :mod:`pipeline.losses.prototypes` multiplies. They use no atomics: a
sum over columns is computed by the row's program, a sum over rows by the columns' program, so equal inputs give bitwise equal
results.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 4096, 16  # columns of a row per block: 16 bytes of bf16 per thread
TILE_ROWS, TILE_COLUMNS = (
    32,
    64,
)  # tile of a sum over rows: one cache line of bf16 wide, so that there are enough programs for a whole GPU


class FusedTargets:
    """A chunk of the teacher's logits as targets, whose softmax is never materialized.

    Args:
        logits: ``[target views, rows, K]``, unscaled: bf16, fp16 or fp32.
        potential: ``[K]``, added to the logits divided by the temperature.
        temperature: the teacher's temperature.
        watch: whether to compute health statistics.

    Attributes:
        entropy: scalar fp32, sum of the targets' entropies in nats; ``None`` if not watched.
        target_sum: ``[K]`` fp32, the sum of all targets; ``None`` if not watched.
    """

    def __init__(self, logits: Tensor, potential: Tensor, temperature: float, *, watch: bool = False) -> None:
        self._logits = logits.contiguous()
        self._potential = potential.to(torch.float32).contiguous()
        self._scale = 1.0 / temperature
        self.entropy: Tensor | None = None
        self.target_sum: Tensor | None = None
        self._norm = torch.empty(logits.shape[:2], dtype=torch.float32, device=logits.device)
        _norms(self._logits, self._potential, self._scale, self._norm)
        if watch:
            self.entropy, self.target_sum = self._health()

    def _health(self) -> tuple[Tensor, Tensor]:
        views, rows, prototypes = self._logits.shape
        programs = triton.cdiv(prototypes, TILE_COLUMNS)
        target_sum = self._norm.new_empty(prototypes)
        entropy = self._norm.new_empty(programs)
        with _on(target_sum):
            column_sums[(programs,)](
                self._logits,
                self._potential,
                self._norm,
                target_sum,
                entropy,
                views * rows,
                prototypes,
                self._scale,
                ROWS=TILE_ROWS,
                COLUMNS=TILE_COLUMNS,
            )
        return entropy.sum(), target_sum

    def cross_entropy(
        self,
        logits: Tensor,
        target_weights: tuple[float, ...],
        weight: Tensor,
        temperature: float,
        *,
        needs_gradient: bool,
        watch: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Cross-entropy of the student's logits with a mixture of the targets.

        Args:
            logits: ``[views, rows, K]``, unscaled; overwritten by the gradient if ``needs_gradient``.
            target_weights: weight of each target view.
            weight: ``[rows]`` fp32.
            temperature: the student's temperature.
            needs_gradient: whether to compute the gradient.
            watch: whether to compute the agreement.

        Returns:
            The weighted sum of the cross-entropies, fp32; the number of rows with the same top-1 prototype; the gradient with
            respect to the unscaled logits, in their dtype and memory.
        """
        views, rows, prototypes = logits.shape
        if not logits.is_contiguous():
            logits = logits.contiguous()
        row_losses = torch.empty(rows, views, dtype=torch.float32, device=logits.device)
        top1_agreements = torch.empty(rows, views, dtype=torch.int32, device=logits.device) if watch else None
        if row_losses.numel():
            with _on(logits):
                cross_entropy_rows[(rows * views,)](
                    logits,
                    self._logits,
                    self._potential,
                    self._norm,
                    weight.contiguous(),
                    row_losses,
                    row_losses if top1_agreements is None else top1_agreements,
                    rows,
                    views,
                    prototypes,
                    1.0 / temperature,
                    self._scale,
                    TARGET_WEIGHTS=tuple(map(float, target_weights)),
                    NEEDS_GRADIENT=needs_gradient,
                    WATCHED=watch,
                    BLOCK=_block(prototypes),
                    num_warps=WARPS,
                )
        agreements = None if top1_agreements is None else top1_agreements.sum()
        return row_losses.sum(), agreements, logits if needs_gradient else None


def take_in(logits: Tensor, temperature: float, potential: Tensor | None, peak: Tensor, total: Tensor) -> None:
    """Adds rows to the running log-sum-exps of all columns, ``log(total) + peak``, for an iteration of Sinkhorn.

    Args:
        logits: ``[rows, K]``, unscaled: bf16, fp16 or fp32.
        temperature: divides the logits.
        potential: ``[K]`` fp32, with which each row is first normalized to sum to one; ``None`` for no normalization.
        peak: ``[K]`` fp32, updated in place; initially minus infinity.
        total: ``[K]`` fp32, updated in place; initially zero.
    """
    rows, prototypes = logits.shape
    logits = logits.contiguous()
    norm = peak.new_empty(rows if potential is not None else 1)
    if potential is not None:
        _norms(logits, potential, 1.0 / temperature, norm)
    with _on(logits):
        column_norms[(triton.cdiv(prototypes, TILE_COLUMNS),)](
            logits,
            norm,
            peak,
            total,
            rows,
            prototypes,
            1.0 / temperature,
            NORMED=potential is not None,
            ROWS=TILE_ROWS,
            COLUMNS=TILE_COLUMNS,
        )


def _norms(logits: Tensor, potential: Tensor, scale: float, norm: Tensor) -> None:
    prototypes = logits.shape[-1]
    if norm.numel():
        with _on(logits):
            row_norms[(norm.numel(),)](logits, potential, norm, prototypes, scale, BLOCK=_block(prototypes), num_warps=WARPS)


@triton.jit
def row_norms(
    logits: tl.tensor, potential: tl.tensor, norm: tl.tensor, prototypes: int, scale: float, BLOCK: tl.constexpr
) -> None:
    """``norm[row] = logsumexp(logits[row] * scale + potential)``; one program per row."""
    row = tl.program_id(0).to(tl.int64)
    tl.store(norm + row, _row_norm(logits + row * prototypes, potential, prototypes, scale, True, BLOCK))


@triton.jit(do_not_specialize=["rows"])
def column_sums(
    logits: tl.tensor,
    potential: tl.tensor,
    norm: tl.tensor,
    target_sum: tl.tensor,
    entropy: tl.tensor,
    rows: int,
    prototypes: int,
    scale: float,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """``target_sum[k] = sum over rows of target``, and partial sums of ``-sum target * log target``.

    One program per group of columns.
    """
    program = tl.program_id(0)
    column = program * COLUMNS + tl.arange(0, COLUMNS)
    within = column < prototypes
    shift = tl.load(potential + column, mask=within, other=0.0)
    total = tl.zeros([COLUMNS], tl.float32)
    spread = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & within[None, :]
        offset = row.to(tl.int64)[:, None] * prototypes + column[None, :]
        x = tl.load(logits + offset, mask=inside, other=0.0).to(tl.float32) * scale + shift[None, :]
        x = x - tl.load(norm + row, mask=row < rows, other=0.0)[:, None]
        target = tl.where(inside, tl.exp(x), 0.0)
        total += tl.sum(target, 0)
        spread += tl.sum(target * x, 0)
    tl.store(target_sum + column, total, mask=within)
    tl.store(entropy + program, -tl.sum(spread, 0))


@triton.jit(do_not_specialize=["rows"])
def column_norms(
    logits: tl.tensor,
    norm: tl.tensor,
    peak: tl.tensor,
    total: tl.tensor,
    rows: int,
    prototypes: int,
    scale: float,
    NORMED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Adds ``logits * scale - norm`` of all rows to the columns' running log-sum-exps; one program per group of columns."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    within = column < prototypes
    highest = tl.full([ROWS, COLUMNS], -1e30, tl.float32)
    amount = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & within[None, :]
        offset = row.to(tl.int64)[:, None] * prototypes + column[None, :]
        x = tl.load(logits + offset, mask=inside, other=0.0).to(tl.float32) * scale
        if NORMED:
            x = x - tl.load(norm + row, mask=row < rows, other=0.0)[:, None]
        highest, amount = _taken_in(highest, amount, tl.where(inside, x, float("-inf")))
    before = tl.load(peak + column, mask=within, other=0.0)
    after = tl.maximum(before, tl.max(highest, 0))
    more = tl.sum(amount * tl.exp(highest - after[None, :]), 0)
    tl.store(total + column, tl.load(total + column, mask=within, other=0.0) * tl.exp(before - after) + more, mask=within)
    tl.store(peak + column, after, mask=within)


@triton.jit(do_not_specialize=["rows", "views"])
def cross_entropy_rows(
    student: tl.tensor,
    teacher: tl.tensor,
    potential: tl.tensor,
    norm: tl.tensor,
    weight: tl.tensor,
    row_losses: tl.tensor,
    top1_agreements: tl.tensor,
    rows: int,
    views: int,
    prototypes: int,
    scale: float,
    teacher_scale: float,
    TARGET_WEIGHTS: tl.constexpr,
    NEEDS_GRADIENT: tl.constexpr,
    WATCHED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Loss of one row of one view against its targets, and its gradient in place of the logits; one program per row.

    The views of a sample are adjacent, so that views with the same targets find them in the cache.
    """
    program = tl.program_id(0).to(tl.int64)
    row, view = program // views, program % views
    student_row = student + (view * rows + row) * prototypes
    columns = tl.arange(0, BLOCK)
    own_norm = _row_norm(student_row, potential, prototypes, scale, False, BLOCK)
    share = tl.load(weight + row)
    weight_sum = 0.0
    for i in tl.static_range(len(TARGET_WEIGHTS)):
        weight_sum += TARGET_WEIGHTS[i]

    product = tl.zeros([BLOCK], tl.float32)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    best_target = tl.full([BLOCK], float("-inf"), tl.float32)
    choice = tl.zeros([BLOCK], tl.int32)
    choice_target = tl.zeros([BLOCK], tl.int32)
    for start in range(0, prototypes, BLOCK):
        column = start + columns
        inside = column < prototypes
        x = tl.load(student_row + column, mask=inside, other=0.0).to(tl.float32) * scale
        shift = tl.load(potential + column, mask=inside, other=0.0)
        target = tl.zeros([BLOCK], tl.float32)
        for i in tl.static_range(len(TARGET_WEIGHTS)):
            if TARGET_WEIGHTS[i] != 0.0:
                target_row = i * rows + row
                soft_target = tl.load(teacher + target_row * prototypes + column, mask=inside, other=0.0).to(tl.float32)
                target += tl.exp(soft_target * teacher_scale + shift - tl.load(norm + target_row)) * TARGET_WEIGHTS[i]
        target = tl.where(inside, target, 0.0)
        product += target * x
        if WATCHED:
            x_inside = tl.where(inside, x, float("-inf"))
            choice = tl.where(x_inside > best, column, choice)
            best = tl.maximum(best, x_inside)
            target_inside = tl.where(inside, target, float("-inf"))
            choice_target = tl.where(target_inside > best_target, column, choice_target)
            best_target = tl.maximum(best_target, target_inside)
        if NEEDS_GRADIENT:
            # d loss / d logits = weight * scale * (sum(target) * softmax(logits * scale) - target)
            gradient = (tl.exp(x - own_norm) * weight_sum - target) * (share * scale)
            tl.store(student_row + column, gradient.to(student.dtype.element_ty), mask=inside)
    index = row * views + view
    tl.store(row_losses + index, (weight_sum * own_norm - tl.sum(product, 0)) * share)
    if WATCHED:
        same = _first(best, choice, prototypes) == _first(best_target, choice_target, prototypes)
        tl.store(top1_agreements + index, same.to(tl.int32))


@triton.jit
def _taken_in(peak: tl.tensor, total: tl.tensor, x: tl.tensor) -> tl.tensor:
    """Adds an element to each running log-sum-exp with one exponential: either the old sum or the new element is scaled down."""
    shrunk = tl.exp(-tl.abs(x - peak))
    higher = x > peak
    return tl.where(higher, x, peak), tl.where(higher, total * shrunk + 1.0, total + shrunk)


@triton.jit
def _row_norm(
    row: tl.tensor, potential: tl.tensor, prototypes: int, scale: float, SHIFTED: tl.constexpr, BLOCK: tl.constexpr
) -> tl.tensor:
    """``logsumexp(row * scale + potential)`` of a row, computed online block by block."""
    peak = tl.full([BLOCK], -1e30, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, prototypes, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < prototypes
        x = tl.load(row + column, mask=inside, other=0.0).to(tl.float32) * scale
        if SHIFTED:
            x = x + tl.load(potential + column, mask=inside, other=0.0)
        peak, total = _taken_in(peak, total, tl.where(inside, x, float("-inf")))
    return _closed(peak, total)


@triton.jit
def _closed(peak: tl.tensor, total: tl.tensor) -> tl.tensor:
    """Combines all running log-sum-exps into one."""
    highest = tl.max(peak, 0)
    return highest + tl.log(tl.sum(total * tl.exp(peak - highest), 0))


@triton.jit
def _first(best: tl.tensor, choice: tl.tensor, prototypes: int) -> tl.tensor:
    """The lowest column with the maximum value."""
    return tl.min(tl.where(best == tl.max(best, 0), choice, prototypes), 0)


def _block(prototypes: int) -> int:
    return min(BLOCK, triton.next_power_of_2(prototypes))


def _on(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's device current, since Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
