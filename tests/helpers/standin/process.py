"""Prepares a process that runs on stand-in devices, and starts such processes."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from tests.helpers.standin.build import environment
from tests.helpers.standin.recorder import Recorder
from tests.helpers.warm import restore_variables, standin

ROOT = Path(__file__).resolve().parents[3]
_HANG = 900  # seconds
_BY_NVML = "PYTORCH_NVML_BASED_CUDA_CHECK"
# An engine that this process has imported without a GPU has chosen DeepSpeed's accelerator for it and its children.
_NOT_INHERITED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "DS_ACCELERATOR")


_begun: list[Recorder] = []


def begin(limit: int = _HANG) -> Recorder:
    """Records from here on, with fake process groups and without cuDNN, which the stand-in does not replace.

    In a process that was forked from one that had begun, the same recorder goes on.

    Args:
        limit: seconds after which the process is ended; 0 for one that is forked from, whose timer a fork could not replace.
    """
    if limit:
        faulthandler.dump_traceback_later(limit, exit=True)
    import torch

    if _begun:
        _begun[0].forked()
        return _begun[0]
    torch.backends.cudnn.enabled = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    recorder = Recorder()
    from tests.helpers.standin import answers, ranks

    answers.install()
    ranks.install(recorder)
    _begun.append(recorder)
    return recorder


@contextlib.contextmanager
def begun_to_be_forked() -> Iterator[None]:
    """Begins in a process that is forked from when it has imported within this block.

    What imports there counts devices without opening them, after which torch would refuse to open them in a fork.
    """
    begin(0)
    import torch

    before, os.environ[_BY_NVML] = os.environ.get(_BY_NVML), "1"
    counted = torch.cuda._device_count_nvml
    torch.cuda._device_count_nvml = lambda: int(os.environ["STANDIN_DEVICES"])
    try:
        yield
    finally:
        torch.cuda._device_count_nvml = counted
        if before is None:
            del os.environ[_BY_NVML]


def end() -> NoReturn:
    """Ends a short program at once.

    Threads of torch's backward pass that ask for the interpreter's lock while it is torn down abort the process.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def run(
    module: str, *arguments: str, devices: int = 8, timeout: float = 1200, checkout: Path = ROOT, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs a module of this folder in a process that sees stand-in devices.

    Args:
        module: its name, without the package.
        arguments: its command line.
        devices: number of devices.
        timeout: seconds, which only catch a hang.
        checkout: the folder whose code is run, see :func:`overlay`.
        variables: further environment variables.
    """
    restore_variables()  # what imports in this process have set, or not yet, is no reason to start anew
    own = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
    python = standin({**own, **environment(), "PYTHONPATH": str(ROOT)})
    return subprocess.run(
        [python, "-m", f"tests.helpers.standin.{module}", *arguments],
        env={**own, **environment(devices=devices), "PYTHONPATH": str(checkout), **variables},
        cwd=checkout,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def overlay(checkout: Path, folder: Path) -> Path:
    """A folder with the code of a checkout and these tests, so that an older state can be measured with the same tools."""
    for path in checkout.iterdir():
        if path.name not in ("tests", ".git", ".venv"):
            (folder / path.name).symlink_to(path)
    (folder / "tests").symlink_to(ROOT / "tests")
    return folder
