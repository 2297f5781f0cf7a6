"""The benchmark of snapshots trains on real ranks, and its page states ratios with intervals and the pause of one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.bench import snapshots, summary
from pipeline.errors import CheckpointError, ConfigError
from tests.helpers.rank_pool import pool

RESULT = snapshots.Result(
    parameters=18_000_000,
    size=288_000_000,
    seconds={
        snapshots.PLAIN: [1.0, 2.0, 1.0],
        snapshots.OFTEN: [1.1, 2.2, 1.1],
        snapshots.ALWAYS: [2.0, 4.2, 1.9],
        snapshots.ON_DISK: [1.2, 2.2, 1.3],
    },
    pauses={"snapshot": [0.05, 0.04, 0.06], "checkpoint": [0.07] * 9 + [0.2, 0.3]},
)


def test_every_case_is_measured_in_every_round(tmp_path: Path) -> None:
    memory, disk = tmp_path / "memory", tmp_path / "disk"
    memory.mkdir(mode=0o700)
    options = snapshots.Options(batch=2, side=32, prototypes=64, every=2, steps=2, rounds=2)
    first, _ = pool(2).run(snapshots.train, options=options, memory=memory, disk=disk)
    assert {case: len(values) for case, values in first.seconds.items()} == dict.fromkeys(snapshots.CASES, 2)
    assert all(value > 0 for values in first.seconds.values() for value in values)
    taken = {kind: len(values) for kind, values in first.pauses.items()}
    assert taken == {"snapshot": 2 * (1 + 2), "checkpoint": 2}, "every two steps and every step; the first ones do not count"
    assert first.size > 16 * first.parameters
    kept = sorted(path.name for path in memory.iterdir() if path.is_dir())
    assert len(kept) == 1 and kept[0].startswith("step_"), "snapshots are where the option says, and only the newest is kept"


def test_a_snapshot_that_cannot_be_written_ends_the_benchmark() -> None:
    from pipeline.checkpoint.writer import Outcome

    with pytest.raises(CheckpointError, match="full"):
        snapshots._check(Outcome(3, None, CheckpointError("the memory is full", where="x", hint="y"), 1))


def test_the_page_states_ratios_of_the_same_round_and_pauses() -> None:
    page = snapshots.markdown(RESULT, snapshots.Options(), {"cores": "2"}, "fovea bench snapshots")
    assert "| without snapshots | 1.000 | 1 |" in page
    assert "| a snapshot every 10 steps | 1.100 | 1.10 ± 0.00 |" in page, "a slow round slows both"
    assert "| a snapshot every step | 2.000 | 2.00 ± 0.25 |" in page
    assert "| a checkpoint every 10 steps | 1.300 | 1.20 ± 0.25 |" in page
    assert "| a snapshot | 0.0500 | 0.0500 | 5.0% |" in page and "| a checkpoint | 0.0700 | 0.2000 | 7.0% |" in page
    assert "18.0 M parameters" in page and "288 MB" in page and "3 rounds" in page


def test_the_table_of_results_reads_its_figures(tmp_path: Path) -> None:
    document = {"command": "fovea bench snapshots", "options": {"every": 10}, "seconds": RESULT.seconds}
    (tmp_path / "snapshots-cpu.json").write_text(json.dumps(document))
    lines = summary.table(tmp_path).splitlines()[2:]
    title = "[a step with a snapshot in host memory every step](results/snapshots-cpu.md)"
    assert f"| {title} | 2.000 s | 1.000 s without | 2.00 ± 0.25 x as long | `fovea bench snapshots` |" in lines
    assert len(lines) == 3


def test_options_that_cannot_be_measured_are_refused(tmp_path: Path) -> None:
    for options, text in (
        (snapshots.Options(steps=15), "not a multiple of 10"),
        (snapshots.Options(model="huge"), "not a size"),
    ):
        with pytest.raises(ConfigError, match=text):
            snapshots.measure(options, tmp_path)


@pytest.mark.slow
def test_the_command_starts_its_ranks_and_leaves_no_host_memory(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from launch import host_memory
    from launch.cli.bench_methods import app

    done = CliRunner().invoke(app, ["snapshots", "--smoke", "--out", str(tmp_path / "snapshots")])
    assert done.exception is None, done.output
    assert json.loads((tmp_path / "snapshots.json").read_text())["seconds"].keys() == set(snapshots.CASES)
    assert not host_memory.path_of(Path("bench-snapshots")).exists()
