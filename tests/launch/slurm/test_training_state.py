"""What ``fovea status`` says of a run that trains, from its own records: without a Slurm."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from launch.cli.main import main
from launch.slurm import status
from launch.slurm.training_state import cost, training_state
from pipeline.runtime import job_record as record
from pipeline.runtime.run_directory import RunDirectory
from pipeline.tracking.journal import Journal
from tests.helpers.limits import deadline
from tests.helpers.runs import ROOT, environment


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    made = RunDirectory(tmp_path / "run")
    made.write("config.json", {})
    made.note("start", attempt=0, ranks=2)
    journal = Journal(made.journal(0))
    for step in (50, 100):
        values = {"train/loss": 10.0 - step / 50, "perf/images_per_second": 16.0, "perf/samples_seen": step * 32.0}
        for node, use in enumerate((0.9, 0.88, 0.4)):
            values |= {f"system/node{node}/gpu_share": use, f"system/node{node}/gpu_memory_share": 0.5}
        journal.metrics(step, values)
    journal.metrics(100, {"knn/top1": 0.5})
    journal.close()
    return made


def pulse(run: RunDirectory, rank: int, **values: object) -> None:
    path = run.logs(0) / "pulse" / f"rank-{rank}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"rank": rank, "step": 100, "waiting": False, **values}))


def test_loss_speed_and_the_use_of_gpus_come_from_the_journal(run: RunDirectory) -> None:
    state = training_state(run, 0, 300, trains=True)
    assert (state.loss, state.images_per_second) == (8.0, 16.0)
    assert state.seconds_left == 200 * 32 / 16
    assert (round(state.gpu_use or 0, 4), state.gpu_memory, state.idle_node) == (0.7267, 0.5, (2, 0.4))
    assert training_state(run, 0, 0, trains=True).seconds_left is None
    assert training_state(run, -1, 300, trains=True).loss is None
    assert training_state(run, 7, 300, trains=True).loss is None


def test_a_rank_that_waits_for_data_is_named_and_one_that_waits_for_it_is_not(run: RunDirectory) -> None:
    pulse(run, 0, phase="forward and backward", seconds=54.0, waiting=True)
    pulse(run, 1, phase="data", seconds=54.0)
    pulse(run, 2, phase="data", seconds=3.0)
    state = training_state(run, 0, 300, trains=True)
    assert state.waits == ["rank 1 has been in data at step 100 for 54 s"]
    assert training_state(run, 0, 300, trains=False).waits == []


def test_errors_are_named_with_their_rank_and_node(run: RunDirectory) -> None:
    failure = {"rank": 1, "node": "n2", "step": 7, "what": "out of host memory", "code": 1, "kind": "MemoryError"}
    run.write("logs/attempt-0000/failure.json", failure)
    assert training_state(run, 1, 0, trains=False).errors == ["attempt 0, rank 1 on n2 at step 7: out of host memory"]


def test_what_a_run_has_cost_is_the_sum_over_its_attempts(run: RunDirectory) -> None:
    rows = [{"started_at": 0.0, "ended_at": 3600.0, "ranks": 8}, {"started_at": 7200.0, "ranks": 16}, {"cause": "?"}]
    assert cost(run, rows, now=9000.0).hours == 8 + 8
    assert (cost(run, rows, now=9000.0).gpus, cost(run, rows, now=9000.0).price) == (False, None)
    run.write("submit/job.json", {"profile": {"gpus_per_node": 8, "gpu_hour_price": 2.5}})
    assert cost(run, rows, now=9000.0).price == 40.0
    assert cost(run, rows, now=9000.0).hours_left is None
    more = cost(run, rows, now=9000.0, left=900.0)
    assert (more.hours_left, more.price_left) == (4.0, 10.0), "at the number of ranks that the last attempt has"


def test_status_shows_all_of_it(run: RunDirectory) -> None:
    run.write("plan.json", {"steps": 300})
    pulse(run, 0, phase="data", seconds=54.0)
    record.exclude(run, {"n2": "its clock"})
    run.write("checkpoints/step_000000100/manifest.json", {"seconds": 5.0, "scores": {"knn/top1": 0.5}})
    text = status.table(status.status(run))
    for part in ("running", "step 100 of 300", "loss 8.0000", "16 images/s", "6:40 of steps left, done", "process hours"):
        assert part in text, text
    for part in ("GPUs 73% busy (those of node 2: 40%), 50% of their memory in use", "; 0.22 more to the end", "for 54 s"):
        assert part in text, text
    assert "excluded: n2: its clock (until" in text and "knn/top1 0.500" in text
    assert json.loads(status.as_json(status.status(run)))["training"]["loss"] == 8.0


def test_the_expected_end_counts_further_attempts_and_their_time_in_the_queue(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.write("plan.json", {"steps": 300})
    profile = {"time": "10", "checkpoint_lead_time": 300.0, "gpus_per_node": 4, "gpu_hour_price": 3.0}
    run.write("submit/job.json", {"job": 7, "profile": profile})
    record.script(run).write_text("#!/bin/bash\n")
    line = "\x1f".join(("7", "RUNNING", "None", "N/A", "6:40", "n1", "0:00", "toy", "(null)", str(record.script(run))))
    program = tmp_path / "bin" / "squeue"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho '{line}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    now = time.time()
    rows = [("submit", now - 5000, None), ("start", now - 4000, 0), ("training", now - 3940, 0), ("end", now - 3400, 0)]
    rows += [("start", now - 400, 1), ("training", now - 340, 1)]
    events = [{"event": event, "t": t, **({"attempt": n, "ranks": 8} if n is not None else {})} for event, t, n in rows]
    (run.path / "attempts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in events))
    os.rename(run.journal(0), run.journal(1))
    one = status.status(run)
    # 400 s of steps, 100 s in this attempt; one more has 300 s less a minute to start, so two, each after 3000 s in the queue.
    assert one.forecast is not None and one.forecast.attempts == 2
    assert one.forecast.end - now == pytest.approx(400 + 2 * 3060, abs=60)
    assert one.cost.hours_left == pytest.approx((400 + 120) * 8 / 3600) and one.cost.price_left is not None
    text = status.table(one)
    assert (
        "with 2 further attempts and the queue as before" in text and "at the profile's price; 1.16 more to the end, 3.47" in text
    )


def test_the_live_view_follows_a_run_on_a_terminal_until_it_ends(run: RunDirectory) -> None:
    run.write("plan.json", {"steps": 300})
    pulse(run, 0, phase="data", seconds=1.0)
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (40, 120))
    command = [sys.executable, "-m", "launch.cli.main", "status", str(run.path), "--watch", "0.2"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "40"}
    view = subprocess.Popen(command, cwd=ROOT, stdin=slave, stdout=slave, stderr=slave, env=environment)
    os.close(slave)
    drawn, step = b"", 100
    end = deadline()
    with os.fdopen(master, "rb", buffering=0) as terminal, contextlib.suppress(OSError):  # EIO: the other side has closed
        while part := terminal.read(1 << 16):
            drawn += part
            assert time.monotonic() < end, drawn
            if step < 103 and f"step {step} of 300".encode() in drawn:
                step += 1
                pulse(run, 0, phase="data", seconds=1.0, step=step)
            elif b"step 103 of 300" in drawn and not record.final_state(run):
                record.end(run, "stopped", "by request")
    assert view.wait(timeout=600) == 0, drawn
    for part in (b"running: on this machine", b"step 100 of 300", b"step 103 of 300", b"stopped: by request", b"\x1b["):
        assert part.partition(b": ")[2] in drawn if b": " in part else part in drawn, (part, drawn)


def test_the_live_view_of_all_runs_goes_on_until_it_is_interrupted(run: RunDirectory, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    run.path.rename(tmp_path / "runs" / "first")
    pulse(RunDirectory(tmp_path / "runs" / "first"), 0, phase="data", seconds=1.0)
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (40, 120))
    command = [sys.executable, "-m", "launch.cli.main", "status", "--watch", "0.2"]
    view = subprocess.Popen(
        command, cwd=tmp_path, stdin=slave, stdout=slave, stderr=slave, env={**environment(), "TERM": "xterm"}
    )
    os.close(slave)
    drawn, end, interrupted = b"", deadline(), False
    with os.fdopen(master, "rb", buffering=0) as terminal, contextlib.suppress(OSError):
        while part := terminal.read(1 << 16):
            drawn += part
            assert time.monotonic() < end, drawn
            if b"first" in drawn and not (tmp_path / "runs" / "second").exists():
                (tmp_path / "runs" / "second").mkdir()
                (tmp_path / "runs" / "second" / "config.json").write_text("{}")
            elif b"second" in drawn and not interrupted:
                view.send_signal(signal.SIGINT)
                interrupted = True
    assert view.wait(timeout=600) == 130 and b"Traceback" not in drawn, drawn


def test_away_from_a_terminal_the_view_prints_lines_and_ends_with_the_run(run: RunDirectory) -> None:
    record.end(run, "failed", "twice in a row")
    command = [sys.executable, "-m", "launch.cli.main", "status", str(run.path), "--watch", "600"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=True)
    assert done.stdout.startswith("run: failed: twice in a row\n") and "\x1b" not in done.stdout


def test_runs_are_listed_with_time_hours_and_score(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, hours, top1 in (("a", 1, 0.25), ("b", 3, 0.75), ("c", 2, None)):
        run = RunDirectory(tmp_path / name)
        run.write("config.json", {})
        start = {"event": "start", "t": 1000.0, "attempt": 0, "ranks": 2}
        rows = [start, {"event": "end", "t": 1000.0 + 3600 * hours, "attempt": 0, "code": 0}]
        (run.path / "attempts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        record.end(run, "finished" if name != "c" else "failed", "as it is")
        if top1 is not None:
            run.write("outcome.json", {"stop": "FINISHED", "step": 9, "steps": 9, "scores": {"knn/top1": top1}})
    with pytest.raises(SystemExit, match="0"):
        main(["runs", str(tmp_path)])
    assert capsys.readouterr().out.splitlines()[1].split()[:7] == ["a", "finished", "0/9", "1:00:00", "2.00", "-", "0.2500"]
    for words, names in (
        (["--sort", "hours"], "bca"),
        (["--sort", "score"], "bac"),
        (["--sort", "time", "--state", "finished"], "ba"),
        (["--state", "failed"], "c"),
        (["--sort", "score", "--score", "none"], "abc"),
    ):
        with pytest.raises(SystemExit, match="0"):
            main(["runs", str(tmp_path), *words])
        assert "".join(line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]) == names, words
