"""Benchmarks the cost of ``train.deterministic``: DINOv2's step with and without it, in turns, on the same weights and crops."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from pipeline.bench import pairs
from pipeline.bench.checkpoint import Options, make_method
from pipeline.methods.base import Step

NORMAL, STRICT = "normal", "deterministic"


def measure(options: Options, *, rounds: int, log: Callable[[str], None] = lambda _: None) -> dict[str, pairs.Case]:
    """Forward, backward and AdamW of a micro-batch; on a GPU the modes differ in cuDNN, cuBLAS and atomic additions."""
    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu")
    log("building the method")
    method, batch = make_method(options, device)
    method.to(device)
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=1e-4, fused=device.type == "cuda")
    before = torch.are_deterministic_algorithms_enabled()

    def act(strict: bool) -> None:
        torch.use_deterministic_algorithms(strict)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            terms = method(batch, Step(lr=1e-4, last_layer_lr=1e-4, momentum=0.99))
        torch.stack([term.float() for term in terms.values()]).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        method.on_step_skipped()

    log("measuring")
    try:
        return pairs.measure({NORMAL: partial(act, False), STRICT: partial(act, True)}, rounds=rounds, device=device)
    finally:
        torch.use_deterministic_algorithms(before)


def markdown(cases: dict[str, pairs.Case], options: Options, machine: dict[str, str], command: str) -> str:
    """Render the result page."""
    ratio = cases[STRICT].best / cases[NORMAL].best
    lines = ["# Cost of deterministic mode", "", f"`{command}`", "", *(f"- {key}: {value}" for key, value in machine.items())]
    lines += [f"- {options.model}, {options.batch} samples, 2 crops of {options.side} and 4 of half of it, {options.device}", ""]
    lines += [*pairs.table(cases, NORMAL), "", f"A deterministic step takes {ratio:.2f} times a normal one."]
    return "\n".join(lines) + "\n"
