"""A method small enough to follow by hand, and what ranks do with it: imported by the tests and by the ranks themselves."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.data.augment.views import Batch
from pipeline.methods.base import Method, Step, kept
from pipeline.methods.ema_teacher import Teacher
from pipeline.models.groups import ParameterGroup

SAMPLES, WIDTH, CLASSES = 8, 12, 5
BETAS, EPS = (0.9, 0.95), 1e-8


class Toy(Method):
    """Two networks, a teacher of both, a memory, a frozen weight, buffers, and one parameter outside the networks.

    Sizes are odd, so that the ranks' pieces end inside parameters.
    """

    def __init__(self, seed: int = 0, hidden: int = 17) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.backbone = nn.Sequential(nn.Linear(WIDTH, hidden), nn.GELU(), nn.LayerNorm(hidden), nn.Linear(hidden, 7))
        self.backbone.register_buffer("steps", torch.zeros(2))
        self.head = nn.Linear(7, CLASSES, bias=False)
        self.scale = nn.Parameter(torch.ones(1))
        self.fixed = nn.Parameter(torch.randn(3), requires_grad=False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.teacher = Teacher(backbone=self.backbone, head=self.head)
        self.extra_state = {"center": torch.zeros(CLASSES)}
        self.means: list[Tensor] = []
        self.poison: str | None = None
        self.without_head = False

    def forward(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        images = batch.views["view"][0]
        features = self.backbone(images)
        terms = {"size": 0.1 * (self.scale * features).square().mean()}
        if not self.without_head:
            with torch.no_grad():
                logits = self.teacher.modules["head"](self.teacher.modules["backbone"](images))
                targets = ((logits - self.extra_state["center"]) / step.teacher_temperature).softmax(1)
                self.means.append(logits.mean(0))
            terms["dino"] = -(targets * F.log_softmax(self.head(features) / 0.1, dim=1)).sum(1).mean()
        if self.poison == "loss":
            terms["size"] = terms["size"] * float("nan")
        if self.poison == "term":
            terms["size"] = terms["size"] + float("inf")  # its slope is as it was
        if self.poison == "gradient":
            terms["size"] = terms["size"] + (features - features.detach()).abs().sqrt().sum()  # 0, and its slope is infinite
        self.metrics = {"norm": features.detach().norm()}
        return terms

    def after_step(self, step: Step, applied: Tensor | None = None) -> None:
        if self.means:
            mean = torch.stack(self.means).mean(0)
            if dist.is_initialized():
                dist.all_reduce(mean)
                mean /= dist.get_world_size()
            old = self.extra_state["center"]
            self.extra_state["center"] = kept(applied, old.mul(0.9).add_(mean, alpha=0.1), old)
            self.means.clear()
        self.seen += 1 if applied is None else applied
        self.backbone.steps += 1 if applied is None else applied
        super().after_step(step, applied)

    def on_step_skipped(self) -> None:
        self.means.clear()

    def networks(self) -> dict[str, nn.Module]:
        return {"backbone": self.backbone, "head": self.head}

    def parameter_groups(self) -> list[ParameterGroup]:
        def group(names: Iterable[str], lr: float, wd: float, last: bool) -> ParameterGroup:
            chosen = tuple(names)
            return ParameterGroup(tuple(self.get_parameter(name) for name in chosen), chosen, lr, wd, last)

        return [
            group(("backbone.0.weight",), 0.2, 1.0, False),
            group(("backbone.3.weight", "scale"), 1.0, 1.0, False),
            group(("backbone.0.bias", "backbone.2.weight", "backbone.2.bias", "backbone.3.bias"), 1.0, 0.0, False),
            group(("head.weight",), 1.0, 1.0, True),
        ]

    def export(self) -> dict[str, nn.Module]:
        return {"backbone": self.backbone}


class Aligned(Toy):
    """Of sizes whose pieces, in one group or in four, on one rank or two, are multiples of 32: a CPU's vector instructions then
    compute every element alike, as a GPU does anyway.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.backbone = nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 64))
        self.backbone.register_buffer("steps", torch.zeros(2))
        self.head = nn.Linear(64, 8, bias=False)
        self.scale = nn.Parameter(torch.ones(64))
        self.teacher = Teacher(backbone=self.backbone, head=self.head)
        self.extra_state = {"center": torch.zeros(8)}


