"""Benchmarks prototype heads, Sinkhorn and losses: in chunks, as in training, against the plain formulas with full logits.

Where training uses the Triton kernels, the same chunks in plain torch are a third case.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline import losses
from pipeline.bench import pairs
from pipeline.models.heads import PrototypeHead

OURS, UNFUSED, PLAIN = "chunked", "chunked, plain torch", "full logits"


@dataclass(frozen=True)
class Options:
    """Options of the benchmark.

    Attributes:
        prototypes, width, hidden, bottleneck: of the head.
        samples: per micro-batch; two global and eight local crops each.
        masked: masked patches in total.
        rows: rows of logits per chunk; ``None`` for the default.
        rounds: measured rounds.
        device: ``cpu`` or ``cuda``.
        bf16: whether products are computed in bf16, by autocast.
    """

    prototypes: int = 65536
    width: int = 384
    hidden: int = 512
    bottleneck: int = 256
    samples: int = 16
    masked: int = 600
    rows: int | None = None
    rounds: int = 3
    device: str = "cpu"
    bf16: bool = False


@dataclass(frozen=True)
class Result:
    """Results.

    Attributes:
        cases: by name, see :data:`OURS`, :data:`UNFUSED` and :data:`PLAIN`.
        kernels: of the first.
        apart: largest relative difference of a loss from that with full logits.
        gradient_difference: largest difference of a gradient from that with full logits, relative to the largest gradient.
    """

    cases: dict[str, pairs.Case]
    kernels: str
    apart: float
    gradient_difference: float


def measure(options: Options, *, log: Callable[[str], None] = lambda _: None) -> Result:
    """Compare results first, then times and memory: a faster step with wrong results does not count."""
    device = torch.device(options.device)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden": options.hidden, "bottleneck": options.bottleneck, "prototypes": options.prototypes}
    head, teacher = (PrototypeHead(options.width, **sizes).to(device) for _ in range(2))
    teacher.requires_grad_(False)
    n = options.samples
    cls = torch.randn(10 * n, options.width, device=device)
    patches = torch.randn(options.masked, options.width, device=device)
    weight = torch.full((options.masked,), 1.0 / options.masked, device=device)
    arguments = (head, teacher, cls, patches, weight, n)
    kernels = losses.kernels_for(device)
    acts: dict[str, Callable[[], Tensor]] = {OURS: partial(_pieces, *arguments, options.rows, kernels)}
    if kernels == "triton":
        acts[UNFUSED] = partial(_pieces, *arguments, options.rows, "torch")
    acts[PLAIN] = partial(_plain, *arguments)

    def stepped(act: Callable[[], Tensor]) -> tuple[float, list[Tensor]]:
        head.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
            value = act()
        value.backward()
        return float(value.detach()), [p.grad for p in head.parameters() if p.grad is not None]

    log("comparing results")
    plain, gradients = stepped(acts[PLAIN])
    largest = max(float(gradient.abs().max()) for gradient in gradients)
    apart = gradient_difference = 0.0
    for name in acts.keys() - {PLAIN}:
        value, others = stepped(acts[name])
        apart = max(apart, abs(value / plain - 1))
        gradient_difference = max(
            gradient_difference, *(float((a - b).abs().max()) / largest for a, b in zip(others, gradients, strict=True))
        )
        del others
    del gradients
    log("measuring")
    steps = {name: partial(stepped, act) for name, act in acts.items()}
    return Result(pairs.measure(steps, rounds=options.rounds, device=device), kernels, apart, gradient_difference)


def _pieces(
    head: PrototypeHead,
    teacher: PrototypeHead,
    cls: Tensor,
    patches: Tensor,
    weight: Tensor,
    n: int,
    rows: int | None,
    kernels: losses.Kernels,
) -> Tensor:
    with torch.no_grad():
        units = (teacher.units(cls[: 2 * n]), teacher.units(patches))
        matrix = teacher.matrix(units[0].dtype)
        chunks = [losses.logit_chunks([unit], matrix, 0.05, rows, kernels=kernels) for unit in units]
        potentials = [losses.potential_over_chunks(logits, cls.new_zeros(len(matrix))) for logits in chunks]
    dino = losses.Targets(units[0].unflatten(0, (2, n)), matrix, potentials[0], 0.05)
    ibot = losses.Targets(units[1][None], matrix, potentials[1], 0.05)
    pairings, each = losses.multi_crop_pairings(8), cls.new_full((n,), 1 / (18 * n))
    cross_entropy = partial(losses.prototype_cross_entropy, temperature=0.1, rows=rows, kernels=kernels)

    def crops(unit: Tensor, prototypes: Tensor) -> Tensor:
        return cross_entropy(unit.unflatten(0, (10, n)), prototypes, dino, pairings, each)[0]

    def masked(unit: Tensor, prototypes: Tensor) -> Tensor:
        return cross_entropy(unit[None], prototypes, ibot, losses.SAME_VIEW, weight)[0]

    return head(cls, crops).sum() + head(patches, masked).sum()


def _plain(head: PrototypeHead, teacher: PrototypeHead, cls: Tensor, patches: Tensor, weight: Tensor, n: int) -> Tensor:
    with torch.no_grad():
        dino, ibot = losses.sinkhorn(teacher(cls[: 2 * n]), 0.05), losses.sinkhorn(teacher(patches), 0.05)
    logits = head(cls).unflatten(0, (10, n))
    local, glob = losses.multi_crop(logits[:2], logits[2:], dino.unflatten(0, (2, n)))
    patch = -(ibot * F.log_softmax(head(patches) / 0.1, dim=-1)).sum(-1) @ weight
    return local + glob + patch


def markdown(result: Result, options: Options, machine: dict[str, str], command: str) -> str:
    """Render the result page."""
    lines = ["# Prototype heads, Sinkhorn and losses", "", f"`{command}`", ""]
    lines += [f"- {name}: {value}" for name, value in machine.items()]
    lines += [
        f"- {options.prototypes} prototypes, {10 * options.samples} crops, {options.masked} masked patches, forward and backward",
        f"- products in {'bf16' if options.bf16 else 'fp32'}; chunked: {result.kernels} kernels between them",
        f"- losses differ by {result.apart:.1e}, gradients by {result.gradient_difference:.1e} of the largest",
        "",
        *pairs.table(result.cases, PLAIN),
    ]
    return "\n".join(lines) + "\n"
