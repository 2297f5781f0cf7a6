"""Measures steps of ViT-L, eager, compiled and with 8-bit products: DINOv2's with patches of 16 pixels, beside the official
one, and of 14, and those of a method with two views.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch

from pipeline.bench import step, step_config
from pipeline.bench.plain import alone
from pipeline.bench.prove.methods import overrides_of
from pipeline.bench.prove.stage import Check, Setup, at_least
from pipeline.config.load import load
from pipeline.errors import FoveaError
from pipeline.estimate.flops import counted
from pipeline.training.timing import peak_tflops

_OFFICIAL = 0.97  # of the official step's speed
_MFU = 0.35
_CONFIG = "dinov2/vitl16_short"
_VIT_L = ("model.embed_dim=1024", "model.depth=24", "model.num_heads=16")
_CONFIGS = {  # by name: config, overrides, samples
    "DINOv2 ViT-L/14": ("dinov2/vitl14_long", (), 32),
    "MoCo v3 ViT-L/16 with two views": ("mocov3/vit_s16", _VIT_L, 64),
}


def checks(setup: Setup) -> Iterator[Check]:
    """Images per second, MFU and peak memory of each form of a step."""
    model, batch = ("tiny-16", 2) if setup.toy else ("L-16", 64)
    prototypes, flops = 256 if setup.toy else 65536, None if setup.toy else _flops()
    with alone(setup.device):  # one group for all forms: DeepSpeed does not support a second one in the same process
        yield from forms(setup, model, batch, prototypes=prototypes, flops=flops)
        reason = _without_fp8(setup)
        if reason:
            yield Check("8-bit products", f"skipped: {reason}")
        else:
            yield from forms(setup, model, batch, prototypes=prototypes, flops=flops, fp8=True)
        for name in _CONFIGS:
            for fp8 in (False,) if reason else (False, True):
                yield from _config(setup, name, fp8=fp8)


def _config(setup: Setup, name: str, *, fp8: bool) -> Iterator[Check]:
    """The forms of a config's own step."""
    config, overrides, samples = _CONFIGS[name]
    own = [*overrides_of(config, toy=setup.toy), *(() if setup.toy else overrides)]
    samples = 2 if setup.toy else samples
    precision = "bf16" if setup.device == "cuda" else "fp32"
    own += [f"train.global_batch_size={samples}", f"train.micro_batch_size={samples}", f"train.precision={precision}"]
    settings = load(config, own).config
    on_gpu = setup.device == "cuda"
    options = step.Options(compiled=on_gpu, fp8=fp8, rounds=2 if setup.toy else 5, device=setup.device, bf16=on_gpu)
    flops = None if setup.toy else counted(settings)
    yield from _rows(
        setup, name, samples, lambda: step.compare(step_config.contest(settings, torch.device(setup.device)), options), flops
    )


def _without_fp8(setup: Setup) -> str:
    """Why products in 8-bit floats cannot be measured, or nothing."""
    if not hasattr(torch, "_scaled_mm"):
        return f"torch {torch.__version__} has no scaled product"
    if setup.device == "cpu":
        return "needs a GPU"
    capability = torch.cuda.get_device_capability()
    return "" if capability >= (8, 9) else f"needs compute capability 8.9, this GPU has {'.'.join(map(str, capability))}"


def _flops() -> float:
    """FLOPs of a sample."""
    return counted(load(_CONFIG, ["data.shards=none-*.tar"]).config)


def forms(
    setup: Setup, model: str, batch: int, *, prototypes: int, flops: float | None, graphs: bool = False, fp8: bool = False
) -> Iterator[Check]:
    """Measure ours eager and compiled (with CUDA graphs if asked), and the official step if it is installed.

    Args:
        setup: where.
        model: of the benchmark of DINOv2's step.
        batch: samples of a step.
        prototypes: of the shared head.
        flops: FLOPs of a sample, for MFU.
        graphs: whether compiled blocks are replayed as CUDA graphs.
        fp8: whether to measure ours with 8-bit products instead.
    """
    on_gpu = setup.device == "cuda"
    sizes: dict[str, Any] = {"prototypes": prototypes, "rounds": 2 if setup.toy else 5}
    forms: dict[str, Any] = {"compiled": on_gpu, "graphs": graphs and on_gpu, "fp8": fp8, "device": setup.device, "bf16": on_gpu}
    options = step.Options("dinov2", model, batch, **sizes, **forms)
    yield from _rows(setup, f"ViT-{model}", batch, lambda: step.measure(options), flops)


def _rows(setup: Setup, title: str, batch: int, measure: Callable[[], step.Result], flops: float | None) -> Iterator[Check]:
    """Measure, and compare each form with what is required; memory is given back."""
    try:
        result = measure()
    except FoveaError as error:
        yield Check(title, str(error), "measured", False)
        return
    finally:
        gc.collect()
        if setup.device == "cuda":
            torch.cuda.empty_cache()
    peak = peak_tflops(torch.cuda.get_device_name(), "bf16") if setup.device == "cuda" else None
    for name, case in result.cases.items():
        rate = batch / case.best
        shown = f"{rate:.4g} images/s, peak {case.peak / 2**30:.2f} GiB"
        if flops and peak:
            mfu = flops * rate / peak / 1e12
            yield Check(f"{title}, {name}", f"{shown}, MFU {mfu:.1%}", f"MFU ≥ {_MFU:.0%}", mfu >= _MFU or name == step.OURS)
        else:
            yield Check(f"{title}, {name}", shown)
    if result.baseline in result.cases and setup.device == "cuda":
        ours = min(case.best for name, case in result.cases.items() if name != result.baseline)
        ratio = result.cases[result.baseline].best / ours
        yield at_least(f"{title}: speed relative to the official step", ratio, _OFFICIAL)