def step_at(index: int) -> Step:
    """Schedules that change every step; the last layer stands still for two."""
    lr = 0.02 * (1 - index / 20)
    return Step(
        index=index,
        lr=lr,
        last_layer_lr=0.0 if index < 2 else lr,
        weight_decay=0.04 + 0.01 * index,
        momentum=0.9 + 0.005 * index,
        teacher_temperature=0.07,
    )


def batch_at(index: int, rows: slice = slice(None)) -> Batch:
    """The global batch of a step, or some of its rows."""
    images = torch.randn(SAMPLES, WIDTH, generator=torch.Generator().manual_seed(100 + index))[rows]
    return Batch(
        views={"view": [images]},
        labels=torch.full((len(images),), -1),
        keys=[str(n) for n in range(len(images))],
        ids=list(range(len(images))),
        position=index * SAMPLES,
    )


def by_torch(
    steps: int,
    *,
    clip: float | None,
    scope: str,
    skipped: frozenset[int] = frozenset(),
    headless: frozenset[int] = frozenset(),
    bf16: bool = False,
    optimizer_name: str = "adamw",
) -> dict[str, Any]:
    """What training is: one process, the whole batch, torch's own AdamW and clipping."""
    method = Toy()
    groups = method.parameter_groups()
    optimizer = _optimizer(optimizer_name, groups)
    history, norms = [], []
    for index in range(steps):
        step, method.without_head = step_at(index), index in headless
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            terms = method(batch_at(index), step)
        history.append({name: float(term.detach()) for name, term in terms.items()})
        optimizer.zero_grad(set_to_none=False)
        torch.stack([term.float() for term in terms.values()]).sum().backward()
        for p in method.parameters():
            if p.requires_grad and p.grad is None:
                p.grad = torch.zeros_like(p)
        parts = {name: list(module.parameters()) for name, module in method.networks().items()} | {"other": [method.scale]}
        norms.append({name: float(nn.utils.clip_grad_norm_(part, float("inf"))) for name, part in parts.items()})
        if index in skipped:
            method.on_step_skipped()
            continue
        if clip is not None:
            everything = [p for part in parts.values() for p in part]
            apart = {"network": list(parts.values()), "global": [everything], "parameter": [[p] for p in everything]}
            for clipped in apart[scope]:
                nn.utils.clip_grad_norm_(clipped, clip)
        for ours, group in zip(groups, optimizer.param_groups, strict=True):
            group["lr"] = (step.last_layer_lr if ours.last_layer else step.lr) * ours.lr_scale
            group["weight_decay"] = step.weight_decay * ours.wd_scale
        optimizer.step()
        method.after_step(step)
    return {"terms": history, "norms": norms, **state_of(method)}


def _optimizer(name: str, groups: list[ParameterGroup]) -> torch.optim.Optimizer:
    from pipeline.training.optimizers import Lamb, Lars, Segment

    if name == "adamw":
        return torch.optim.AdamW([{"params": g.params} for g in groups], betas=BETAS, eps=EPS, foreach=False)
    chosen = [{"params": g.params, "adapt": g.wd_scale > 0} for g in groups]
    optimizer = Lars(chosen) if name == "lars" else Lamb(chosen, betas=BETAS, eps=EPS)
    parameters = [p for g in groups for p in g.params]
    optimizer.segments = {id(p): [Segment(number, 0, p.numel())] for number, p in enumerate(parameters)}
    optimizer.parameters = len(parameters)
    return optimizer


