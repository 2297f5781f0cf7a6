"""Trains every method for three steps; compares its bf16 loss with the CPU's fp32 loss and counts host synchronizations."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from pipeline.bench.plain import alone
from pipeline.bench.prove.batches import moved, random_batch
from pipeline.bench.prove.stage import Check, Setup, at_most
from pipeline.config.load import load
from pipeline.config.schema import Config
from pipeline.data.augment.views import Batch
from pipeline.methods.base import Method, Step
from pipeline.methods.registry import build_seeded_method
from pipeline.training.build import engine_options

CONFIGS = {
    "byol": "byol/resnet50",
    "clip": "clip/vit_b16_cc12m",
    "siglip": "clip/siglip_b16",
    "coca": "coca/vit_b32",
    "detailclip": "detailclip/vit_b16_25ep",
    "dino": "dino/vit_s16",
    "dinov2": "dinov2/vitb16_node",
    "distill": "dinov2/distill_vits14",
    "lejepa": "lejepa/vit_s16",
    "mocov2": "mocov2/resnet50",
    "mocov3": "mocov3/vit_s16",
    "simclr": "simclr/resnet50",
    "simvlm": "simvlm/scenes",
}
_TOY = ("model.depth=1", "model.embed_dim=32", "model.num_heads=2", "model.drop_path=0", "model.patch_size=8")
_TOY_VIEWS = {"global_size": 32, "local_size": 16, "size": 32}
_LOSS = 1e-2  # relative
_STEP = Step(lr=1e-4, last_layer_lr=1e-4, momentum=0.99)


def checks(setup: Setup) -> Iterator[Check]:
    """The rows of each method; an error of one does not end the others."""
    device = torch.device(setup.device)
    with alone(setup.device):
        for name, config in CONFIGS.items():
            try:
                yield from _one(name, load(config, overrides_of(config, toy=setup.toy)).config, device)
            except Exception as error:
                message = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
                yield Check(f"{name}: three steps", message[:200], "taken", False)


def overrides_of(config: str, *, toy: bool) -> list[str]:
    """Overrides that let a config's step run alone, without data; at toy size also those that make it small."""
    overrides = ["data.shards=none-*.tar", "train.zero_stage=1", "train.micro_batch_size=null"]
    settings = load(config, overrides).config
    overrides.append(f"train.global_batch_size={16 if toy else 32}")
    if not toy:
        return overrides
    method, model = settings.method, settings.model
    overrides += (
        ["model.timm_name=resnet10t"] if (model.timm_name or "").startswith("resnet") else ["model.timm_name=null", *_TOY]
    )
    if hasattr(method, "teacher_model"):
        overrides += [f"method.teacher_{word}" for word in ("model.timm_name=null", *_TOY)]
    if getattr(method, "text", None) is not None:
        overrides += ["method.text.width=32", "method.text.depth=1", "method.text.num_heads=2"]
    fields = {"prototypes": 64, "head_hidden": 32, "head_bottleneck": 16, "queue_size": 64}
    overrides += [f"method.{field}={value}" for field, value in fields.items() if hasattr(method, field)]
    overrides += [f"method.views.{field}={value}" for field, value in _TOY_VIEWS.items() if hasattr(method.views, field)]
    return overrides


def _one(name: str, config: Config, device: torch.device) -> Iterator[Check]:
    reference = build_seeded_method(config, torch.device("cpu")).train()
    batch = random_batch(reference.views, config.train.global_batch_size, reference.text, seed=1)
    expected = _loss(reference, batch, bf16=False)
    method = build_seeded_method(config, device).train()
    there = moved(batch, device)
    loss = _loss(method, there, bf16=True)
    yield at_most(f"{name}: bf16 loss on {device.type} against fp32 on the CPU", abs(loss - expected) / abs(expected), _LOSS)
    engine, waits = _engine(method, config, device), 0
    for number in range(3):
        with _counted_waits(device, watch=number == 2) as seen:
            engine.before_accumulation([there], _STEP)
            terms = engine.forward_backward(there, _STEP)
            engine.step(_STEP, torch.stack(list(terms.values())).isfinite().all())
            method.after_step(_STEP)
        waits += len(seen)
    engine.close()
    finite = all(bool(term.isfinite()) for term in terms.values())
    yield Check(f"{name}: three steps", "finite" if finite else "not finite", "finite", finite)
    if device.type == "cuda":
        yield at_most(f"{name}: waits of the host in the third step", waits, 0)


def _loss(method: Method, batch: Batch, *, bf16: bool) -> float:
    kind = next(method.parameters()).device.type
    with torch.no_grad(), torch.autocast(kind, torch.bfloat16, enabled=bf16):
        torch.manual_seed(0)
        method.before_accumulation([batch], _STEP)
        terms = method(batch, _STEP)
    method.on_step_skipped()
    return float(sum(float(term) for term in terms.values()))


def _engine(method: Method, config: Config, device: torch.device) -> Any:
    from pipeline.training.engine import Engine

    return Engine(method, engine_options(config, config.train.global_batch_size, 1), device)


@contextlib.contextmanager
def _counted_waits(device: torch.device, *, watch: bool) -> Iterator[list[Any]]:
    """Calls in which torch makes the host wait for the device."""
    if device.type != "cuda" or not watch:
        yield []
        return
    import warnings

    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            yield seen
    finally:
        torch.cuda.set_sync_debug_mode("default")
