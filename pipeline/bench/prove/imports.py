"""Checks packages, driver and compiler, and measures the peak speed of the machine."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

from pipeline.bench.prove.stage import Check, Setup, at_least
from pipeline.errors import ConfigError

_PACKAGES = {
    "torch": "torch",
    "nvidia.dali": "nvidia-dali-cuda130",
    "nvidia.nvimgcodec": "nvidia-nvimgcodec-cu13",
    "deepspeed": "deepspeed",
    "timm": "timm",
    "webdataset": "webdataset",
    "obstore": "obstore",
    "mlflow": "mlflow",
    "open_clip": "open_clip_torch",
    "accelerate": "accelerate",
    "safetensors": "safetensors",
    "xxhash": "xxhash",
    "psutil": "psutil",
    "pynvml": "nvidia-ml-py",
}
_SHARE = 0.5  # of the peak that a large product must reach


def checks(setup: Setup) -> Iterator[Check]:
    """Imports, versions, driver, topology, compiler, a matrix product, copies."""
    for module, package in _PACKAGES.items():
        began = time.perf_counter()
        try:
            importlib.import_module(module)
        except Exception as error:
            yield Check(f"import {module}", f"{type(error).__name__}: {error}"[:200], "imports", False)
        else:
            yield Check(f"import {module}", f"{_version(package)}, {time.perf_counter() - began:.1f} s", "imports", True)
    compiler = shutil.which("cc") or shutil.which("gcc")
    yield Check("C compiler, for Triton", compiler or "none", "is there", compiler is not None or setup.device == "cpu")
    if setup.device == "cuda":
        yield from _gpu(setup)
    yield from _speed(setup)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "version unknown"


def _gpu(setup: Setup) -> Iterator[Check]:
    import torch

    if not torch.cuda.is_available():
        raise ConfigError("no CUDA device is available", where="--device", hint="Choose --device cpu")
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        yield Check(f"device {number}", f"{about.name}, {about.total_memory / 2**30:.0f} GiB, sm_{about.major}{about.minor}")
    for name, arguments in (
        ("driver", ["--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]),
        ("topology", ["topo", "-m"]),
    ):
        try:
            done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=60, check=False)
            (setup.folder / f"{name}.txt").write_text(done.stdout + done.stderr)
            yield Check(name, done.stdout.strip() if name == "driver" else f"written to {name}.txt")
        except (OSError, subprocess.TimeoutExpired) as error:
            yield Check(name, f"nvidia-smi: {error}")


def _speed(setup: Setup) -> Iterator[Check]:
    import torch

    from pipeline.bench.pairs import measure
    from pipeline.training.timing import peak_tflops

    device, side = torch.device(setup.device), 512 if setup.toy else 8192
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    wide = torch.empty((1 << 22) if setup.toy else (1 << 30), dtype=torch.uint8, device=device)
    host = torch.empty(wide.numel() // 4, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.empty_like(wide)
    acts = {
        "product": lambda: torch.mm(a, b),
        "copy": lambda: target.copy_(wide),
        "from the host": lambda: target[: host.numel()].copy_(host),
    }
    seconds = {name: case.best for name, case in measure(acts, rounds=3, device=device).items()}
    tflops = 2 * side**3 / seconds["product"] / 1e12
    peak = peak_tflops(torch.cuda.get_device_name(), "bf16") if device.type == "cuda" else None
    name = f"product of {side}x{side} bf16, TFLOP/s"
    yield at_least(name, tflops, _SHARE * peak) if peak and not setup.toy else Check(name, f"{tflops:.3g}")
    yield Check("copy on the device, GB/s read and written", f"{2 * wide.numel() / seconds['copy'] / 1e9:.3g}")
    yield Check("copy from the host, GB/s", f"{host.numel() / seconds['from the host'] / 1e9:.3g}")