def state_of(method: Toy) -> dict[str, Any]:
    """Copies of everything that a step moves, apart from the optimizer."""
    return {
        "weights": {name: p.detach().clone() for name, p in method.named_parameters()},
        "teacher": {name: t.clone() for name, t in method.teacher.state_dict().items()} if method.teacher else {},
        "memory": {name: t.clone() for name, t in method.extra_state.items()},
        "buffers": {name: t.clone() for name, t in method.named_buffers()},
    }


# ---- on the ranks ---------------------------------------------------------------------------------------------------------


def options(
    zero: Literal[0, 1, 2, 3] = 2,
    *,
    accumulation: int = 1,
    clip: float | None = None,
    scope: Literal["network", "global", "parameter"] = "network",
    precision: Literal["fp32", "bf16"] = "fp32",
    optimizer: Literal["adamw", "lamb", "lars", "sgd"] = "adamw",
    offload: Literal["none", "cpu"] = "none",
    init: Literal["deepspeed", "accelerate"] = "deepspeed",
    merge: bool = False,
    delay: bool = False,
) -> Any:
    from pipeline.training.engine import EngineOptions

    micro = SAMPLES // dist.get_world_size() // accumulation
    return EngineOptions(
        zero,
        precision,
        micro,
        accumulation,
        BETAS,
        EPS,
        clip,
        scope,
        optimizer,
        offload=offload,
        init=init,
        merge=merge,
        delay=delay,
    )


def build(seed: int = 0, kind: type[Toy] = Toy, **chosen: Any) -> tuple[Toy, Any]:
    """A method and the engine around it."""
    from pipeline.training.engine import Engine

    method = kind(seed)
    return method, Engine(method, options(**chosen), torch.device("cpu"))


def advance(method: Toy, engine: Any, index: int) -> dict[str, Any]:
    """One step as the trainer does it, on this rank's share."""
    share = SAMPLES // dist.get_world_size()
    micro, begin = engine.options.micro_batch, dist.get_rank() * share
    parts = [batch_at(index, slice(low, low + micro)) for low in range(begin, begin + share, micro)]
    step = step_at(index)
    each = [engine.forward_backward(part, step) for part in parts]
    terms = {name: torch.stack([terms[name] for terms in each]).mean() for name in each[0]}
    applied, norms = engine.step(step, torch.stack(list(terms.values())).isfinite().all())
    if applied.on_device is not None:
        method.after_step(step, applied.on_device)
    elif applied:
        method.after_step(step)
    else:
        method.on_step_skipped()
    return {
        "terms": {name: float(term) for name, term in terms.items()},
        "applied": bool(applied),
        "norms": {name: float(norm) for name, norm in norms.items()},
    }


def snapshot(method: Toy, engine: Any) -> dict[str, Any]:
    """Copies of all that this rank holds."""
    fragments = [
        replace(f, master=f.master.clone(), moments={name: m.clone() for name, m in f.moments.items()})
        for f in engine.fragments()
    ]
    with engine.gathered(teacher=True):
        state = state_of(method)
    return {"fragments": fragments, "adam": engine.optimizer_steps(), **state}


def assembled(ranks: list[dict[str, Any]], moment: str | None = None) -> dict[str, Tensor]:
    """Whole masters, or moments, out of all ranks' fragments; every element must come from exactly one."""
    whole: dict[str, Tensor] = {}
    times: dict[str, Tensor] = {}
    for rank in ranks:
        for f in rank["fragments"]:
            size = torch.Size(f.shape)
            flat, count = whole.setdefault(f.name, torch.zeros(size.numel())), times.setdefault(f.name, torch.zeros(size.numel()))
            piece = f.master if moment is None else f.moments[moment]
            flat[f.start : f.start + len(piece)] = piece
            count[f.start : f.start + len(piece)] += 1
    shapes = {f.name: f.shape for rank in ranks for f in rank["fragments"]}
    assert all(bool((count == 1).all()) for count in times.values()), "an element is owned by no rank or by several"
    return {name: flat.view(shapes[name]) for name, flat in whole.items()}
