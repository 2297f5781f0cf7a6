"""Every registered method, small: settings, a batch of whatever it asks for, and what ranks do with it.

A method is tested by being registered; what it needs besides ``COMMON`` to be small stands in ``TINY``.
"""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import yaml
from torch import Tensor

from pipeline import losses
from pipeline.config.load import load
from pipeline.config.schema import METHODS, Config
from pipeline.data.augment.masks import block_masks, kept_patches, mask_counts
from pipeline.data.augment.views import Batch, Boxes, Masks
from pipeline.methods.base import Method, Step
from pipeline.methods.registry import build_method

SAMPLES, CONTEXT, SIDE, LOCAL, PATCH = 8, 7, 16, 8, 4
VIEWS = {"global_size": SIDE, "local_size": LOCAL}
PROTOTYPES = {"prototypes": 24, "head_hidden": 16, "head_bottleneck": 8, "views": {**VIEWS, "local_count": 2}}
TEXT = {
    "views": {"global_size": SIDE},
    "text": {"architecture": None, "width": 16, "depth": 1, "num_heads": 2, "context_length": CONTEXT},
}
MODEL = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": PATCH, "layer_scale": None}

TINY: dict[str, dict[str, Any]] = {
    "byol": {"views": VIEWS, "head_hidden": 24, "head_out": 8},
    "clip": {**TEXT, "embed_dim": 12},
    "coca": {**TEXT, "embed_dim": 12, "decoder_depth": 1, "caption_queries": 3},
    "detailclip": {**TEXT, "embed_dim": 12, "prototypes": 24, "head_hidden": 16, "head_bottleneck": 8, "decoder_heads": 2},
    "dino": {**PROTOTYPES, "local_repulsion": {"noise": 0.0, "hidden": 12}},
    "dinov2": {**PROTOTYPES, "koleo_group_size": 2},
    "distill": {**PROTOTYPES, "koleo_group_size": 2, "teacher_model": {**MODEL, "embed_dim": 24}, "teacher_weights": "none"},
    "lejepa": {"views": {**VIEWS, "local_count": 2}, "head_hidden": 24, "head_out": 8, "slices": 32},
    "mocov2": {"views": {**VIEWS, "local_count": 2}, "queue": 21, "head_out": 8, "local_repulsion": {"noise": 0.0, "hidden": 12}},
    "mocov3": {"views": VIEWS, "head_hidden": 24, "head_out": 8, "freeze_patches": True, "pos_embed": "sincos"},
    "simclr": {"views": VIEWS, "head_out": 8},
    "simvlm": TEXT,
}


