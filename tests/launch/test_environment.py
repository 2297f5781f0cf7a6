"""Runs in odd surroundings: another folder, a terminal that closes, no user name, no home, files of common names, short runs."""

from __future__ import annotations

import json
import os
import pty
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from pipeline.data.pack import synthetic as scenes
from pipeline.tracking import mlflow_database as database
from tests.helpers.runs import ROOT, TOY, environment

SHORT = ["data.shards=data/*train-*.tar", "data.index=ix", "run.directory=run", "schedule.lr.warmup=0", "launch.num_processes=1"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    scenes.write(folder, train=120, val=24, size=32, seed=3, samples_per_shard=40)
    return folder


@pytest.fixture
def work(made: Path, tmp_path: Path) -> Path:
    """A person's folder: their config, and their shards by a relative path."""
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "toy.yaml").write_text(TOY)
    (folder / "data").symlink_to(made)
    return folder


def fovea(*words: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launch.cli.main", *words],
        cwd=cwd,
        env={**environment(), **variables},
        capture_output=True,
        text=True,
        timeout=3000,
        check=False,
        stdin=subprocess.DEVNULL,
    )


@pytest.mark.slow
def test_a_short_run_is_in_mlflow_and_is_worked_with_from_any_folder(work: Path, tmp_path: Path) -> None:
    words = ["train", "toy.yaml", *SHORT, "train.duration=2 steps", "tracking.enabled=true"]
    done = fovea(*words, cwd=work)
    assert done.returncode == 0, done.stderr
    run, elsewhere = work / "run", tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert database.inspect(run / "mlflow.db") in ("absent", "whole")
    done = fovea("mlflow", "sync", str(run), cwd=elsewhere)
    assert done.returncode == 0, done.stderr + done.stdout
    with closing(sqlite3.connect(run / "mlflow.db")) as base:
        assert base.execute("SELECT count(*) FROM metrics WHERE key = 'train/loss'").fetchone()[0] == 2
    for command in (["eval"], ["report"], ["shards", "ls"], ["export", "--to", "safetensors"]):
        options = ["--step", "0"] if command[-1] == "ls" else []
        done = fovea(*command, str(run), *options, cwd=elsewhere)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    assert "knn/k10, fovea eval" in (elsewhere / "report.html").read_text()
    assert str(work) not in fovea("config", "show", "toy.yaml", *SHORT, cwd=work).stdout


@pytest.mark.slow
def test_the_tracking_server_of_the_environment_is_used_and_named(work: Path, tmp_path: Path) -> None:
    named = {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mine.db", "MLFLOW_EXPERIMENT_NAME": "mine"}
    words = ["train", "toy.yaml", *SHORT, "train.duration=2 steps", "tracking.enabled=true"]
    done = fovea(*words, cwd=work, **named)
    assert done.returncode == 0, done.stderr
    assert f"MLflow at sqlite:///{tmp_path}/mine.db (MLFLOW_TRACKING_URI)" in done.stdout
    assert not (work / "run" / "mlflow.db").exists()
    done = fovea("mlflow", "sync", "run", cwd=work)  # another shell, without the variable
    assert done.returncode == 0 and "mine.db" in done.stdout, done.stderr
    with closing(sqlite3.connect(tmp_path / "mine.db")) as base:
        assert base.execute("SELECT name FROM experiments WHERE name = 'mine'").fetchone()
        assert base.execute("SELECT count(*) FROM metrics WHERE key = 'train/loss'").fetchone()[0] == 2


def begin(work: Path, **options: object) -> subprocess.Popen[bytes]:
    words = ["train", "toy.yaml", *SHORT, "train.duration=400 steps", "checkpoint.every=400 steps"]
    return subprocess.Popen([sys.executable, "-m", "launch.cli.main", *words], cwd=work, env=environment(), **options)  # type: ignore[call-overload,no-any-return]


def until_step(process: subprocess.Popen[bytes], run: Path, step: int) -> None:
    end = time.monotonic() + 200
    while time.monotonic() < end:
        lines = [line for file in run.glob("batches/*.jsonl") for line in file.read_text().splitlines()]
        if len(lines) > step:
            return
        assert process.poll() is None, "the run ended too early"
        time.sleep(0.1)
    raise AssertionError("no step was done in time")


@pytest.mark.slow
def test_a_terminal_that_closes_stops_the_run_which_saves(work: Path) -> None:
    master, slave = pty.openpty()
    process = begin(work, stdin=slave, stdout=slave, stderr=slave, start_new_session=True, preexec_fn=_own_terminal)
    os.close(slave)
    reader = subprocess.Popen(["cat"], stdin=master, stdout=subprocess.DEVNULL)  # a terminal that shows what comes
    try:
        until_step(process, work / "run", 3)
    finally:
        os.close(master)
        reader.kill()
        reader.wait()
    assert process.wait(timeout=2000) == 0
    outcome = json.loads((work / "run" / "outcome.json").read_text())
    assert outcome["stop"] == "SIGHUP" and 0 < outcome["step"] < 400
    assert (work / "run" / "checkpoints" / f"step_{outcome['step']:09d}").is_dir()


def _own_terminal() -> None:
    import fcntl
    import termios

    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may have been started by nohup
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.mark.slow
def test_an_ignored_hangup_stays_ignored_and_a_lost_output_ends_nothing(work: Path) -> None:
    read, write = os.pipe()
    ignore = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)  # noqa: E731 - what nohup does
    process = begin(work, stdin=subprocess.DEVNULL, stdout=write, stderr=write, preexec_fn=ignore)
    os.close(write)
    os.close(read)  # whoever read the output is gone
    until_step(process, work / "run", 2)
    process.send_signal(signal.SIGHUP)
    until_step(process, work / "run", 30)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=2000) == 0
    assert json.loads((work / "run" / "outcome.json").read_text())["stop"] == "SIGTERM"


