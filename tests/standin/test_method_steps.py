"""Every method trains a step at real size on stand-in devices, and the host waits nowhere but where the table says."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.standin import process
from tests.helpers.standin.methods import BATCH, METHODS
from tests.helpers.standin.recorder import Record
from tests.standin.allowed_waits import ALLOWED

pytestmark = pytest.mark.slow

RANK = 3


def measured(out: Path, *arguments: str) -> tuple[dict[str, Any], Record]:
    """The size of the model and the record of the last step, as rank 3 of eight."""
    done = process.run("method_step", str(out), *arguments, BATCH, f"--rank={RANK}")
    assert done.returncode == 0, done.stderr[-4000:]
    document = json.loads(out.read_text())
    return document, Record.from_json(document["records"][-1])


def waits(record: Record) -> dict[str, int]:
    """Host waits and blocking copies of a step by place."""
    counts: Counter[str] = Counter()
    for block in record.blocks:
        counts[f"{block.what}: {block.where}"] += block.calls
    return dict(counts)


@pytest.mark.parametrize("name", METHODS)
def test_a_step_waits_only_where_the_table_says(name: str, tmp_path: Path) -> None:
    document, record = measured(tmp_path / "step.json", *METHODS[name])
    assert document["parameters"] > 20_000_000, "not a real size"
    assert {call.kind for call in record.calls} >= {"kernel", "gemm", "copy"}
    assert not [call.name for call in record.calls if call.kind == "unmodelled"]
    assert {call.device for call in record.calls} == {RANK}
    assert not [block.line for block in record.blocks if block.thread == "fovea-data"]
    lines = sorted(block.line for block in record.blocks)
    assert waits(record) == ALLOWED[name], "\n".join(lines)


def test_every_method_has_its_table() -> None:
    from pipeline.config.schema import METHODS as known

    assert ALLOWED.keys() == METHODS.keys() >= known.keys()
