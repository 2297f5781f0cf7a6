"""What a rank imports: not what costs seconds of each start and is never used."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.helpers.runs import ROOT, environment

UNUSED = ("mlflow", "wandb", "torch._inductor.compile_fx")


@pytest.mark.slow
def test_a_rank_imports_no_tracker_and_no_compiler_and_leaves_them_importable() -> None:
    code = (
        "import sys, pipeline.training.build, deepspeed.runtime.compiler as compiler, torch\n"
        "from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam\n"
        f"print([name for name in {UNUSED} if name in sys.modules], compiler.compile() is torch.compile)\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1:] == ["[] True"], done.stdout + done.stderr
