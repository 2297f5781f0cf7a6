"""A run on one device in every mode, against the plainest run on that device: on the CPU, and on a GPU where there is one.

Other tests that need a GPU: every stage of ``fovea prove`` (tests/bench/test_prove.py), also a killed and resumed run, fused
kernels (tests/losses), the forms of a step (tests/bench/test_baselines.py).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.runs import recorded, train

STEPS = 6
BASE = (
    f"train.duration={STEPS} steps",
    "launch.num_processes=1",
    "checkpoint.every=3 steps",
    "train.compile=false",
    "evaluation.knn.enabled=true",
    f"evaluation.knn.every={STEPS} steps",
)
EXACT, CLOSE, LOW = 1e-4, 0.3, 0.6  # difference of a loss term: other order of sums, bf16, 8-bit products
MODES = {
    "ZeRO 0": (("train.zero_stage=0",), EXACT),
    "ZeRO 2": (("train.zero_stage=2",), EXACT),
    "ZeRO 3, recomputed": (("train.zero_stage=3", "train.activation_checkpointing=true"), EXACT),
    "offloaded": (("train.zero_stage=1", "train.offload=cpu"), EXACT),
    "deterministic": (("train.deterministic=true",), EXACT),
    "bf16": (("train.precision=bf16",), CLOSE),
    "8-bit products": (("train.precision=bf16", "train.fp8=all"), LOW),
}
ONLY_CUDA = {
    "compiled": (("train.compile=true",), EXACT),
    "CUDA graphs": (("train.compile=true", "train.cuda_graphs=true"), EXACT),
}
CASES = [pytest.param("cpu", mode) for mode in MODES]
CASES += [pytest.param("cuda", mode, marks=pytest.mark.gpu) for mode in (*MODES, *ONLY_CUDA)]
pytestmark = pytest.mark.slow

Run = Callable[..., Path]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, config: Path, shards: str) -> Run:
    """Trains on a device; the run's directory."""

    def start(device: str, *settings: str, directory: Path | None = None) -> Path:
        directory = directory or tmp_path_factory.mktemp(device) / "run"
        with pytest.MonkeyPatch.context() as patch:
            if device == "cpu":
                patch.setenv("CUDA_VISIBLE_DEVICES", "")
            done = train(config, shards, directory, *BASE, *settings)
        assert done.returncode == 0, done.stderr + done.stdout
        assert f"1 ranks on {device}" in done.stdout
        return directory

    return start


@pytest.fixture(scope="module")
def plain(run: Run) -> Callable[[str], Path]:
    """The plainest run on a device, made once."""
    made: dict[str, Path] = {}
    return lambda device: made.setdefault(device, run(device)) if device not in made else made[device]


def largest_difference(ours: Path, theirs: Path) -> float:
    """Of a loss term in any step; NaN if the crops are others."""
    apart = 0.0
    mine, other = recorded(ours, 0), recorded(theirs, 0)
    assert sorted(mine) == sorted(other) == list(range(STEPS))
    for step, row in mine.items():
        assert row["keys"] == other[step]["keys"]
        for name, value in row["terms"].items():
            apart = max(apart, abs(float.fromhex(value) - float.fromhex(other[step]["terms"][name])))
    return apart


@pytest.mark.parametrize(("device", "mode"), CASES)
def test_a_run_in_this_mode_loses_what_the_plain_one_loses(
    device: str, mode: str, run: Run, plain: Callable[[str], Path]
) -> None:
    settings, apart = {**MODES, **ONLY_CUDA}[mode]
    assert largest_difference(run(device, *settings), plain(device)) < apart


@pytest.mark.gpu
def test_a_gpu_loses_what_the_cpu_loses(plain: Callable[[str], Path]) -> None:
    assert largest_difference(plain("cuda"), plain("cpu")) < 1e-2
