"""Ranks that die are replaced from snapshots in host memory, and the run ends as if nothing had happened, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from launch import host_memory, local, preload
from launch.cli import restarts
from pipeline.config.load import load
from pipeline.data.pack import synthetic as scenes
from pipeline.errors import ConfigError, LaunchError
from pipeline.runtime import job_record as record
from pipeline.runtime.failure_claim import claim
from pipeline.runtime.run_directory import RunDirectory
from pipeline.runtime.startup_phases import VARIABLE, StartupPhases
from tests.helpers.limits import LONG, deadline
from tests.helpers.runs import ROOT, TOY, command, environment, recorded, train, weights

STEPS = 30
LENGTH = (f"train.duration={STEPS} steps", "checkpoint.every=20 steps")
RESTARTS = (*LENGTH, "launch.restarts=6", "checkpoint.snapshot_every=2 steps")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("scenes")
    scenes.write(folder, train=120, val=24, size=32, seed=3, samples_per_shard=40)
    return str(folder / "*train-*.tar")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "toy.yaml"
    path.write_text(TOY)
    return path


@pytest.fixture(scope="module")
def undisturbed(shards: str, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("undisturbed") / "run"
    done = train(config, shards, directory, *LENGTH)
    assert done.returncode == 0, done.stderr + done.stdout
    return directory


def faulty(fault: str, config: Path, shards: str, directory: Path, *settings: str) -> tuple[int, str]:
    """Exit code and output of a run whose ranks fail as told."""
    words = command(config, shards, directory, *settings)
    words[words.index("launch.cli.main")] = "tests.helpers.faulty_ranks"
    done = subprocess.run(
        words,
        cwd=ROOT,
        env={**environment(), "FAULT": fault},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LONG,
    )
    assert not host_memory.path_of(directory).exists(), "the snapshots are left in host memory"
    return done.returncode, done.stdout


def starts(directory: Path) -> list[int | None]:
    """The step from which each attempt started."""
    return [row.get("resumed_from") for row in RunDirectory(directory).attempts() if row["event"] == "start"]


def assert_same(run: Path, reference: Path) -> None:
    for rank in (0, 1):
        assert recorded(run, rank) == recorded(reference, rank)
    assert weights(run, STEPS) == weights(reference, STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("preload", ["true", "false"])
def test_ranks_that_are_killed_at_any_place_are_replaced_and_the_end_is_the_undisturbed_one(
    undisturbed: Path, shards: str, config: Path, tmp_path: Path, preload: str
) -> None:
    """Also before the first snapshot, and in the step after a restart."""
    deaths = [(1, 1, "forward"), (0, 7, "step"), (1, 13, "data"), (0, 14, "forward"), (0, 22, "data"), (1, 29, "step")]
    fault = ";".join(f"{rank} {step} {place} kill" for rank, step, place in deaths) + ";"
    run = tmp_path / "run"
    code, said = faulty(fault, config, shards, run, *RESTARTS, f"launch.preload={preload}")
    assert code == 0, said
    again = starts(run)
    assert len(again) == 7 and again[:2] == [None, None]
    for (_, step, _), resumed in zip(deaths[1:], again[2:], strict=True):
        assert resumed is not None and resumed % 2 == 0
        assert step - 6 < resumed <= step, "a snapshot is complete some steps after it was begun"
    assert said.count("in host memory") >= 3 and "0 restarts left" in said, "the others continue from equally new checkpoints"
    assert_same(run, undisturbed)


@pytest.mark.slow
def test_without_a_restart_left_the_death_ends_the_run_and_the_same_command_continues(
    undisturbed: Path, shards: str, config: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    settings = (*LENGTH, "launch.restarts=1", "checkpoint.snapshot_every=2 steps")
    code, said = faulty("1 8 forward kill;0 22 forward kill;", config, shards, run, *settings)
    assert code == 137 and "rank 0 of 2 was ended by SIGKILL" in said
    assert len(starts(run)) == 2
    done = train(config, shards, run, *settings)  # on disk are the checkpoints of the restart and of step 20
    assert done.returncode == 0 and "resuming at step 20" in done.stdout, done.stdout + done.stderr
    assert_same(run, undisturbed)


@pytest.mark.slow
def test_the_same_mistake_twice_from_the_same_step_is_not_tried_a_third_time(shards: str, config: Path, tmp_path: Path) -> None:
    code, said = faulty("1 5 forward bug", config, shards, tmp_path / "run", *RESTARTS)
    assert code == 1 and len(starts(tmp_path / "run")) == 2
    assert "a mistake of ours" in said and "restarts left" in said


@pytest.mark.slow
def test_a_rollback_forgets_the_snapshots_of_the_steps_that_it_undoes(shards: str, config: Path, tmp_path: Path) -> None:
    """Killed when the steps to leave out are noted, while the snapshots of later ones could still be there."""
    settings = (*RESTARTS, "checkpoint.every=8 steps", "watchdog.rollback_after=2", "watchdog.rollback_margin=3")
    nan = "0 13 forward nan 14"
    whole, run = tmp_path / "whole", tmp_path / "run"
    code, said = faulty(f"{nan};", config, shards, whole, *settings)
    assert code == 0 and "back to step 8" in said, said
    code, said = faulty(f"{nan},0 0 back kill;", config, shards, run, *settings)
    assert code == 0 and starts(run) == [None, 8], said
    assert weights(run, STEPS) == weights(whole, STEPS)


@pytest.mark.slow
def test_a_signal_stops_the_run_for_good(shards: str, config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = command(config, shards, run, *RESTARTS, "train.duration=2000 steps")
    with subprocess.Popen(
        words, cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        end = deadline()
        while not recorded(run, 0) and process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=LONG)[0]
    assert process.returncode == 0 and "stopped by SIGTERM" in said, said
    assert len(starts(run)) == 1 and not host_memory.path_of(run).exists()


@pytest.mark.parametrize(("cause", "starts_again"), [("", True), ("hang", True), ("disk", False), ("node", False)])
def test_only_what_may_end_differently_at_once_is_tried_again(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cause: str, starts_again: bool
) -> None:
    """``node``: a machine that computes wrongly; ``disk``: a full one."""
    settings = load(config, ["data.shards=/nowhere/x.tar", "launch.restarts=1", "launch.preload=false"]).config
    run, codes = RunDirectory(tmp_path / "run"), [137, 0]

    def start(*_: object, **__: object) -> int:
        if cause:
            claim(run.logs(run.next_attempt() - 1), {"rank": 0, "what": "it failed", "code": 1, "step": 0, "cause": cause})
        return codes.pop(0)

    monkeypatch.setattr("launch.local.start", start)
    monkeypatch.setattr(restarts, "chosen_again", lambda *_: None)
    assert restarts.attend(settings, run, 1, None, None) == ((1, 0) if starts_again else (0, 137))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ranks", "gpus", "choice", "forks"),
    [(1, 0, "null", True), (2, 0, "null", True), (2, 1, "null", False), (2, 1, "true", True), (2, 0, "false", False)],
)
def test_ranks_on_hosts_without_a_gpu_are_forks_of_one_process(
    config: Path, monkeypatch: pytest.MonkeyPatch, ranks: int, gpus: int, choice: str, forks: bool
) -> None:
    settings = load(config, ["data.shards=/nowhere/x.tar", f"launch.preload={choice}"]).config
    monkeypatch.setenv(VARIABLE, "of the start in which this runs")
    asked: list[Mapping[str, str]] = []
    monkeypatch.setattr(preload, "RankServer", lambda _, environment, compiling: asked.append(environment) or "server")
    monkeypatch.setattr(preload, "gpus", lambda: gpus)
    assert (preload.rank_server(settings, ranks) == "server") is forks
    assert len(asked) == int(forks) and all(VARIABLE not in one for one in asked)


def test_each_start_of_the_ranks_receives_what_its_launcher_has_spent(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = load(config, ["data.shards=/nowhere/x.tar", "launch.restarts=1"]).config
    run = RunDirectory(tmp_path / "run")
    received: list[dict[str, Any]] = []

    def start(*_: object, environment: Mapping[str, str], **__: object) -> int:
        received.append(json.loads(environment[VARIABLE]))
        claim(run.logs(run.next_attempt() - 1), {"rank": 0, "what": "it failed", "code": 137, "step": 0, "cause": "crash"})
        return 137 if len(received) == 1 else 0

    monkeypatch.setattr("launch.local.start", start)
    monkeypatch.setattr(restarts, "chosen_again", lambda *_: None)
    startup = StartupPhases("launcher", begun=1000.0, clock=lambda: 1002.5, cpu=lambda: 1.5)
    startup.mark("index")
    assert restarts.attend(settings, run, 1, None, None, startup=startup) == (1, 0)  # type: ignore[arg-type]
    first, second = ([mark["name"] for mark in one["marks"]] for one in received)
    assert (first, second) == (["index", "checkpoint chosen"], ["checkpoint chosen"])
    assert received[0]["begun"] == 1000 and received[1]["begun"] > 1e9, "a restart begins when the ranks are started again"


def test_a_signal_between_two_attempts_is_heeded(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = load(config, ["data.shards=/nowhere/x.tar", "launch.restarts=3", "launch.preload=false"]).config
    monkeypatch.setattr("launch.local.start", lambda *_, **__: 137)
    monkeypatch.setattr(restarts, "chosen_again", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    assert restarts.attend(settings, RunDirectory(tmp_path / "run"), 1, None, None) == (0, 137)  # type: ignore[arg-type]
    assert "the same command resumes" in capsys.readouterr().err and signal.getsignal(signal.SIGTERM) is before


def test_a_request_to_stop_between_two_attempts_is_obeyed_and_one_from_before_the_launch_is_not(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = load(config, ["data.shards=/nowhere/x.tar", "launch.restarts=3", "launch.preload=false"]).config
    run, starts = RunDirectory(tmp_path / "run"), []
    record.request(run, record.STOP, "from before")

    def start(*_: object, **__: object) -> int:
        starts.append(record.pending_request(run, record.STOP))
        if len(starts) == 2:
            record.request(run, record.STOP, "now")
        return 137

    monkeypatch.setattr("launch.local.start", start)
    monkeypatch.setattr(restarts, "chosen_again", lambda *_: None)
    assert restarts.attend(settings, run, 1, None, None) == (1, 137)  # type: ignore[arg-type]
    assert starts == [None, None] and "the same command resumes" in capsys.readouterr().err


def test_the_ranks_of_the_last_start_are_told_that_no_snapshot_would_be_read(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = load(config, ["data.shards=/nowhere/x.tar", "launch.restarts=2", "launch.preload=false"]).config
    last: list[bool] = []

    def start(*_: object, environment: dict[str, str], **__: object) -> int:
        last.append(host_memory.LAST_START in environment)
        return 137

    monkeypatch.setattr("launch.local.start", start)
    monkeypatch.setattr(restarts, "chosen_again", lambda *_: None)
    restarts.attend(settings, RunDirectory(tmp_path / "run"), 1, None, None)  # type: ignore[arg-type]
    assert last == [False, False, True]


def test_a_rank_that_is_killed_after_the_run_has_finished_is_not_started_again(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = load(config, ["data.shards=/nowhere/x.tar", "launch.restarts=2", "launch.preload=false"]).config
    run = RunDirectory(tmp_path / "run")

    def start(*_: object, **__: object) -> int:
        run.write("outcome.json", {"attempt": 0, "stop": "FINISHED", "steps": 8})
        return 137

    monkeypatch.setattr("launch.local.start", start)
    assert restarts.attend(settings, run, 1, None, None) == (0, 137)  # type: ignore[arg-type]


def test_the_third_interrupt_ends_what_has_no_ranks_yet(tmp_path: Path) -> None:
    received: list[int] = []
    with pytest.raises(KeyboardInterrupt), local.noted(received):
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
    assert received == [signal.SIGINT] * 3


def test_a_signal_from_before_a_start_is_forwarded_to_its_ranks(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", "import time; time.sleep(600)"]
    assert local.start(argv, 2, log_directory=tmp_path, received=[signal.SIGTERM]) == 128 + signal.SIGTERM


def test_snapshots_that_nothing_would_read_are_refused(config: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no effect while launch\.restarts = 0"):
        load(config, ["data.shards=/nowhere/x.tar", "checkpoint.snapshot_every=5 steps"])
    with pytest.raises(ConfigError, match="must be longer than 0"):
        load(config, ["data.shards=/nowhere/x.tar", "checkpoint.snapshot_every=0 steps", "launch.restarts=1"])


def test_a_folder_left_behind_is_emptied_and_a_stranger_s_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    path = host_memory.path_of(run)
    path.mkdir()
    (path / "old").touch()
    with host_memory.folder(run) as folder:
        assert folder == path and not list(folder.iterdir())
        assert folder.stat().st_mode & 0o777 == 0o700
    assert not path.exists()
    with host_memory.folder(tmp_path / "other") as other, host_memory.folder(run):
        assert other.exists(), "it belongs to a process that lives"
    abandoned = host_memory.path_of(tmp_path / "killed")
    abandoned.mkdir()
    with host_memory.folder(run):
        assert not abandoned.exists(), "host memory is not freed by itself"
    path.symlink_to(tmp_path)
    try:
        with pytest.raises(LaunchError, match="not this user's folder"), host_memory.folder(run):
            pass
    finally:
        path.unlink()
    assert tmp_path.is_dir() and host_memory.path_of(tmp_path / "other") != path


def test_ranks_are_forked_with_their_own_environment_arguments_and_output(tmp_path: Path) -> None:
    from launch.forked import RankServer
    from pipeline.runtime.interpreter import module_command

    (tmp_path / "extra_rank.py").write_text(
        "import os, sys\n"
        "print(sys.argv[1:], os.environ['RANK'], 'torch' in sys.modules, os.getsid(0) == os.getpid())\n"
        "if sys.argv[1] == 'kill': os.kill(os.getpid(), 9)\n"
        "sys.exit(int(sys.argv[2]))\n"
    )
    surroundings = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    again: dict[str, Any] = {"log_directory": tmp_path, "environment": surroundings}
    server = RankServer(local.tied([]), local.common_environment(2, surroundings))
    try:
        for words, code in ((("run", "0"), 0), (("run", "7"), 7), (("kill", "0"), 137)):
            argv = [*module_command("extra_rank", *words)]
            ended = local.start(argv, 2, **again, server=server)
            assert ended == code
        text = (tmp_path / "rank-1.log").read_text()
        assert text.splitlines()[:2] == ["['run', '0'] 1 True True", "['run', '7'] 1 True True"]
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):  # as a service or a job sends to all its processes
            server._process.send_signal(number)
        assert local.start([*module_command("extra_rank", "run", "0")], 2, **again, server=server) == 0
        assert (tmp_path / "rank-1.log").read_text().endswith("['run', '0'] 1 True True\n"), "the server has outlived them"
        server._process.kill()
        server._process.wait()
        argv = module_command("extra_rank", "run", "0")
        assert local.start(argv, 2, **again, server=server) == 0
        assert "['run', '0'] 1 False True" in (tmp_path / "rank-1.log").read_text(), "without the server they start anew"
    finally:
        server.close()
