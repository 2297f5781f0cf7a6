"""Exact hue in one kernel on a GPU: the CPU's pixels bit for bit, one operator of the graph, DALI's operators where it fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.data.augment import dali
from pipeline.data.augment.operators import Augment
from pipeline.data.augment.view_groups import groups_of
from pipeline.data.augment.views import ViewSpec

ROOT = Path(__file__).resolve().parents[3]
SPEC = ViewSpec("view", 32, 2, (0.3, 1.0), augment=(Augment(jitter_probability=0.8, hue_shift=0.1),))


def other_process(path: Path, **environment: str) -> Any:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(path.parent), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-m", "tests.helpers.fused_hue", str(path)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(path)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return other_process(tmp_path_factory.mktemp("hue") / "found.pt", TRITON_INTERPRET="1")


def test_the_kernel_makes_the_pixels_of_a_cpu(interpreted: dict[str, Any]) -> None:
    assert torch.equal(interpreted["found"], interpreted["expected"])
    assert not torch.equal(interpreted["found"][0], interpreted["image"])


def test_in_a_graph_with_a_condition_it_is_compared_with_a_cpu_before_it_is_used(interpreted: dict[str, Any]) -> None:
    works, wrong = interpreted["problems"]
    assert works == "" and wrong == "3 of 4 images differ from the CPU's"


@pytest.mark.slow
def test_it_compiles_for_gpus_that_are_not_here_without_fused_multiply_adds(tmp_path: Path) -> None:
    made = other_process(tmp_path / "made.pt")
    assert [capability for capability, *_ in made] == [80, 90]
    for _, code, text in made:
        assert code.startswith(b"\x7fELF") and "div.rn.f32" in text
        assert "fma." not in text and "div.full" not in text


def operators(turn: Any) -> list[str]:
    """Names of the operators of a GPU's graph, which is built without one."""
    (group,) = groups_of((SPEC,))
    inputs = dali._Inputs("hsv", "gpu", read=[], turn=turn)
    pipeline = dali._graph(group, inputs, batch_size=4, num_threads=1, device_id=0)
    pipeline._build_graph()
    return [one.spec.SchemaName() if hasattr(one.spec, "SchemaName") else type(one).__name__ for one in pipeline._ops]


def test_the_graph_of_a_gpu_has_one_operator_instead_of_sixty() -> None:
    fused, unfused = operators(lambda *_: []), operators(None)
    assert len(unfused) - len(fused) > 55


def test_where_the_kernel_fails_dalis_operators_are_used_and_a_line_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any) -> str:
        raise RuntimeError("no kernel image is available\nfor execution")

    monkeypatch.delenv("FOVEA_KERNELS", raising=False)
    monkeypatch.setattr(dali, "_problem_of_fused_hue", fails)
    assert dali.fused_hue.__wrapped__(1) is None
    error = capsys.readouterr().err
    assert "cuda:1" in error and "no kernel image is available" in error and "method.augment.hue_space=yiq" in error
    monkeypatch.setattr(dali, "_problem_of_fused_hue", lambda *_: "2 of 4 images differ from the CPU's")
    assert dali.fused_hue.__wrapped__(0) is None and "2 of 4 images" in capsys.readouterr().err
    monkeypatch.setattr(dali, "_problem_of_fused_hue", lambda *_: "")
    assert callable(dali.fused_hue.__wrapped__(0)) and capsys.readouterr().err == ""
    monkeypatch.setenv("FOVEA_KERNELS", "torch")
    assert dali.fused_hue.__wrapped__(0) is None and capsys.readouterr().err == ""
