"""Every method trains a step at real size on stand-in devices, and the host waits nowhere but where the table says."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.standin import process
from tests.helpers.standin.methods import BATCH, METHODS
from tests.helpers.standin.recorder import Record
from tests.standin.allowed_waits import ALLOWED

pytestmark = pytest.mark.slow

RANK = 3
Stepped = Callable[[str], tuple[dict[str, Any], Record]]


def measured(out: Path, *arguments: str) -> tuple[dict[str, Any], Record]:
    """The size of the model and the record of the last step, as rank 3 of eight."""
    done = process.run("method_step", str(out), *arguments, BATCH, f"--rank={RANK}")
    assert done.returncode == 0, done.stderr[-4000:]
    document = json.loads(out.read_text())
    return document, Record.from_json(document["records"][-1])


@pytest.fixture(scope="module")
def stepped(tmp_path_factory: pytest.TempPathFactory) -> Stepped:
    """What one step of a method is, measured once."""
    return cache(lambda name: measured(tmp_path_factory.mktemp("step") / "step.json", *METHODS[name]))


def waits(record: Record) -> dict[str, int]:
    """Host waits and blocking copies of a step by place."""
    counts: Counter[str] = Counter()
    for block in record.blocks:
        counts[f"{block.what}: {block.where}"] += block.calls
    return dict(counts)


@pytest.mark.parametrize("name", METHODS)
def test_a_step_waits_only_where_the_table_says(name: str, stepped: Stepped) -> None:
    document, record = stepped(name)
    assert document["parameters"] > 20_000_000, "not a real size"
    assert {call.kind for call in record.calls} >= {"kernel", "gemm", "copy"}
    assert not [call.name for call in record.calls if call.kind == "unmodelled"]
    assert {call.device for call in record.calls} == {RANK}
    assert not [block.line for block in record.blocks if block.thread == "fovea-data"]
    lines = sorted(block.line for block in record.blocks)
    assert waits(record) == ALLOWED[name], "\n".join(lines)


@pytest.mark.parametrize("name", ["dinov2", "clip"])
def test_a_compiled_step_as_a_gpu_runs_by_default_waits_nowhere(name: str, tmp_path: Path) -> None:
    _, record = measured(tmp_path / "step.json", *METHODS[name], "train.compile=true")
    launched = [call.name for call in record.calls if call.kind == "kernel"]
    assert any(kernel.startswith("triton triton_") for kernel in launched), "nothing is compiled"
    assert waits(record) == {}, "\n".join(sorted(block.line for block in record.blocks))
    assert {call.device for call in record.calls} == {RANK}


def test_at_most_six_optimizer_calls_and_gathers_update_the_54_groups_of_vitl16_short(stepped: Stepped) -> None:
    document, record = stepped("dinov2")
    gathers = sum(one.calls for one in record.collectives if "gather" in one.name and one.device == "cuda")
    assert document["groups"] == 54 and 0 < record.functions["optimizer step"] <= 6 and 0 < gathers <= 6


def test_every_method_has_its_table() -> None:
    from pipeline.config.schema import METHODS as known

    assert ALLOWED.keys() == METHODS.keys() >= known.keys()