@pytest.mark.slow
@pytest.mark.parametrize(
    "names", [("launch.py", "pipeline/errors.py", "torch.py"), ("launch/__init__.py",)], ids=["files", "package"]
)
def test_files_of_common_names_in_the_working_directory_change_nothing(work: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (work / name).parent.mkdir(exist_ok=True)
        (work / name).write_text(f"raise SystemExit('mine: {name}')\n")
    start = "import sys; sys.path[0] = sys.argv.pop(1); from launch.cli.main import main; main()"  # as the installed command
    words = ["train", "toy.yaml", *SHORT[:-1], "launch.num_processes=2", "train.duration=2 steps"]
    done = subprocess.run(
        [sys.executable, "-c", start, str(ROOT), *words],
        cwd=work,
        env={key: value for key, value in environment().items() if key != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=3000,
        check=False,
    )
    assert done.returncode == 0 and "finished at step 2" in done.stdout, done.stderr


NAMELESS = """
import pwd

def unknown(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")

pwd.getpwuid = unknown
"""


@pytest.mark.slow
@pytest.mark.parametrize("home", [None, "/proc/nowhere"])
def test_a_user_id_without_a_name_trains_or_is_refused_in_a_sentence(work: Path, tmp_path: Path, home: str | None) -> None:
    """What a container's user has whose ID no password file knows, and whose home is missing or cannot be written."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(NAMELESS)
    gone = ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "XDG_CACHE_HOME")
    variables = {key: value for key, value in environment().items() if key not in gone}
    variables |= {"PYTHONPATH": f"{tmp_path / 'site'}:{ROOT}", **({"HOME": home} if home else {})}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "launch.cli.main", *words]
        done = subprocess.run(command, cwd=work, env=variables, capture_output=True, text=True, timeout=3000, check=False)
        assert "Traceback" not in done.stderr, done.stderr
        return done

    no_index = [word for word in SHORT if not word.startswith("data.index")]
    for words in (["train", "toy.yaml", *no_index, "train.duration=2 steps"], ["shards", "index", "data"]):
        done = run(*words)
        assert done.returncode == 2 and "index" in done.stderr, done.stderr
    done = run("train", "toy.yaml", *SHORT, "train.duration=2 steps", "tracking.enabled=true")
    assert done.returncode == 0, done.stderr
    done = run("eval", "run")
    assert done.returncode == 0, done.stderr
    assert not (work / "~").exists()
