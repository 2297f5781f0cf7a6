"""The comparison of small batches: every way is a valid config that differs as it says, and the page has intervals by seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from launch.cli.bench_learning import app
from pipeline.bench.small_batches import METHODS, BatchResult, Options, line, markdown, ways
from pipeline.config.load import load

OPTIONS = Options("none.tar", Path("runs"))


@pytest.mark.parametrize("method", METHODS)
def test_ways_differ_only_in_how_the_batch_is_computed(method: str) -> None:
    name, common, naive = METHODS[method]
    configs = [
        load(name, [*(text.format(small=32) for text in common), *settings]).config for settings in ways(OPTIONS, naive).values()
    ]
    assert [(c.train.global_batch_size, c.train.micro_batch_size) for c in configs] == [
        (512, None),
        (512, 32),
        (512, 32),
        (32, None),
    ]
    flags: list[Any] = [getattr(c.method, "target_batch", getattr(c.method, "grad_cache", None)) for c in configs]
    assert flags[0] == flags[1] == flags[3] != flags[2]
    assert all(getattr(c.method, "head_norm", "none") != "batch" for c in configs), "batch norm makes every split another loss"


def test_the_page_has_differences_by_seed_with_intervals() -> None:
    names = list(ways(OPTIONS, "x"))
    values = {names[0]: (0.40, 0.42), names[1]: (0.41, 0.42), names[2]: (0.30, 0.34)}
    results = [BatchResult("clip", way, seed, knn, 0.2) for way, pair in values.items() for seed, knn in enumerate(pair)]
    results.append(BatchResult("clip", names[3], 0, failed="no memory"))
    text = markdown(results, {"cores": "2"}, "fovea bench small-batches")
    assert "| clip | 512 at once | 41.0 ± 12.7 % |  | 20.0 ± 0.0 % | 2 |" in text
    assert "| clip | 512 in micro-batches of 32 | 41.5 ± 6.4 % | +0.5 ± 6.4 | 20.0 ± 0.0 % | 2 |" in text
    assert "each alone | 32.0 ± 25.4 % | -9.0 ± 12.7 |" in text
    assert "- clip, 32, seed 0: no memory" in text and line(results[0]) == "clip, 512 at once, seed 0: k-NN 0.400"


def test_sizes_that_do_not_divide_are_refused() -> None:
    done = CliRunner().invoke(app, ["small-batches", "--large", "100", "--small", "32"])
    assert done.exit_code != 0 and "32 does not divide 100" in str(done.exception)