def config(name: str, **changes: Any) -> Config:
    """The settings of a method, through the same checks as a person's."""
    assert name in TINY or name not in METHODS, f"give the method {name!r} small settings in {__name__}.TINY"
    tree = {
        "method": {"name": name, **TINY[name], **changes.pop("method", {})},
        "model": MODEL,
        "data": {"shards": "none.tar"},
        "optim": {"lr_scaling": {"rule": "none"}},
        "schedule": {"lr": {"peak": 3e-3}},
        "train": {"global_batch_size": SAMPLES, "precision": "fp32"},
        **changes,
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny.yaml"
        path.write_text(yaml.safe_dump(tree))
        return load(str(path)).config


def make_method(name: str, seed: int = 0, **changes: Any) -> Method:
    """The method; its student is not quite its teacher, and what it remembers is not zero."""
    torch.manual_seed(seed)
    made = build_method(config(name, **changes))
    with torch.no_grad():
        for p in made.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
        made.extra_state = {key: value + 0.1 * torch.randn_like(value) for key, value in made.extra_state.items()}
        if made.guidance is not None:
            for key, sums in made.guidance.initial_state().items():
                features = F.normalize(torch.randn(12 * len(sums), sums.shape[1] - 1), dim=1)
                made.extra_state[key] = losses.value_sums(features, torch.arange(len(features)) % len(sums), len(sums))
    return made


def batch_at(made: Method, index: int, rows: slice = slice(None), samples: int = SAMPLES) -> Batch:
    """The global batch of a step as the method asks for it, or some of its rows."""
    numbers = list(range(samples))[rows]
    views, masks, boxes, kept = {}, {}, {}, {}
    for spec in made.views:
        # A view is a scene of its picture: otherwise there is nothing to be learnt.
        common = _noise(f"{index}", samples, 3, spec.size, spec.size)
        whole = [common + 0.3 * _noise(f"{index} {spec.name} {i}", samples, 3, spec.size, spec.size) for i in range(spec.count)]
        views[spec.name] = [view[rows] for view in whole]
        if spec.boxes:
            corners = torch.tensor([0.0, 0.0, spec.size, spec.size]).expand(len(numbers), 4)
            boxes[spec.name] = Boxes([corners] * spec.count, [torch.zeros(len(numbers), dtype=torch.bool)] * spec.count)
        if spec.dropout is not None:
            ids = np.array([index * samples + n for n in numbers], dtype=np.uint64)
            epochs, patches = np.zeros(len(ids), dtype=np.int64), (spec.size // spec.dropout.patch) ** 2
            each = [kept_patches(ids, epochs, patches, spec.dropout, 1, view) for view in range(spec.count)]
            kept[spec.name] = torch.from_numpy(np.concatenate(each))
        if spec.mask is not None:
            masks[spec.name] = _masks(spec.mask, spec.count, spec.size // spec.mask.patch, samples, index, rows)
    return Batch(
        views=views,
        masks=masks,
        boxes=boxes,
        kept=kept,
        labels=torch.full((len(numbers),), -1),
        keys=[str(n) for n in numbers],
        ids=[index * samples + n for n in numbers],
        position=index * samples,
        tokens=_captions(samples, index)[rows] if made.text is not None else None,
        seed=1000 * index + numbers[0],
        columns=_columns(made, index, samples, rows),
    )


def _columns(made: Method, index: int, samples: int, rows: slice) -> dict[str, Tensor]:
    """Numbers of values, every fifth of them missing."""
    if made.guidance is None:
        return {}
    numbers = index * samples + torch.arange(samples)
    whole = {c.name: (numbers * (3 + i)) % len(c.values) for i, c in enumerate(made.guidance.settings.columns)}
    return {name: torch.where(numbers % 5 == 4, -1, own)[rows] for name, own in whole.items()}


def _noise(name: str, *size: int) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def _masks(spec: Any, count: int, side: int, samples: int, index: int, rows: slice) -> Masks:
    grid = block_masks(
        mask_counts(count * samples, side * side, spec, index), side, side, np.arange(count * samples, dtype=np.uint64), index, 1
    )
    hidden = torch.from_numpy(grid).unflatten(0, (count, samples))[:, rows].flatten(0, 1)
    weight = (1.0 / hidden.sum(1, keepdim=True).clamp(min=1)).expand(hidden.shape)[hidden]
    return Masks(hidden, hidden.flatten().nonzero().flatten(), weight)


def _captions(samples: int, index: int) -> Tensor:
    """Start, two to five words, end, padding."""
    tokens = torch.randint(300, 312, (samples, CONTEXT), generator=torch.Generator().manual_seed(index))
    tokens[:, 0] = 49406
    for row, end in enumerate(3 + (torch.arange(samples) * 2) % 4):
        tokens[row, end], tokens[row, end + 1 :] = 49407, 0
    return tokens


STEP = Step(lr=3e-3, last_layer_lr=3e-3, weight_decay=0.05, momentum=0.9, teacher_temperature=0.05)


def engine_of(made: Method, zero: Literal[0, 1, 2, 3], accumulation: int = 1, **chosen: Any) -> Any:
    from pipeline.training.engine import Engine, EngineOptions

    micro = SAMPLES // dist.get_world_size() // accumulation
    # A large eps: rounding in a gradient of zero is not blown up.
    options = EngineOptions(zero, "fp32", micro, accumulation, (0.9, 0.95), 1e-3, None, "global", **chosen)
    return Engine(made, options, torch.device("cpu"))


def advance(made: Method, engine: Any, index: int, accumulation: int = 1, finite: bool = True) -> dict[str, Tensor]:
    """One step as the trainer does it, on this rank's share."""
    share = SAMPLES // dist.get_world_size()
    micro, begin = share // accumulation, dist.get_rank() * share
    parts = [batch_at(made, index, slice(low, low + micro)) for low in range(begin, begin + share, micro)]
    step = replace(STEP, index=index)
    engine.before_accumulation(parts, step)
    each = [engine.forward_backward(part, step) for part in parts]
    applied, _ = engine.step(step, torch.tensor(finite))
    if applied.on_device is not None:
        made.after_step(step, applied.on_device)
    elif applied:
        made.after_step(step)
    else:
        made.on_step_skipped()
    assert bool(applied) == finite
    return {name: torch.stack([one[name] for one in each]).mean() for name in each[0]}


def state(made: Method, engine: Any) -> dict[str, Tensor]:
    """Copies of all that a step moves, whole."""
    with engine.gathered(teacher=True):
        found = {f"student {name}": p.detach().clone() for name, p in made.named_parameters()}
        found |= {f"buffer {name}": b.clone() for name, b in made.named_buffers()}
        if made.teacher is not None:
            found |= {f"teacher {name}": t.clone() for name, t in made.teacher.state_dict().items()}
    return found | {f"memory {name}": t.clone() for name, t in made.extra_state.items()}


def gradients(engine: Any) -> list[tuple[str, int, tuple[int, ...], Tensor]]:
    """This rank's pieces."""
    return [(f.name, f.start, f.shape, f.gradient.flatten().clone()) for _, f in engine.layout.owned(gradients=True)]


def first_steps(name: str, zero: Literal[0, 1, 2, 3], accumulation: int = 1, steps: int = 2, **changes: Any) -> dict[str, Any]:
    """On a rank: terms and gradients of the first step, and what there is after some."""
    made = make_method(name, **changes)
    engine = engine_of(made, zero, accumulation)
    found: dict[str, Any] = {}
    original = engine.step

    def watched(step: Step, finite: Tensor) -> Any:
        found.setdefault("gradients", gradients(engine))
        return original(step, finite)

    engine.step = watched
    terms = [advance(made, engine, index, accumulation) for index in range(steps)]
    found |= {"terms": terms[0], "state": state(made, engine)}
    engine.close()
    return found


def interrupted(
    name: str,
    zero: Literal[0, 1, 2, 3],
    directory: str,
    *,
    load_at: int | None,
    until: int,
    save_at: int | None,
    seed: int,
    merge: bool = False,
    **changes: Any,
) -> dict[str, Any]:
    """On a rank: steps from a checkpoint, or from the beginning."""
    from pipeline.checkpoint import files as saved
    from pipeline.checkpoint import reader
    from pipeline.checkpoint import writer as checkpoint

    made = make_method(name, seed, **changes)
    engine = engine_of(made, zero, merge=merge)
    folder = Path(directory)
    if load_at is not None:
        reader.load(saved.read(folder / f"step_{load_at:09d}"), engine, made)
    for index in range(load_at or 0, until):
        advance(made, engine, index)
        if index + 1 == save_at:
            facts = {"data": {}, "config": {}, "scores": {}, "step": save_at, "applied": save_at, "skipped": 0}
            checkpoint.Checkpoints(folder, keep_last=9).save(engine, made, facts)
    found = state(made, engine)
    found |= {f"moment {f.name} {kind}": m.clone() for f in engine.fragments() for kind, m in f.moments.items()}
    engine.close()
    return found
